"""Public function of attention to a latent state, and where each backend can run."""

import torch

from fusedlm.ops.common import Backend, Call, Op, needs_triton, resolve
from fusedlm.ops.latent import reference, sdpa
from fusedlm.ops.latent.reference import FP8

_WIDEST_RANK = 512
_WIDEST_ROPE = 128
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _fits(call: Call, *, rank: int, rope_dim: int) -> str | None:
    if reason := needs_triton(call):
        return reason
    if rank > _WIDEST_RANK or rope_dim > _WIDEST_ROPE:
        return f"needs a rank up to {_WIDEST_RANK} and rotary keys up to {_WIDEST_ROPE}, not {rank} and {rope_dim}"
    return None


LATENT_DECODE = Op(
    "latent_decode",
    [
        Backend("triton", "fusedlm.ops.latent.triton:latent_decode", _fits),
        Backend("sdpa", sdpa.latent_decode),
        Backend("reference", reference.latent_decode),
    ],
    rank=512,
    rope_dim=64,
)


def latent_decode(
    q_BTHE,
    state,
    *,
    rank: int,
    scale: float,
    starts_B=None,
    visible_before_BT=None,
    page_table_BP=None,
    token_scale=None,
    rope_key=None,
    n_signal: int | None = None,
    noise_weight=None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of new tokens to the state of multi-head latent attention and to one another, its up-projections moved
    to the queries and the output (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). The keys of a token are its latent and
    its rotary key, its value is its latent, for all heads.

    With n_signal the difference of two attentions (arXiv 2410.05258, eq. 1) is taken between latents, so that it has to
    be projected up only once: the heads after the first n_signal are the noise, one per signal head or one for all.

    Lengths stay on the device: what follows a row's tokens, in the state and in the page table, is never used, and no
    row's length matters to which kernels run, so that a CUDA graph of this call serves any lengths.

    Args:
        q_BTHE: (B, T, H, rank + R) queries: of the latents, and of the rotary keys.
        state: (B, S, rank + R) latents and rotary keys of the dtype of q, earlier tokens first, the new ones included;
            (N, P, rank + R) with a page table. With token_scale: the latents alone, (.., .., rank) float8_e4m3fn
            (`quantise_latent`).
        rank: columns of the latent.
        scale: scores are multiplied by it.
        starts_B: (B,) int, index among the S keys of each row's first query; None: S - T in every row. A query whose
            index is negative has no keys and gives zeros: a row without tokens has starts -T.
        visible_before_BT: (B or 1, T) int, how many tokens before itself each query sees; None: all.
        page_table_BP: (B, pages of a row) int32, the pages of P tokens that hold each row's tokens, in order; P is a
            power of two of at least 16.
        token_scale: (B, S) or (N, P) float32, factors of the latents of a float8 state.
        rope_key: (B, S, R) or (N, P, R), the rotary keys of a float8 state, of the dtype of q.
        n_signal: heads of the output; None: H, without noise.
        noise_weight: () or (n_signal,) or (B, T, n_signal), the factor of the noise.
        backend: auto, triton, sdpa or reference. The kernels of triton take at most 256 new tokens and have no backward
            pass; for more tokens and with gradients it runs torch's attention.

    Returns:
        (B, T, n_signal, rank), the dtype of q.

    Raises:
        ValueError: shapes or dtypes do not match, or the backend cannot run this call.
    """
    n_signal = q_BTHE.shape[2] if n_signal is None and q_BTHE.ndim == 4 else n_signal
    _check(q_BTHE, state, rank, token_scale, rope_key, page_table_BP)
    _check_rows(q_BTHE, state, starts_B, visible_before_BT, page_table_BP)
    _check_noise(q_BTHE, n_signal, noise_weight)
    run = resolve("latent_decode", backend, q_BTHE, rank=rank, rope_dim=q_BTHE.shape[3] - rank)
    return run(
        q_BTHE,
        state,
        rank,
        scale,
        starts_B,
        visible_before_BT,
        page_table_BP,
        token_scale,
        rope_key,
        n_signal,
        noise_weight,
    )


def _check(q, state, rank: int, token_scale, rope_key, page_table) -> None:
    if q.ndim != 4 or state.ndim != 3 or not 0 < rank <= q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, state {tuple(state.shape)} and rank={rank} must be (B, T, H, rank + R), "
            "(B, S, rank + R) and at least 1"
        )
    if q.dtype not in _DTYPES:
        raise ValueError(f"q is {q.dtype}; it must be bfloat16, float16, float32 or float64")
    rope_dim = q.shape[3] - rank
    if token_scale is None:
        if state.shape[2] != q.shape[3] or state.dtype != q.dtype:
            raise ValueError(
                f"state {tuple(state.shape)} {state.dtype} must have the last dimension and the dtype of q "
                f"{tuple(q.shape)} {q.dtype}; a float8 state needs token_scale"
            )
        return
    if state.shape[2] != rank or state.dtype != FP8 or token_scale.shape != state.shape[:2]:
        raise ValueError(
            f"state {tuple(state.shape)} {state.dtype} with token_scale {tuple(token_scale.shape)} must be "
            f"(.., .., rank={rank}) {FP8} and (.., ..), as quantise_latent returns them"
        )
    if token_scale.dtype != torch.float32:
        raise ValueError(f"token_scale is {token_scale.dtype}; it must be float32")
    if rope_key is None or rope_key.shape != (*state.shape[:2], rope_dim) or rope_key.dtype != q.dtype:
        given = "None" if rope_key is None else f"{tuple(rope_key.shape)} {rope_key.dtype}"
        raise ValueError(f"rope_key is {given}; it must be {(*state.shape[:2], rope_dim)} {q.dtype} with token_scale")


def _check_rows(q, state, starts, visible, page_table) -> None:
    batch, n_new = q.shape[:2]
    if page_table is None:
        if len(state) != batch or (starts is None and state.shape[1] < n_new):
            raise ValueError(f"state {tuple(state.shape)} must have {batch} rows and the {n_new} new tokens, as q has")
    else:
        size = state.shape[1]
        if page_table.ndim != 2 or len(page_table) != batch or page_table.dtype != torch.int32:
            raise ValueError(
                f"page_table {tuple(page_table.shape)} {page_table.dtype} must be ({batch}, pages of a row) torch.int32"
            )
        if size < 16 or size & (size - 1):
            raise ValueError(f"pages hold {size} tokens; it must be a power of two of at least 16")
    for name, x, shapes in (("starts", starts, ((batch,),)), ("visible_before", visible, ((batch, n_new), (1, n_new)))):
        if x is not None and (x.shape not in shapes or x.is_floating_point()):
            raise ValueError(f"{name} {tuple(x.shape)} {x.dtype} must be integers of shape {shapes[0]}")


def _check_noise(q, n_signal: int, weight) -> None:
    batch, n_new, n_heads, _ = q.shape
    if n_signal == n_heads and weight is None:
        return
    if n_signal < 1 or n_heads not in (2 * n_signal, n_signal + 1):
        raise ValueError(f"n_signal={n_signal} of {n_heads} heads; with noise it must be half of them, or all but one")
    if weight is None or weight.shape not in ((), (n_signal,), (batch, n_new, n_signal)):
        given = "None" if weight is None else tuple(weight.shape)
        raise ValueError(f"noise_weight {given} must be (), ({n_signal},) or {(batch, n_new, n_signal)}")
