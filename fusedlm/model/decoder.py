"""The decoder: embedding, blocks by a pattern, language-model head."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from fusedlm.model.layer_metrics import collect, summarise
from fusedlm.model.multi_token import multi_token_loss, prediction_modules
from fusedlm.model.output import Output
from fusedlm.model.state import State
from fusedlm.nn.bigram import BigramHash
from fusedlm.nn.block import Block, Recompute
from fusedlm.nn.context import Context, document_positions, row_boundaries
from fusedlm.nn.embedding import Embedding
from fusedlm.nn.ffn.divided_experts import DividedExperts
from fusedlm.nn.lm_head import LMHead
from fusedlm.nn.module import UNFUSED, UNFUSED_REASON, Module, OpUse, use_backends
from fusedlm.nn.mup import MuP
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.previous import PreviousToken
from fusedlm.nn.rope import YaRN
from fusedlm.nn.smear import SmearGate
from fusedlm.nn.soft_targets import SoftTargets
from fusedlm.nn.value_embedding import STD as VALUE_STD
from fusedlm.ops.attention.sdpa import varlen_boundaries
from fusedlm.ops.common import OPS, BackendSelection, Call
from fusedlm.ops.cross_entropy.reference import SigmoidCap


class Decoder(Module):
    """tokens (B, T) -> Output. Everything it computes goes through the `__call__` of its parts.

    mup: the growth of its parameters over those at base width, which optimizers read; None: standard parametrisation.
    """

    mup: MuP | None = None

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        n_layers: int,
        pattern: str,
        blocks: dict[str, dict],
        tie_embeddings: bool = True,
        logit_softcap: float | None = None,
        logit_rescale: dict | None = None,
        norm_eps: float = 1e-6,
        norm_gain: bool = True,
        dropout: float = 0.0,
        embedding_std: float | None = None,
        embedding_rms: float | None = 1.0,
        embedding_norm: bool = False,
        yarn: dict | None = None,
        bigram: dict | None = None,
        smear: bool = False,
        x0_mixing: bool = False,
        unet_skips: bool = False,
        depth_scaled_norms: bool = False,
        init: str = "normal",
        mtp: dict | None = None,
        vocab_multiple: int = 64,
    ):
        """Allocates; `init_weights` draws. The arguments are plain values, under the names of `fusedlm.config.model`.

        Args:
            vocab_size: tokens that can be predicted.
            pattern: one letter per layer, tiled to n_layers; each names a block.
            blocks: by letter {"mixer": {"type": ..., ...}, "ffn": {"type": ..., ...}}.
            logit_rescale: arguments of `SigmoidCap`, in place of a softcap; None: none.
            yarn: arguments of `YaRN`, for every mixer with rotary embedding; None: not stretched.
            bigram: arguments of `BigramHash`; None: none.
            init: normal or orthogonal, of hidden matrices.
            mtp: the keys of `fusedlm.config.model.MTPConfig`; None, or depth 0: no multi-token prediction.

        Raises:
            ValueError: blocks have value embeddings of different widths.
        """
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.yarn = self.recipe_yarn = None if yarn is None else YaRN(**yarn)
        if embedding_std is None:
            embedding_std = default_embedding_std(dim, tie_embeddings)
        self.embedding_scale = 1.0 if embedding_rms is None or embedding_norm else embedding_rms / embedding_std
        n_rows = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.embedding = Embedding(vocab_size, n_rows, dim, embedding_std)
        self.bigram = None if bigram is None else BigramHash(**bigram, out_dim=dim)
        self.embedding_norm = RMSNorm(dim, norm_eps, has_gain=False) if embedding_norm else None
        self.smear = SmearGate(dim) if smear else None
        self.layer_names = [pattern[i % len(pattern)] for i in range(n_layers)]
        self.value_table = self._value_table(vocab_size, n_rows, [blocks[name]["mixer"] for name in self.layer_names])
        self.dropout = torch.nn.Dropout(dropout)
        value_sources: set = set()
        self.n_skips = n_layers // 2 if unet_skips else 0
        first_skip = n_layers // 2  # the block that adds the output of the one before it
        self.blocks = torch.nn.ModuleList(
            Block(
                dim=dim,
                **blocks[name],
                dropout=dropout,
                norm_eps=norm_eps,
                layer=layer,
                value_sources=value_sources,
                depth_scaled_norms=depth_scaled_norms,
                norm_gain=norm_gain,
                mixes_x0=x0_mixing,
                takes_skip=0 <= layer - first_skip < self.n_skips,
            )
            for layer, name in enumerate(self.layer_names)
        )
        self.mtp, self.mtp_factors = None, []
        if mtp is not None and mtp["depth"]:
            letter = mtp["block"] or self.layer_names[-1]
            shared = {"dim": dim, "dropout": dropout, "norm_eps": norm_eps, "depth_scaled_norms": depth_scaled_norms}
            shared["norm_gain"] = norm_gain
            self.mtp = prediction_modules(mtp["depth"], first_layer=n_layers, **blocks[letter], **shared)
            self.mtp_factors = mtp["depth_weights"] or [1 / mtp["depth"]] * mtp["depth"]
            self.add_constant("mtp_weight", mtp["weight"])
        cap = logit_softcap if logit_rescale is None else SigmoidCap(**logit_rescale)
        tied = self.embedding if tie_embeddings else None
        sizes = {"dim": dim, "n_rows": n_rows, "vocab_size": vocab_size}
        self.head = LMHead(**sizes, cap=cap, norm_eps=norm_eps, norm_gain=norm_gain, tied=tied)
        self.tied = tie_embeddings
        self._step_calls: list | None = None
        self.rope_specs = set().union(*(block.mixer.rope_specs() for block in self.all_blocks()))
        if init == "orthogonal":
            for module in self.modules():
                if hasattr(module, "init_orthogonal"):
                    module.init_orthogonal()

    @staticmethod
    def _value_table(vocab_size: int, n_rows: int, mixers: list[dict]) -> Embedding | None:
        """The table of the value embeddings of all layers."""
        widths = {mixer.get("value_embedding") for mixer in mixers} - {None}
        if len(widths) > 1:
            raise ValueError(f"blocks share one table of value embeddings, which has one width, not {sorted(widths)}")
        return Embedding(vocab_size, n_rows, widths.pop(), VALUE_STD) if widths else None

    def _apply(self, fn, recurse=True):
        """torch moves each module's parameters alone: off the meta device a tied weight would become two."""
        super()._apply(fn, recurse)
        if self.tied:
            self.head.weight = self.embedding.weight
        return self

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        documents: torch.Tensor | None = None,
        state: State | None = None,
        lengths: Sequence[int] | torch.Tensor | None = None,
        select: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
        batch_weight: torch.Tensor | float = 1.0,
        soft_targets: SoftTargets | None = None,
        hidden: bool = False,
    ) -> Output:
        """Logits of the token after each, or the loss on targets.

        Without gradients, parts that were compiled for training run uncompiled: other lengths and modes would recompile
        them again and again.

        Args:
            tokens: (B, T) int64.
            documents: (B, T) int64; a new document begins where the number changes, and nothing is seen across it.
                None: one document.
            state: from `init_state`, updated in place: the tokens follow those it has seen.
            lengths: with a state, how many of the T tokens each row has, from 0; the rest is padding, whose outputs are
                meaningless. None: all.
            select: (n,) int64 indices into the B * T tokens: the head runs on these alone, and metrics of tokens count
                these alone. None: all.
            targets: the tokens to predict, -100 where there is none: (B, T) int64, or (n,) with a selection.
            loss_weight: () factor on each token's nll and on each loss per token; None: one over the number of valid
                targets of this call.
            batch_weight: factor on losses that are means over the sequences of this call.
            soft_targets: of the tokens that have targets, which must be given too.
            hidden: return the output of the last block too, for `draft`.

        Raises:
            ValueError: shapes that do not match, a state without room, or on the CPU an id outside of the vocabulary.
        """
        n_new = self._check(tokens, documents, state, lengths)
        context = self._context(tokens, documents, state, n_new, select)
        with self._compilation(state):
            embedded = self.embedding(tokens)
            x = self._embed(embedded, tokens, context, {} if state is None else state.inputs)
            x, reports = self._through_blocks(x, context, state)
            logits, nll, losses, soft = self._head(x, select, targets, loss_weight, soft_targets)
            if self.mtp is not None and self.training and targets is not None and state is None:
                losses["mtp"], further = multi_token_loss(self, x, embedded, context, targets, loss_weight)
                reports += further
        if state is not None:
            state.advance(context, documents, n_new)
        own, metrics = collect(reports)
        metrics |= soft
        for name, loss in own.items():
            weight = batch_weight
            if loss.per == "token":
                weight = 1.0 if loss_weight is None else loss_weight
            losses[name] = loss.value * weight
        return Output(logits, nll, losses, metrics, x if hidden else None)

    def _embed(
        self, embedded_BTD, tokens_BT: torch.Tensor, context: Context, states: dict[str, PreviousToken]
    ) -> torch.Tensor:
        """The input of the first block; the context gets the rows of the value embedding."""
        x = embedded_BTD
        if self.bigram is not None:
            x = x + self.bigram(tokens_BT, context, states.get("bigram"))
        x = self.cast(x * self.embedding_scale)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.smear is not None:
            x = self.smear(x, context, states.get("smear"))
        if self.value_table is not None:
            context.value_rows_BTW = self.cast(self.value_table(tokens_BT))
        return self.dropout(x)

    def _through_blocks(self, x: torch.Tensor, context: Context, state: State | None) -> tuple[torch.Tensor, list]:
        """The output of the last block, and the report of each."""
        reports, x0, skips = [], x, []
        for index, block in enumerate(self.blocks):
            inputs = {"x0_BTD": x0} if block.mixes_x0 and index > 0 else {}
            if block.takes_skip:
                inputs["skip_BTD"] = skips.pop()
            x, report = block(x, context, None if state is None else state.layers[index], **inputs)
            reports.append(report)
            if index < self.n_skips:
                skips.append(x)
        return x, reports

    @staticmethod
    def cast(x: torch.Tensor) -> torch.Tensor:
        """x in autocast's dtype: a float32 residual stream would double its traffic."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def draft(
        self,
        depth: int,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        state: State,
        lengths: Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a module of multi-token prediction, for `fusedlm.generation`; the head gives the logits of its output.

        Args:
            depth: of the module, from 1.
            tokens: (B, T) int64, the tokens `depth` places after the positions.
            hidden: (B, T, dim), the output of the module before, or for the first one of the last block.
            state: of `init_draft_state`, updated in place: the positions follow those it has seen.
            lengths: as `forward` takes them.

        Returns:
            (B, T, dim).
        """
        n_new = self._check(tokens, None, state, lengths)
        context = self._context(tokens, None, state, n_new, None)
        with self._compilation(state):
            embedded = self.embedding(tokens)
            if self.value_table is not None:
                context.value_rows_BTW = self.cast(self.value_table(tokens))
            x, _ = self.mtp[depth - 1](hidden, self.cast(embedded * self.embedding_scale), context, state.layers[0])
        state.advance(context, None, n_new)
        return x

    def init_draft_state(self, depth: int, batch_size: int) -> State:
        """An empty state of the module of that depth, from 1."""
        mixer = self.mtp[depth - 1].block.mixer
        return State([mixer.init_state(batch_size)], batch_size, self.embedding.weight.device, {})

    def set_mtp_weight(self, weight: float) -> None:
        """The weight of the loss of multi-token prediction from now on; in the memory that a CUDA graph reads."""
        self.mtp_weight.fill_(weight)

    def all_blocks(self) -> list[Block]:
        """Those of the layers, and those of multi-token prediction."""
        return [*self.blocks, *(module.block for module in self.mtp or ())]

    def _head(self, x_BTD, select, targets, loss_weight, soft_targets):
        """Logits, nll, losses and metrics."""
        if select is not None:
            x_BTD = x_BTD.flatten(0, 1)[select]
        if targets is None:
            return self.head(x_BTD), None, {}, {}
        if targets.shape != x_BTD.shape[:-1]:
            raise ValueError(f"targets {tuple(targets.shape)} must have the shape {tuple(x_BTD.shape[:-1])}")
        if loss_weight is None:
            loss_weight = (targets != -100).sum().clamp(min=1).double().reciprocal()
        x_ND, targets_N = x_BTD.flatten(0, -2), targets.flatten()
        if soft_targets is None:
            loss, nll = self.head(x_ND, targets_N, loss_weight)
            return None, nll.view(targets.shape), {"nll": loss}, {}
        loss, nll, soft_loss, divergence = self.head(x_ND, targets_N, loss_weight, soft_targets)
        sums = [nll.sum(dtype=torch.float64), divergence.sum(dtype=torch.float64), (targets_N != -100).sum().double()]
        weight = soft_targets.weight
        losses = {"nll": (1 - weight) * loss, "distill": weight * soft_loss}
        return None, nll.view(targets.shape), losses, {self.head.metric: torch.stack(sums)[None]}

    def init_state(self, batch_size: int, max_tokens: int | None = None) -> State:
        """An empty state. Caches are reserved for max_tokens when that is given, and grow with the tokens otherwise."""
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"init_state takes positive sizes, not batch_size={batch_size}, max_tokens={max_tokens}")
        layers = [block.mixer.init_state(batch_size, max_tokens) for block in self.blocks]
        inputs = {name: getattr(self, name).init_state() for name in self._stateful_inputs()}
        return State(layers, batch_size, self.embedding.weight.device, inputs)

    def _stateful_inputs(self) -> list[str]:
        """Names of the parts before the first block that have a state."""
        return [name for name in ("bigram", "smear") if getattr(self, name, None) is not None]

    def input_parts(self) -> list[Module]:
        """These parts, which like mixers have `state_bytes`."""
        return [getattr(self, name) for name in self._stateful_inputs()]

    def set_yarn(self, yarn: YaRN | None) -> None:
        """Stretch the rotary embedding of all mixers, replacing the recipe's setting; None: not at all.

        Raises:
            ValueError: no mixer has rotary embedding.
        """
        if yarn is not None and not any(dim for dim, _ in self.rope_specs):
            raise ValueError("YaRN stretches rotary embedding, and no mixer of this model has any")
        self.yarn = yarn

    def use_backends(self, backends: dict[str, str]) -> None:
        """Run these backends from now on, by op; an op that is not named runs the fastest one for its tensors."""
        use_backends(self, backends)

    def explain(
        self, device: torch.device | str, dtype: torch.dtype, deterministic: bool = False
    ) -> dict[str, BackendSelection]:
        """Which backend of each op would run on a device with activations in dtype, by `block letter.op` and `head.op`.

        Raises:
            ValueError: a requested backend cannot run there.
        """
        device = torch.device(device)
        call = Call(device, dtype, deterministic)
        modules = [("mtp", module) for module in self.mtp or ()]
        parts = [*zip(self.layer_names, self.blocks, strict=True), *modules, ("head", self.head)]
        return {f"{name}.{use.name}": self._explain(use, call) for name, part in parts for use in part.ops(device)}

    def _explain(self, use: OpUse, call: Call) -> BackendSelection:
        selection = OPS[use.op].select(self.backend(use.op), call, **use.sizes)
        if use.op in self.backends or use.op not in UNFUSED:
            return selection
        return replace(selection, reason=UNFUSED_REASON)

    def summarise(self, metrics: dict[str, torch.Tensor]) -> dict:
        """Figures of summed `Output.metrics`, as metrics.jsonl and `fusedlm eval --json` hold them: numbers and lists
        of them by name. Waits for the device if the metrics are on one."""
        return summarise(self, metrics)

    def recompute(self, what: Recompute) -> None:
        """What the backward pass recomputes. mixer: only the input and the attention output of each mixer are saved for
        backward; block: only the input of each block."""
        for block in self.all_blocks():
            block.recompute(what)

    def compile_blocks(self, backend: str = "inductor", dynamic: bool | None = None) -> None:
        """torch.compile each block and the head for training, one full graph each, or several around divided
        experts, which run uncompiled. dynamic: as torch.compile takes it.

        Raises the process's recompile limit: all kinds of block of all models are graphs of one function, and PyTorch's
        limit of 8 would make the ninth fail. Makes integers constants of the process's graphs, as those of a module
        are unless FSDP manages it: there the second kind of block would have a symbolic number of heads.
        """
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, config.accumulated_recompile_limit)
        config.specialize_int = True
        for part in self._compiled_parts():
            divided = any(isinstance(module, DividedExperts) for module in part.modules())
            part.compile(fullgraph=not divided, backend=backend, dynamic=dynamic)

    def _compiled_parts(self) -> tuple[Module, ...]:
        return (*self.input_parts(), *self.blocks, *(self.mtp or ()), self.head)

    def compile_steps(self, options: dict | None) -> None:
        """torch.compile each block and the head for one-token steps over a static state, whatever is compiled for
        training. options: of torch.compile; None: steps run uncompiled again.

        Raises the process's recompile limit, as `compile_blocks`.
        """
        if options is None:
            self._step_calls = None
            return
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, config.accumulated_recompile_limit)
        self._step_calls = [
            torch.compile(part._call_impl, fullgraph=True, dynamic=False, **options) for part in self._compiled_parts()
        ]

    @contextlib.contextmanager
    def _compilation(self, state: State | None) -> Iterator[None]:
        """Without gradients only steps run compiled, whatever else was compiled."""
        parts = self._compiled_parts()
        trained = [part._compiled_call_impl for part in parts]
        if self._step_calls is not None and state is not None and state.capacity is not None:
            try:
                for part, call in zip(parts, self._step_calls, strict=True):
                    part._compiled_call_impl = call
                yield
            finally:
                for part, call in zip(parts, trained, strict=True):
                    part._compiled_call_impl = call
        elif not any(trained) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            yield
        else:
            with torch.compiler.set_stance("force_eager"):
                yield

    def _context(self, tokens, documents, state, n_new: list[int] | None, select) -> Context:
        batch, n_tokens = tokens.shape
        packed = documents is not None or (state is not None and state.packed)
        past = 0 if state is None else state.past(n_tokens)
        starts_B = None if state is None else state.starts()
        if documents is not None:
            before = (state.last_document_B, state.next_position_B) if past else ()
            positions = document_positions(documents, *before)
        elif state is not None and state.capacity is not None:
            positions = state.next_of(state.next_position_B, n_tokens)
        else:
            positions = torch.arange(n_tokens, device=tokens.device)[None]
            if past:
                positions = state.next_position_B[:, None] + positions
        one_row = not packed and starts_B is None
        context = Context(positions[:1] if one_row else positions.expand(batch, -1), packed, past, starts_B)
        context.select, context.prompts = select, state is not None
        context.slots_B = None if state is None else state.slots(n_tokens)
        if isinstance(n_new, torch.Tensor):
            context.lengths_B = n_new
        elif n_new is not None and min(n_new) < n_tokens:
            context.lengths_B = torch.tensor(n_new, device=tokens.device)
        if past == 0 and self._varlen_attention(tokens.device):
            if packed:
                context.boundaries = varlen_boundaries(context.positions_BT)
            else:  # for windows
                context.boundaries = row_boundaries(batch, n_tokens, tokens.device)
        wide = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        of_next = None if state is None or state.capacity is None else partial(state.rope, n_tokens=n_tokens)
        context.add_rope(self.rope_specs, wide, self.yarn, of_next)
        return context

    def _varlen_attention(self, device: torch.device) -> bool:
        """Whether attention with documents or windows runs the variable-length kernel."""
        if device.type != "cuda":
            return False
        dtype = self.embedding.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        call = Call(device, dtype, torch.are_deterministic_algorithms_enabled())
        requested = self.backend("packed_attention")
        return any(
            OPS["packed_attention"].select(requested, call, **use.sizes).backend == "flash"
            for block in self.all_blocks()
            for use in block.ops(device)
            if use.op == "packed_attention"
        )

    @staticmethod
    def _check(tokens, documents, state, lengths) -> list[int] | torch.Tensor | None:
        """The number of new tokens of each row, with a state; a tensor of a static one if it was given."""
        if tokens.dim() != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be (batch, length), both at least 1, not {tuple(tokens.shape)}")
        batch, n_tokens = tokens.shape
        if documents is not None and documents.shape != tokens.shape:
            raise ValueError(f"documents {tuple(documents.shape)} must have the shape of tokens {tuple(tokens.shape)}")
        if state is None:
            if lengths is not None:
                raise ValueError("lengths are for a state; without one, ignore what follows each row's last token")
            return None
        if len(state.lengths) != batch:
            raise ValueError(f"the state is for {len(state.lengths)} sequences, tokens has {batch}")
        if state.capacity is not None:
            state.check_static(n_tokens, lengths, documents)
            if isinstance(lengths, torch.Tensor):
                return lengths
        if lengths is None:
            return [n_tokens] * batch
        lengths = [int(n) for n in lengths]
        if len(lengths) != batch or not all(0 <= n <= n_tokens for n in lengths):
            raise ValueError(f"lengths={lengths} must have a number from 0 to {n_tokens} for each of {batch} rows")
        return lengths


def default_embedding_std(dim: int, tied: bool) -> float:
    """A tied embedding whose residual stream is still the embedding itself gives its own token the logit dim * std; at
    2 / dim that is 2, and training starts at ln(vocab)."""
    return min(0.02, 2 / dim) if tied else 0.02

