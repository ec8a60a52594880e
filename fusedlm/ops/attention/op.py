"""The entries to softmax attention, and which implementation can run where."""

import torch

from fusedlm.ops.attention import reference, sdpa
from fusedlm.ops.common import Implementation, Op, Setting


def _anywhere(setting: Setting, **shape) -> str | None:
    return None


def _flash(setting: Setting, *, head_dim: int, value_dim: int) -> str | None:
    if setting.device.type != "cuda":
        return f"needs a CUDA device, not {setting.device.type}"
    if setting.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {_short(setting.dtype)}"
    if setting.capability < (8, 0):
        return f"needs compute capability 8.0, this is {'.'.join(map(str, setting.capability))}"
    if max(head_dim, value_dim) > 256 or head_dim % 8 or value_dim % 8:
        return f"needs head widths that are multiples of 8 up to 256, not {head_dim} and {value_dim}"
    return None


def _flash_causal(setting: Setting, *, head_dim: int, value_dim: int) -> str | None:
    if head_dim != value_dim:
        return f"needs one width for keys and values, not {head_dim} and {value_dim}"
    return _flash(setting, head_dim=head_dim, value_dim=value_dim)


def _flash_packed(setting: Setting, *, head_dim: int, value_dim: int) -> str | None:
    if sdpa.varlen_attn is None:
        return "this torch has no torch.nn.attention.varlen"
    return _flash(setting, head_dim=max(head_dim, value_dim), value_dim=value_dim)


def _cudnn(setting: Setting, *, head_dim: int, value_dim: int) -> str | None:
    if setting.device.type == "cuda" and setting.capability < (9, 0):
        return f"faster than flash only from compute capability 9.0, this is {'.'.join(map(str, setting.capability))}"
    if setting.deterministic:
        return "its backward is not deterministic"
    if max(head_dim, value_dim) > 128:
        return f"needs head widths up to 128, not {head_dim} and {value_dim}"
    return _flash(setting, head_dim=head_dim, value_dim=value_dim)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CAUSAL = Op(
    "attention",
    [
        Implementation("cudnn", sdpa.cudnn_causal, _cudnn),
        Implementation("flash", sdpa.flash_causal, _flash_causal),
        Implementation("sdpa", sdpa.causal, _anywhere),
        Implementation("reference", reference.causal, _anywhere),
    ],
    head_dim=64,
    value_dim=64,
)
PACKED = Op(
    "packed_attention",
    [
        Implementation("flash", sdpa.flash_packed, _flash_packed),
        Implementation("sdpa", sdpa.packed, _anywhere),
        Implementation("reference", reference.packed, _anywhere),
    ],
    head_dim=64,
    value_dim=64,
)


def _default(op: Op, q: torch.Tensor, v: torch.Tensor):
    setting = Setting(q.device, q.dtype, torch.are_deterministic_algorithms_enabled())
    return op.choose("auto", setting, head_dim=q.shape[-1], value_dim=v.shape[-1]).function


def causal_attention(q_BTHD, k_BTGD, v_BTGE, *, scale: float, implementation=None) -> torch.Tensor:
    """Causal softmax attention over whole sequences.

    Args:
        q_BTHD: (B, T, H, D) queries.
        k_BTGD: (B, T, G, D) keys, G dividing H; query head h reads key head h // (H / G).
        v_BTGE: (B, T, G, E) values.
        scale: factor on the scores.
        implementation: what `CAUSAL.choose(...).function` gave; None chooses now.

    Returns:
        (B, T, H, E), the dtype of q.
    """
    implementation = implementation or _default(CAUSAL, q_BTHD, v_BTGE)
    return implementation(q_BTHD, k_BTGD, v_BTGE, scale)


def packed_attention(
    q_BTHD, k_BTGD, v_BTGE, *, scale: float, positions_BT, window=None, boundaries=None, implementation=None
) -> torch.Tensor:
    """Causal attention inside documents and, when given, a sliding window.

    Args:
        q_BTHD, k_BTGD, v_BTGE, scale: as in `causal_attention`.
        positions_BT: (B or 1, T) int, index of each token in its document: it sees no further back than that.
        window: a token sees itself and at most window - 1 tokens before it; None: no limit.
        boundaries: (cumulative document lengths (N + 1,) int32 over the B * T tokens, longest); the flash
            implementation needs them, the others do not look.
        implementation: what `PACKED.choose(...).function` gave; None chooses now.
    """
    implementation = implementation or _default(PACKED, q_BTHD, v_BTGE)
    return implementation(q_BTHD, k_BTGD, v_BTGE, scale, positions_BT, window, boundaries)


def cached_attention(q_BTHD, k_BSGD, v_BSGE, *, scale: float, reach_BT=None) -> torch.Tensor:
    """Attention of the last T of S tokens to all S, for decoding.

    Args:
        q_BTHD: (B, T, H, D).
        k_BSGD, v_BSGE: (B, S, G, D) and (B, S, G, E), earlier tokens first.
        reach_BT: (B or 1, T) int, how many tokens before itself each query sees; None: every key, for T = 1.
    """
    return sdpa.cached(q_BTHD, k_BSGD, v_BSGE, scale, reach_BT)
