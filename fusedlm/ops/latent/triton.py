"""latent_decode in Triton: launches of the kernels, and the operator."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedlm.ops.common.device import n_multiprocessors, supports_pdl
from fusedlm.ops.latent import sdpa
from fusedlm.ops.latent.kernels import attend_kernel, combine_kernel

_MOST_NEW = 8  # tokens per row
_ACCUMULATOR = {2: 32768, 4: 8192}  # elements of a program's accumulator at most, by bytes of an element of q
_TILE = 8192  # elements of a step of the combining kernel
_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Config:
    """Of the attending kernel. per_processor: programs that run at a time on one multiprocessor."""

    block: int
    stages: int
    warps: int
    per_processor: int
    tma: bool = True


def config_of(block_c: int, rows: int, dtype: torch.dtype, quantised: bool) -> Config:
    """By the width of the latent (a power of two) and the queries of a program."""
    if dtype == torch.float32:
        return Config(32, 1, 8, 1, tma=False)
    if quantised:
        return Config(128, 2, 8, 1, tma=False)
    return Config(64, 2, 4 if rows <= 16 else 8, 1)


def n_programs(batch: int, n_keys: int, row_blocks: int, config: Config, device: torch.device) -> int:
    """Among how many programs the keys are shared out; 0: one for each row of the batch, without a second kernel."""
    slots = config.per_processor * n_multiprocessors(device)
    n_blocks = triton.cdiv(n_keys, config.block)
    if n_blocks == 1 or batch * row_blocks >= 4 * slots:
        return 0
    return max(1, min(slots // row_blocks, batch * n_blocks))


@torch.library.custom_op("fusedlm::latent_decode", mutates_args=())
def _latent_decode(
    q: torch.Tensor,
    state: torch.Tensor,
    rank: int,
    scale: float,
    starts: torch.Tensor | None,
    visible: torch.Tensor | None,
    page_table: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    rope_key: torch.Tensor | None,
    n_signal: int,
    noise_weight: torch.Tensor | None,
) -> torch.Tensor:
    return run(
        q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
    )  # fmt: skip


@_latent_decode.register_fake
def _(q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight):
    return q.new_empty(*q.shape[:2], n_signal, rank)


def run(
    q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight,
    config: Config | None = None, programs: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels. config and programs: instead of those of `config_of` and `n_programs`."""
    batch, n_new, n_heads, width = q.shape
    out = torch.empty(batch, n_new, n_signal, rank, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    quantised, rope_width = token_scale is not None, width - rank
    q, state = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, state))
    latent, rope = state[..., :rank], state[..., rank:]
    if quantised:
        rope = rope_key if rope_key.stride(-1) == 1 else rope_key.contiguous()
        token_scale = token_scale if token_scale.stride(-1) == 1 else token_scale.contiguous()
    if not rope_width:
        rope = latent
    page_size = 0 if page_table is None else state.shape[1]
    n_keys = state.shape[1] if page_table is None else page_table.shape[1] * page_size
    block_c, block_r = (max(16, triton.next_power_of_2(n)) for n in (rank, max(1, rope_width)))
    rows = min(128, _ACCUMULATOR[q.element_size()] // block_c, max(16, triton.next_power_of_2(n_new * n_heads)))
    row_blocks = triton.cdiv(n_new * n_heads, rows)
    if config is None:
        config = config_of(block_c, rows, q.dtype, quantised)
    if programs is None:
        programs = n_programs(batch, n_keys, row_blocks, config, q.device)
    tma = config.tma and page_table is None and _can_use_tma(latent, rope)
    split, differs = programs > 0, n_signal < n_heads
    slots = programs + batch if split else batch if differs else 0
    partial = torch.empty(slots, n_new * n_heads, rank, dtype=torch.float32, device=q.device)
    log_sum = torch.empty(slots if split else 0, n_new * n_heads, dtype=torch.float32, device=q.device)
    pieces = torch.empty(batch if split else 0, 2, dtype=torch.int32, device=q.device)
    where = {
        "N_NEW": n_new,
        "N_HEADS": n_heads,
        "RANK": rank,
        "HAS_STARTS": starts is not None,
        "HAS_VISIBLE": visible is not None,
        "SPLIT": split,
        "BLOCK_T": triton.next_power_of_2(n_new),
        "PDL": supports_pdl(q.device) and (split or differs),
    }
    visible_b, visible_t = (0, 0) if visible is None else (visible.stride(0) * (len(visible) > 1), visible.stride(1))
    dot = _DOTS[q.dtype] if not quantised or q.dtype == torch.float32 else tl.float16
    attend_kernel[(row_blocks, programs if split else batch)](
        q,
        _descriptor(latent, config.block, block_c) if tma else latent,
        _descriptor(rope, config.block, block_r) if tma else rope,
        token_scale, page_table, starts, visible, out, partial, log_sum, pieces,
        batch, n_keys, programs, scale * math.log2(math.e), *q.stride()[:3], latent.stride(0), rope.stride(0),
        token_scale.stride(0) if quantised else 0, 0 if page_table is None else page_table.stride(0),
        visible_b, visible_t,
        ROPE=rope_width, LATENT_STRIDE=latent.stride(1), ROPE_STRIDE=rope.stride(1), PAGE_SIZE=page_size,
        QUANTISED=quantised, PARTIAL=differs, TMA=tma,
        DOT=dot,
        BATCH=max(64, triton.next_power_of_2(batch)), ROWS=rows, BLOCK=config.block, BLOCK_C=block_c, BLOCK_R=block_r,
        STAGES=config.stages, num_warps=config.warps, **where,
    )  # fmt: skip
    if split or differs:
        n_out = batch * n_new * n_signal
        columns = min(block_c, max(16, triton.next_power_of_2(block_c * n_out // 512)))
        weight_strides = (0, 0, 0) if noise_weight is None else (0,) * (3 - noise_weight.ndim) + noise_weight.stride()
        combine_kernel[(n_out, block_c // columns)](
            partial, log_sum, pieces, noise_weight, starts, visible, out, batch, n_keys, visible_b, visible_t,
            *weight_strides, N_SIGNAL=n_signal, PIECES=triton.next_power_of_2(max(1, programs)),
            GROUP=min(_TILE // columns, triton.next_power_of_2(max(1, triton.cdiv(programs, batch) + 1))),
            COLUMNS=columns, num_warps=4, **where, **({"launch_pdl": True} if where["PDL"] else {}),
        )  # fmt: skip
    return out


def _can_use_tma(*states: torch.Tensor) -> bool:
    """Whether rows and bases are aligned to 16 bytes, and the device has TMA (as the interpreter does)."""
    device = states[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return all(x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in _strides(x)) for x in states)


def _strides(x: torch.Tensor) -> list[int]:
    """Of rows of the batch and of keys. The stride of a dimension of size 1 can be anything."""
    key = x.stride(1) if x.shape[1] > 1 else -(-x.shape[2] // 16) * 16
    return [x.stride(0) if x.shape[0] > 1 else x.shape[1] * key, key]


def _descriptor(x: torch.Tensor, block: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, block, columns])


def latent_decode(
    q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
) -> torch.Tensor:  # fmt: skip
    tensors = (q, state, token_scale, rope_key, noise_weight)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    run_of = sdpa.latent_decode if differentiable or q.shape[1] > _MOST_NEW else _latent_decode
    return run_of(
        q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
    )  # fmt: skip
