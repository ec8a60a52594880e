"""The classes of Transformers around the decoder. This module is read as text and never imported: what it becomes is
written beside the weights of a model, together with the parts of the package that the model needs."""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusedlm.model.decoder import Decoder

# Transformers 5.24 calls the cache `cache`, versions before it `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class FusedLMConfig(PretrainedConfig):
    """arguments: of `Decoder`, without the size of the vocabulary. scales: numbers that differ from those that
    its constructors set, by the path of the attribute."""

    model_type = "fusedlm"

    def __init__(
        self, vocab_size=1, arguments=None, scales=None, max_position_embeddings=2048, use_cache=True, **kwargs
    ):
        self.vocab_size, self.arguments, self.scales = vocab_size, arguments or {}, scales or {}
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        self.hidden_size, self.num_hidden_layers = self.arguments.get("dim"), self.arguments.get("n_layers")
        super().__init__(**kwargs)


class FusedLMCache:
    """The state of all layers. `generate` sees as its length the columns that went in, padding included."""

    is_compileable = False
    is_linear = (False,)

    def __init__(self, state):
        self.state, self.columns = state, 0

    def get_seq_length(self, layer_idx=0):
        return self.columns

    def get_max_length(self):
        return None

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def reorder_cache(self, beam_idx):
        """Row i becomes the row beam_idx[i]."""
        state, rows = self.state, beam_idx.tolist()
        for part in state.parts():
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.index_select(0, beam_idx.to(value.device)))
        state.lengths = [state.lengths[row] for row in rows]
        state.next_position_B = state.next_position_B.index_select(0, beam_idx.to(state.next_position_B.device))
        return self

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.reorder_cache(torch.arange(len(self.state.lengths)).repeat_interleave(repeats))


class FusedLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder as Transformers calls it.

    Tokens that the attention mask excludes do not exist for the model, on whichever side they are: positions count the
    others, and each row has the logits that it has alone.
    """

    config_class = FusedLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _is_stateful = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
    _keep_in_fp32_modules_strict = []

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(vocab_size=config.vocab_size, **config.arguments)
        for path, value in config.scales.items():
            *above, name = path.split(".")
            setattr(self.model.get_submodule(".".join(above)), name, value)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def _init_weights(self, module):
        """Constructors have drawn all parameters."""

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, value):
        self.model.head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """Logits (B, T or logits_to_keep, vocabulary), and with use_cache the cache to give to the next call.

        Args:
            input_ids: (B, T) int64, the tokens after those in the cache.
            attention_mask: (B, at least T), 0 for tokens to leave out; of more than T columns the last T count.
            position_ids: (B, T); must be those of the tokens that the mask keeps, in order.
            cache, past_key_values: one and the same, by the names of two versions of Transformers.
            labels: (B, T), the tokens themselves; -100 where there is none. Of padding they must be -100.
            logits_to_keep: the number of last columns, or the indices of columns, whose logits are computed; 0: all.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: the model reads tokens, not embeddings")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and labels is None:
            cache = FusedLMCache(self.model.init_state(len(input_ids)))
        state = None if cache is None else cache.state
        tokens, lengths, places = self._without_padding(input_ids, attention_mask)
        self._check_positions(position_ids, places, state, input_ids.shape)
        hidden = self.model(tokens, state, lengths)
        if places is not None:
            index = places.clamp(min=0, max=hidden.shape[1] - 1)[..., None]
            hidden = hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))
        if cache is not None:
            cache.columns += input_ids.shape[1]
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.model.head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache if use_cache else None})
        return output if return_dict is None or return_dict else output.to_tuple()

    @staticmethod
    def _without_padding(input_ids, attention_mask):
        """The tokens of each row moved to its start; how many each row has; and the place of each column among them,
        negative where it is left out. Without padding the last two are None."""
        if attention_mask is None:
            return input_ids, None, None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
            given, needed = tuple(attention_mask.shape), tuple(input_ids.shape)
            raise ValueError(f"attention_mask {given} must have the rows of input_ids {needed} and no fewer columns")
        keep = attention_mask[:, -input_ids.shape[1] :].bool()
        if keep.all():
            return input_ids, None, None
        order = (~keep).long().argsort(dim=1, stable=True)
        lengths = keep.sum(1)
        tokens = input_ids.masked_fill(~keep, 0).gather(1, order)[:, : max(1, int(lengths.max()))]
        return tokens, lengths.tolist(), (keep.long().cumsum(1) - 1).masked_fill(~keep, -1)

    @staticmethod
    def _check_positions(position_ids, places, state, shape):
        """Raises ValueError unless positions are those that the model computes."""
        if position_ids is None:
            return
        if places is None:
            places = torch.arange(shape[1], device=position_ids.device).expand(shape)
        before = 0 if state is None else state.next_position_B[:, None]
        if not ((position_ids == places + before) | (places < 0)).all():
            raise ValueError("position_ids must count the tokens that the mask keeps; leave them out")


FusedLMConfig.register_for_auto_class()
FusedLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
