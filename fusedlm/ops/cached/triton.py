"""cached_attention in Triton: launches of the kernels, and the operator."""

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedlm.ops.attention import sdpa
from fusedlm.ops.cached.kernels import attend_kernel
from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.common.split_keys import Config, Workspace, can_use_tma, combine, n_programs, row_strides, strides

_MOST_NEW = 64  # tokens per row; of more, torch's attention was faster in large batches
_MANY_ROWS = 64  # of the batch, times key heads
_FEW_KEYS = 32768  # of all rows and key heads: four blocks of 64 a multiprocessor
_ACCUMULATOR = {2: 16384, 4: 8192}  # elements of a program's accumulator at most, by bytes of an element of q


def config_of(block_e: int, rows: int, dtype: torch.dtype, n_keys: int) -> Config:
    """By the width of the values (a power of two), the queries of a program and the keys of all rows and key heads
    together; measured on an H100."""
    if dtype == torch.float32:
        return Config(32, 1, 4, 2, tma=False)
    if block_e <= 64 and rows <= 32:
        return Config(128, 3, 4, 2)
    if block_e == 128 and rows <= 32:
        return Config(64, 3, 4, 1) if n_keys <= _FEW_KEYS else Config(128, 3, 8, 1)
    return Config(64, 3, 4 if rows <= 32 else 8, 1 if block_e > 128 else 2)


@torch.library.custom_op("fusedlm::cached_attention", mutates_args=())
def _cached_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    return run(q, k, v, scale, visible, starts)


@_cached_attention.register_fake
def _(q, k, v, scale, visible, starts):
    return q.new_empty(*q.shape[:3], v.shape[-1])


def run(
    q, k, v, scale, visible, starts, config: Config | None = None, programs: int | None = None
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels. config and programs: instead of those of `config_of` and `n_programs`."""
    (batch, n_new, n_heads, head_dim), (n_keys, n_groups, value_dim) = q.shape, v.shape[1:]
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype} and v {v.dtype}; cast them to one dtype")
    out = torch.empty(batch, n_new, n_heads, value_dim, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    block_d, block_e = (max(16, triton.next_power_of_2(n)) for n in (head_dim, value_dim))
    n_queries = n_new * (n_heads // n_groups)
    rows = min(128, _ACCUMULATOR[q.element_size()] // block_e, max(16, triton.next_power_of_2(n_queries)))
    row_blocks = triton.cdiv(n_queries, rows)
    if config is None:
        config = config_of(block_e, rows, q.dtype, batch * n_groups * n_keys)
    if programs is None:
        programs = n_programs(batch * n_groups, n_keys, row_blocks, config, q.device)
    tma, split = config.tma and can_use_tma(k, v), programs > 0
    work = Workspace(batch * n_groups, n_queries, value_dim, programs, split, q.device)
    attend_kernel[(row_blocks, programs if split else batch * n_groups)](
        q, _descriptor(k, config.block, block_d) if tma else k, _descriptor(v, config.block, block_e) if tma else v,
        starts, visible, out, work.partial, work.log_sum, work.pieces,
        batch, n_keys, programs, scale * math.log2(math.e), *q.stride()[:3],
        k.stride(0), k.stride(2), v.stride(0), v.stride(2), *row_strides(visible),
        N_NEW=n_new, N_HEADS=n_heads, N_GROUPS=n_groups, HEAD=head_dim, VALUE=value_dim,
        K_STRIDE=k.stride(1), V_STRIDE=v.stride(1), HAS_STARTS=starts is not None, HAS_VISIBLE=visible is not None,
        SPLIT=split, TMA=tma, BATCH=max(64, triton.next_power_of_2(batch)), BLOCK_T=triton.next_power_of_2(n_new),
        ROWS=rows, BLOCK=config.block, BLOCK_D=block_d, BLOCK_E=block_e, STAGES=config.stages,
        num_warps=config.warps, **pdl_options(q.device),
    )  # fmt: skip
    if split:
        combine(work, out, starts, visible, n_keys, n_heads, n_groups, programs)
    return out


def _descriptor(x: torch.Tensor, block: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [*strides(x), 1], [1, block, 1, columns])


def cached_attention(q, k, v, scale: float, visible, starts) -> torch.Tensor:
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    needs_torch = differentiable or q.shape[1] > _MOST_NEW
    run_of = sdpa.cached if needs_torch or _prefers_torch(q, k, visible, starts) else _cached_attention
    return run_of(q, k, v, scale, visible, starts)


def _prefers_torch(q, k, visible, starts) -> bool:
    """Where nothing is masked, torch's kernels are up to 14% faster on an H100 if each query head has its own keys or
    rows alone fill half the multiprocessors. Otherwise they are up to 14 times slower."""
    (batch, n_new, n_heads, _), groups = q.shape, k.shape[2]
    has_mask = visible is not None or starts is not None or n_new > 1
    return not has_mask and (n_heads == groups or batch * groups >= _MANY_ROWS)
