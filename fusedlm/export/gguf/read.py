"""A model of a GGUF file, as configuration and tensors of a class of Transformers, and its tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch

from fusedlm.export.gguf.vocabulary import tokenizer_json
from fusedlm.export.gguf.write import require_gguf

MAGIC = b"GGUF"  # how a file begins
_NORMAL, _CONTROL = 1, 3
# The architectures that are read: (model_type, activation, whether rotary dimensions come in adjacent pairs).
_KNOWN = {
    "llama": ("llama", "silu", True),
    "qwen3": ("qwen3", "silu", False),
    "arcee": ("arcee", "relu2", True),
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **{f"attn_{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkv"},
    **{f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"},
    **{f"ffn_{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}


class GGUFModel:
    """config: as of config.json. tokenizer, end_of_text: the content of a tokenizer.json, and its token.

    Raises:
        ValueError: the file is none, is damaged, or holds what is not read here; names the key.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        gguf = require_gguf(f"importing {path}")
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path}: not a GGUF file")
        try:
            self._reader = gguf.GGUFReader(path)
            self._keys = {name: field.contents() for name, field in self._reader.fields.items()}
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: damaged ({' '.join(str(error).split())[:100]})") from None
        self._architecture = self._text("general.architecture")
        if self._architecture not in _KNOWN:
            shown = json.dumps(self._architecture)
            raise ValueError(f"{path}: general.architecture={shown}: must be one of {', '.join(_KNOWN)}")
        self.config = self._config()
        self.tokenizer, self.end_of_text = self._tokenizer()

    def tensors(self) -> dict[str, torch.Tensor]:
        """In float32, by the names of the class."""
        from gguf.quants import dequantize

        found = {}
        for tensor in self._reader.tensors:
            name = self._name(tensor.name)
            try:
                values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            except (NotImplementedError, ValueError, KeyError):
                kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
                raise ValueError(f"{self.path}: tensor {tensor.name!r} is {kind}, which is not read") from None
            found[name] = values.float().reshape(*reversed([int(n) for n in tensor.shape]))
        if _KNOWN[self._architecture][2]:
            for name, tensor in found.items():
                heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
                if ".q_proj." in name or ".k_proj." in name:
                    found[name] = self._halves(tensor, self.config[heads])
        return found

    def _halves(self, weight: torch.Tensor, n_heads: int) -> torch.Tensor:
        """Rows of each head with its rotary dimensions in halves, the inverse of `_adjacent` of the writer."""
        if weight.shape[0] % n_heads or (weight.shape[0] // n_heads) % 2:
            raise ValueError(f"{self.path}: a projection of {len(weight)} rows has not {n_heads} heads of even width")
        return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _name(self, name: str) -> str:
        if name in _OUTER:
            return _OUTER[name]
        block, _, rest = name.removeprefix("blk.").partition(".")
        if not name.startswith("blk.") or rest not in _LAYER:
            raise ValueError(f"{self.path}: tensor {name!r} is no part of {self._architecture} here")
        return f"model.layers.{block}.{_LAYER[rest]}"

    def _config(self) -> dict[str, Any]:
        model_type, activation, _ = _KNOWN[self._architecture]
        heads, dim = self._integer("attention.head_count"), self._integer("embedding_length")
        if heads < 1:
            raise ValueError(f"{self.path}: {self._architecture}.attention.head_count={heads}: must be at least 1")
        head_dim = self._integer("attention.key_length", dim // heads)
        for key, value in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
            if self._integer(key, head_dim) != value:
                full = f"{self._architecture}.{key}"
                raise ValueError(f"{self.path}: {full}={self._keys[full]}: must be {value}, the width of a head")
        names = [tensor.name for tensor in self._reader.tensors]
        return {
            "model_type": model_type,
            "vocab_size": len(self._list("tokenizer.ggml.tokens")),
            "hidden_size": dim,
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._integer("feed_forward_length"),
            "hidden_act": activation,
            # A float32 of the file, as the number that it was rounded from.
            "rms_norm_eps": float(f"{self._number('attention.layer_norm_rms_epsilon'):.6g}"),
            "max_position_embeddings": self._integer("context_length", 2048),
            "tie_word_embeddings": "output.weight" not in names,
            "rope_parameters": self._rope(),
        }

    def _rope(self) -> dict[str, Any]:
        found = {"rope_type": "default", "rope_theta": self._number("rope.freq_base", 10_000.0)}
        kind = self._keys.get(f"{self._architecture}.rope.scaling.type", "none")
        if kind == "yarn":
            found |= {
                "rope_type": "yarn",
                "factor": self._number("rope.scaling.factor"),
                "original_max_position_embeddings": self._integer("rope.scaling.original_context_length"),
                "beta_fast": self._number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self._number("rope.scaling.yarn_beta_slow", 1.0),
            }
        elif kind != "none":
            raise ValueError(f"{self.path}: {self._architecture}.rope.scaling.type={json.dumps(kind)}: must be yarn")
        return found

    def _tokenizer(self) -> tuple[str, str]:
        if (kind := self._keys.get("tokenizer.ggml.model")) != "gpt2":
            raise ValueError(f"{self.path}: tokenizer.ggml.model={json.dumps(kind)}: must be gpt2, byte-level BPE")
        tokens = self._list("tokenizer.ggml.tokens")
        kinds = self._list("tokenizer.ggml.token_type")
        end = self._keys.get("tokenizer.ggml.eos_token_id")
        if not isinstance(end, int) or not 0 <= end < len(tokens) or len(kinds) != len(tokens):
            raise ValueError(f"{self.path}: tokenizer.ggml.eos_token_id={end}: must be one of {len(tokens)} tokens")
        special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _CONTROL}
        special |= {tokens[end]: end}
        ordinary = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _NORMAL and token not in special
        }
        split = self._keys.get("tokenizer.ggml.pre")
        try:
            content = tokenizer_json(ordinary, self._list("tokenizer.ggml.merges"), split, special)
        except ValueError as error:
            raise ValueError(f"{self.path}: tokenizer.ggml.pre={json.dumps(split)}: {error}") from None
        return content, tokens[end]

    def _integer(self, key: str, default: int | None = None) -> int:
        return self._of_kind(key, default, int)

    def _number(self, key: str, default: float | None = None) -> float:
        return float(self._of_kind(key, default, (int, float)))

    def _of_kind(self, key: str, default, kind):
        full = f"{self._architecture}.{key}"
        value = self._keys.get(full, default)
        if value is None:
            raise ValueError(f"{self.path}: {full} is missing")
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{self.path}: {full}={value!r}: must be a number")
        return value

    def _text(self, key: str) -> str | None:
        value = self._keys.get(key)
        return value if isinstance(value, str) else None

    def _list(self, key: str) -> list:
        value = self._keys.get(key)
        if not isinstance(value, list):
            raise ValueError(f"{self.path}: {key} is missing")
        return value
