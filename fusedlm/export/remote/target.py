"""A model of any recipe as code and tensors, for Transformers."""

from dataclasses import dataclass

import torch

from fusedlm.config.model import ModelConfig
from fusedlm.export.remote.link import Linker
from fusedlm.export.remote.recipe import DECODER, known_of, scales
from fusedlm.export.remote.source import Symbol
from fusedlm.export.remote.write import MODELING, RUNTIME, file_text
from fusedlm.model import Decoder, build_model
from fusedlm.nn.module import roles
from fusedlm.runs.state import model_tensors

FILE, CONFIG_CLASS, MODEL_CLASS, MODEL_TYPE = "modeling_fusedlm.py", "FusedLMConfig", "FusedLMForCausalLM", "fusedlm"
PREFIX = "model."  # of the names of its tensors
PADDED = ("embedding.weight", "head.weight", "value_table.weight")  # rows of the vocabulary
_CLASSES = (CONFIG_CLASS, "FusedLMCache", MODEL_CLASS)
_UNROUNDED = ("per_head", "bias", "lambda", "router")  # kinds of parameters


@dataclass(frozen=True)
class RemoteCode:
    """A model as code and tensors.

    text: the file. keys: of config.json. model: the model section of the tensors. unrounded: those of them that stay in
    float32.
    """

    text: str
    keys: dict
    model: ModelConfig
    tensors: dict[str, torch.Tensor]
    unrounded: set[str]


def remote_code(model: Decoder, config: ModelConfig) -> RemoteCode:
    """Without modules of multi-token prediction and rows of padding.

    Args:
        config: that the decoder was built from.
    """
    config = config.model_copy(update={"mtp": None})
    parts = _unrounded(model)
    text, keys = _code(config, model.vocab_size, sorted(parts))
    keys |= {
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{FILE.removesuffix('.py')}.{CONFIG_CLASS}",
            "AutoModelForCausalLM": f"{FILE.removesuffix('.py')}.{MODEL_CLASS}",
        },
        "tie_word_embeddings": config.tie_embeddings,
    }
    tensors = {}
    for name, tensor in model_tensors(model).items():
        if not name.startswith(("mtp.", "mtp_")):
            is_table = name in PADDED
            tensors[PREFIX + name] = tensor.detach()[: model.vocab_size] if is_table else tensor.detach()
    unrounded = {name for name in tensors if any(part in name for part in parts)}
    return RemoteCode(text, keys, config, tensors, unrounded)


def _unrounded(model: Decoder) -> set[str]:
    """Parts of the names of parameters whose rounding would cost more than that of activations. Transformers searches
    for them anywhere in a name, so that each has two of its components."""
    names = {name for name, role in roles(model).items() if role.kind in _UNROUNDED}
    routers = {name.removesuffix(".weight").removesuffix(".project") for name in names if name.endswith("weight")}
    return {".".join(name.split(".")[-2:]) for name in routers | {n for n in names if not n.endswith("weight")}}


def _code(config: ModelConfig, vocab_size: int, unrounded: list[str]) -> tuple[str, dict]:
    """The file, and what config.json has for it: `arguments` and `scales`.

    Args:
        config: of a model without multi-token prediction.
    """
    model = build_model(config, vocab_size=vocab_size, device="meta")
    facts, arguments = known_of(config, model)
    linker = Linker(
        [Symbol(MODELING, name) for name in _CLASSES],
        facts,
        verbatim=MODELING,
        grafts={(DECODER, "forward"): Symbol(RUNTIME, "decoder_forward")},
        substitutes={Symbol("fusedlm.nn.module", "Module"): Symbol(RUNTIME, "Module")},
    ).link()
    blocks = [config.blocks[name] for name in model.layer_names]
    parts = (", ".join(dict.fromkeys(getattr(block, part).type for block in blocks)) for part in ("mixer", "ffn"))
    return file_text(linker, "; ".join(parts), unrounded), {"arguments": arguments, "scales": scales(config, model)}
