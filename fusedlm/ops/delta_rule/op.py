"""Public function of the gated delta rule."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.common.states import check_in_place
from fusedlm.ops.delta_rule import reference

_WIDEST = 256
_WIDEST_FLOAT32 = 128


def _triton(call: Call, *, key_dim: int, value_dim: int) -> str | None:
    widest = _WIDEST_FLOAT32 if call.dtype == torch.float32 else _WIDEST
    if max(key_dim, value_dim) > widest:
        dtype = str(call.dtype).removeprefix("torch.")
        return f"needs keys and values of up to {widest} elements in {dtype}, not {key_dim} and {value_dim}"
    return needs_triton(call)


GATED_DELTA_RULE = Op(
    "gated_delta_rule",
    [
        Backend("triton", "fusedlm.ops.delta_rule.triton:gated_delta_rule", _triton),
        Backend("reference", reference.gated_delta_rule, fused=False),
    ],
    key_dim=128,
    value_dim=128,
)


def gated_delta_rule(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    log_decay_BTH,
    beta_BTH,
    *,
    state_BHKV=None,
    reset_BT=None,
    chunk_size=64,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T;  o_t = S_t^T q_t  (arXiv 2412.06464, eq. 10).

    Args:
        q_BTGK, k_BTGK: (B, T, G, K), each shared by H / G consecutive value heads; k of length at most 1, q scaled by
            the caller. Cast to the dtype of v by the triton backend.
        v_BTHV: (B, T, H, V).
        log_decay_BTH: (B, T, H), log a_t <= 0.
        beta_BTH: (B, T, H), b_t in [0, 1].
        state_BHKV: (B, H, K, V) float32 state before the first token; None: zeros.
        reset_BT: (B or 1, T) bool, tokens before which the state is set to zero; None: none.
        chunk_size: tokens computed in parallel by the reference; the triton backend takes 64.
        in_place: without gradients, write the state after the last token into state_BHKV, which must be contiguous
            and of the dtype of the result, and is returned.
        backend: auto, triton or reference.

    Returns:
        (B, T, H, V) in the dtype of v, and the state after the last token, float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not match, the backend cannot run this call, or in_place comes without such a state or
            with gradients.
    """
    _check(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT)
    run = resolve("gated_delta_rule", backend, v_BTHV, key_dim=q_BTGK.shape[-1], value_dim=v_BTHV.shape[-1])
    arguments = (q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT, chunk_size)
    if in_place:
        check_in_place(state_BHKV, v_BTHV)
        return run(*arguments, in_place=True)
    return run(*arguments)


def _check(q, k, v, log_decay, beta, state, reset) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or q.shape[:2] != v.shape[:2] or not q.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise ValueError(f"{shapes} must be (B, T, G, K) twice and (B, T, H, V), with at least one token")
    if not q.shape[2] or v.shape[2] % q.shape[2]:
        raise ValueError(f"{v.shape[2]} value heads cannot share {q.shape[2]} key heads; use a multiple of them")
    batch, n_tokens, heads, value_dim = v.shape
    expected = {"log_decay": (log_decay, (batch, n_tokens, heads)), "beta": (beta, (batch, n_tokens, heads))}
    if state is not None:
        expected["state"] = (state, (batch, heads, q.shape[3], value_dim))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be {tuple(shape)}")
    if reset is not None and (
        reset.dtype != torch.bool or tuple(reset.shape) not in {(batch, n_tokens), (1, n_tokens)}
    ):
        raise ValueError(
            f"reset {tuple(reset.shape)} {reset.dtype} must be bool, {(batch, n_tokens)} or {(1, n_tokens)}"
        )
