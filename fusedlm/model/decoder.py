"""The decoder: embedding, blocks by the recipe's pattern, language-model head."""

import torch

from fusedlm.config.model import ModelConfig, YaRNConfig
from fusedlm.model.precision import resolve_dtype
from fusedlm.nn.block import Block
from fusedlm.nn.cache import TokenCache
from fusedlm.nn.context import Context, document_positions, row_boundaries, varlen_boundaries
from fusedlm.nn.lm_head import LMHead
from fusedlm.ops.attention.sdpa import flash_packed
from fusedlm.ops.common import Choice, Setting


class State:
    """What decoding carries from call to call: every mixer's own state, and where the last document stands.

    length: tokens seen.
    """

    def __init__(self, layers: list, batch_size: int, device: torch.device):
        self.layers = layers
        self.length = 0
        self.packed = False
        self.next_position_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.last_document_B = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def nbytes(self) -> int:
        """Bytes of the live tensors of the mixers."""
        return sum(tensor.untyped_storage().nbytes() for part in self._parts() for tensor in part.tensors())

    def extend_to(self, n_tokens: int) -> None:
        """Stand as after n_tokens, the rows of the caches repeated: bytes and speed of decoding at a length do not
        depend on what the tokens were, and can so be measured without computing them."""
        if n_tokens < self.length:
            raise ValueError(f"the state has seen {self.length} tokens, which is more than {n_tokens}")
        for part in self._parts():
            if isinstance(part, TokenCache):
                part.extend_to(n_tokens)
        self.next_position_B += n_tokens - self.length
        self.length = n_tokens

    def _parts(self) -> list:
        return [part for layer in self.layers for part in (layer if isinstance(layer, list) else [layer])]


class Decoder(torch.nn.Module):
    """tokens (B, T) -> logits (B, T, vocab_size)."""

    def __init__(self, config: ModelConfig, vocab_size: int, setting: Setting):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.yarn = config.yarn
        rows = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.embedding = torch.nn.Embedding(rows, config.dim)
        torch.nn.init.normal_(self.embedding.weight, std=config.initial_embedding_std)
        self.dropout = torch.nn.Dropout(config.dropout)
        self.layer_names = config.layer_blocks()
        self.blocks = torch.nn.ModuleList(
            Block(config.blocks[name], config, setting, layer) for layer, name in enumerate(self.layer_names)
        )
        self.head = LMHead(config, self.embedding, vocab_size, setting)
        self.rope_specs = set().union(*(block.mixer.rope_specs() for block in self.blocks))
        self.needs_boundaries = any(choice.function is flash_packed for choice in self.implementations.values())

    @property
    def implementations(self) -> dict[str, Choice]:
        """Which implementation runs, by `block letter.op` and `head.op`."""
        named = {
            f"{name}.{choice.op}": choice
            for name, block in zip(self.layer_names, self.blocks, strict=True)
            for choice in block.choices
        }
        return named | {f"head.{choice.op}": choice for choice in self.head.choices}

    def forward(self, tokens, documents=None, state: State | None = None) -> torch.Tensor:
        """Logits of the token after each.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) int64; a new document begins where the number changes, and nothing is seen across it.
                None: one document.
            state: from `init_state`, updated in place: the tokens follow those it has seen.

        Returns:
            (B, T, vocab_size), float32 or better.

        Raises:
            ValueError: shapes that do not fit together.
        """
        return self.head.logits(self.hidden(tokens, documents, state))

    def hidden(self, tokens, documents=None, state: State | None = None) -> torch.Tensor:
        """(B, T, dim) before the head; arguments as in `forward`."""
        self._check(tokens, documents, state)
        context = self._context(tokens, documents, state)
        x = self.embedding(tokens) * self.config.embedding_scale
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # a float32 residual stream would double its traffic
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            # Compiled blocks are for training: other lengths and modes would recompile them again and again.
            run = block if torch.is_grad_enabled() else block.forward
            x = run(x, context, None if state is None else state.layers[index])
        if state is not None:
            self._advance(state, context, tokens, documents)
        return x

    def loss(self, tokens, targets, documents=None) -> torch.Tensor:
        """(B, T) nll in nats of targets (B, T) int64; 0 where the target is -100."""
        return self.head.loss(self.hidden(tokens, documents), targets)

    def weighted_loss(self, tokens, targets, weight: torch.Tensor, documents=None) -> torch.Tensor:
        """() sum of `loss` times weight (), for training: the logits are perhaps never held whole."""
        return self.head.weighted_loss(self.hidden(tokens, documents), targets, weight)

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> State:
        """An empty state. Caches are reserved for max_tokens when that is given, and grow with the tokens otherwise."""
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"init_state takes positive sizes, not batch_size={batch_size}, max_tokens={max_tokens}")
        layers = [block.mixer.init_state(batch_size, max_tokens) for block in self.blocks]
        return State(layers, batch_size, self.embedding.weight.device)

    def set_yarn(self, yarn: YaRNConfig | None) -> None:
        """Stretch the rotary embedding of all mixers, in place of what the recipe says; None: not at all.

        Raises:
            ValueError: no mixer has rotary embedding.
        """
        if yarn is not None and not any(dim for dim, _ in self.rope_specs):
            raise ValueError("YaRN stretches rotary embedding, and no mixer of this model has any")
        self.yarn = yarn

    def recompute_mixers(self) -> None:
        """Keep of each mixer, for the backward pass, its input and what its attention gives; compute the rest again."""
        for block in self.blocks:
            block.recompute_mixer()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile each block and the head's loss for training, a full graph each.

        Raises the process's limit on graphs of one function: all kinds of block, of every model that is compiled, are
        graphs of `Block.forward`, and with PyTorch's limit of 8 a ninth would fail.
        """
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, config.accumulated_recompile_limit)
        for block in self.blocks:
            block.compile(fullgraph=True, backend=backend)
        self.head.compile(fullgraph=True, backend=backend)

    def _context(self, tokens, documents, state) -> Context:
        batch, n_tokens = tokens.shape
        packed = documents is not None or (state is not None and state.packed)
        n_past = 0 if state is None else state.length
        if documents is not None:
            past = (state.last_document_B, state.next_position_B) if n_past else ()
            positions = document_positions(documents, *past)
        else:
            positions = torch.arange(n_tokens, device=tokens.device)[None]
            if n_past:
                positions = state.next_position_B[:, None] + positions
        context = Context(positions.expand(batch, -1) if packed else positions[:1], packed, n_past)
        if self.needs_boundaries and n_past == 0:
            if packed:
                context.boundaries = varlen_boundaries(context.positions_BT)
            else:  # for windows; known without asking the device
                context.boundaries = row_boundaries(batch, n_tokens, tokens.device)
        wide = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        context.add_rope(self.rope_specs, wide, self.yarn)
        return context

    @staticmethod
    def _advance(state: State, context: Context, tokens, documents) -> None:
        state.length += tokens.shape[1]
        state.packed = context.packed
        state.next_position_B = (context.positions_BT[:, -1] + 1).expand(tokens.shape[0]).contiguous()
        if documents is not None:
            state.last_document_B = documents[:, -1].clone()

    @staticmethod
    def _check(tokens, documents, state) -> None:
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be (batch, length), both at least 1, not {tuple(tokens.shape)}")
        if documents is not None and documents.shape != tokens.shape:
            raise ValueError(f"documents {tuple(documents.shape)} must have the shape of tokens {tuple(tokens.shape)}")
        if state is not None and state.next_position_B.shape[0] != tokens.shape[0]:
            n_sequences = state.next_position_B.shape[0]
            raise ValueError(f"the state is for {n_sequences} sequences, tokens has {tokens.shape[0]}")


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Decoder:
    """The decoder of a recipe, float32 parameters drawn from torch's global generator, the same on every device.

    Args:
        config: `recipe.model`.
        vocab_size: tokens that can be predicted.
        device: where it lives; "meta" gives shapes without memory.
        dtype: that of the activations, autocast's if that is to be used: it decides which implementation of an op can
            run. None: bfloat16 on CUDA, float32 elsewhere.
        deterministic: choose only implementations whose results never differ between runs.

    Raises:
        ValueError: vocab_size is not positive, or the recipe asks for an implementation that cannot run.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}; a model predicts at least one token")
    device = torch.device(device)
    setting = Setting(device, dtype or resolve_dtype("auto", device), deterministic)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = Decoder(config, vocab_size, setting)
    return model.to(device)
