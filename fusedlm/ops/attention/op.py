"""Public functions of softmax attention, and where each backend can run."""

import torch

from fusedlm.ops.attention import reference, sdpa
from fusedlm.ops.common import Backend, Call, Op, resolve


def _flash(call: Call, *, head_dim: int, value_dim: int) -> str | None:
    if call.device.type != "cuda":
        return f"needs a CUDA device, not {call.device.type}"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.capability < (8, 0):
        return f"needs compute capability 8.0, this is {'.'.join(map(str, call.capability))}"
    if max(head_dim, value_dim) > 256 or head_dim % 8 or value_dim % 8:
        return f"needs head dimensions that are multiples of 8 up to 256, not {head_dim} and {value_dim}"
    return None


def _flash_causal(call: Call, *, head_dim: int, value_dim: int) -> str | None:
    if head_dim != value_dim:
        return f"needs keys and values of one dimension, not {head_dim} and {value_dim}"
    return _flash(call, head_dim=head_dim, value_dim=value_dim)


def _flash_packed(call: Call, *, head_dim: int, value_dim: int) -> str | None:
    if sdpa.varlen_attn is None:
        return "this torch has no torch.nn.attention.varlen"
    return _flash(call, head_dim=max(head_dim, value_dim), value_dim=value_dim)


def _cudnn(call: Call, *, head_dim: int, value_dim: int) -> str | None:
    if call.device.type == "cuda" and call.capability < (9, 0):
        return f"faster than flash only from compute capability 9.0, this is {'.'.join(map(str, call.capability))}"
    if call.deterministic:
        return "its backward is not deterministic"
    if max(head_dim, value_dim) > 128:
        return f"needs head dimensions up to 128, not {head_dim} and {value_dim}"
    return _flash(call, head_dim=head_dim, value_dim=value_dim)


CAUSAL = Op(
    "attention",
    [
        Backend("cudnn", sdpa.cudnn_causal, _cudnn),
        Backend("flash", sdpa.flash_causal, _flash_causal),
        Backend("sdpa", sdpa.causal),
        Backend("reference", reference.causal),
    ],
    function="causal_attention",
    head_dim=64,
    value_dim=64,
)
PACKED = Op(
    "packed_attention",
    [
        Backend("flash", sdpa.flash_packed, _flash_packed),
        Backend("sdpa", sdpa.packed),
        Backend("reference", reference.packed),
    ],
    head_dim=64,
    value_dim=64,
)


def causal_attention(
    q_BTHD, k_BTGD, v_BTGE, *, scale: float, varying: bool = False, backend: str = "auto"
) -> torch.Tensor:
    """Causal softmax attention over full sequences.

    Args:
        q_BTHD: (B, T, H, D) queries.
        k_BTGD: (B, T, G, D) keys, G dividing H; query head h reads key head h // (H / G).
        v_BTGE: (B, T, G, E) values.
        scale: scores are multiplied by it.
        varying: whether other calls have other B and T, as prompts have. cuDNN makes a plan for each, which takes tens
            of milliseconds; such calls run flash in its place.
        backend: auto, cudnn, flash, sdpa or reference.

    Returns:
        (B, T, H, E), the dtype of q.

    Raises:
        ValueError: the backend cannot run this call; the message says why.
    """
    run = resolve("attention", backend, q_BTHD, head_dim=q_BTHD.shape[-1], value_dim=v_BTGE.shape[-1])
    if varying and run is sdpa.cudnn_causal:
        run = sdpa.flash_causal
    return run(q_BTHD, k_BTGD, v_BTGE, scale)


def packed_attention(
    q_BTHD, k_BTGD, v_BTGE, *, scale: float, positions_BT, window=None, boundaries=None, backend: str = "auto"
) -> torch.Tensor:
    """Causal attention inside documents and, when given, a sliding window.

    Args:
        q_BTHD, k_BTGD, v_BTGE, scale: as in `causal_attention`.
        positions_BT: (B or 1, T) int, index of each token in its document; it sees that many earlier tokens.
        window: a token sees itself and at most window - 1 tokens before it; None: no limit.
        boundaries: (cumulative document lengths (N + 1,) int32 over the B * T tokens, length of the longest), which the
            flash backend takes; None: it computes them from the positions, which synchronizes with the device.
        backend: auto, flash, sdpa or reference.

    Returns:
        (B, T, H, E), the dtype of q.

    Raises:
        ValueError: the backend cannot run this call; the message says why.
    """
    run = resolve("packed_attention", backend, q_BTHD, head_dim=q_BTHD.shape[-1], value_dim=v_BTGE.shape[-1])
    return run(q_BTHD, k_BTGD, v_BTGE, scale, positions_BT, window, boundaries)
