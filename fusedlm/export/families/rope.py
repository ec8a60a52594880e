"""The rotary embedding of a config.json, as Transformers 5 and, beside it, as version 4 and other programs read it."""

from typing import Any

from fusedlm.config.model import YaRNConfig
from fusedlm.export.config_json import ConfigJSON


def rope_keys(base: float, yarn: YaRNConfig | None, *, fraction: float | None = None, mscale: bool = False) -> dict:
    """Keys of config.json.

    Args:
        fraction: of a head that is rotated; None: the class rotates all.
        mscale: write the factor of scores as one of all dimensions, where the class has that (DeepSeek).
    """
    stretch = None
    if yarn is not None:
        stretch = {"rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.trained_length}
        stretch |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
        if mscale:
            stretch |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base} | (stretch or {})
    keys = {"rope_theta": base, "rope_scaling": stretch, "rope_parameters": parameters}
    if fraction is not None:
        parameters["partial_rotary_factor"] = keys["partial_rotary_factor"] = fraction
    return keys


def read_rope(config: ConfigJSON, *, mscale: bool = False) -> tuple[float, float, dict | None]:
    """(base, fraction of a head that is rotated, arguments of YaRN or None).

    Raises:
        ValueError: it is stretched in a way that we do not compute.
    """
    # Version 4 has the base beside the dict, which is null where nothing is stretched.
    rope = config.section("rope_parameters") or config.section("rope_scaling") or ConfigJSON({}, config.path)
    kind = rope.text("rope_type", rope.text("type", "default"))
    base = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    fraction = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if kind == "default":
        return base, fraction, None
    if kind != "yarn":
        raise rope.refusal("rope_type", "rotary embedding is default or yarn here")
    if not rope.flag("truncate", True):
        raise rope.refusal("truncate", "YaRN rounds its bounds to whole dimensions here")
    if rope.has("attention_factor"):
        raise rope.refusal("attention_factor", "the factor of scores is that of the paper here")
    for key in ("mscale", "mscale_all_dim"):
        if rope.number(key, None) != (1.0 if mscale else None):
            raise rope.refusal(key, "must be 1" if mscale else "the factor of scores is that of the paper here")
    yarn = {
        "factor": rope.number("factor"),
        "trained_length": rope.integer("original_max_position_embeddings"),
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
    }
    return base, fraction, yarn
