"""latent_decode in Triton: launches of the kernels, and the operator."""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.common.split_keys import Config, Workspace, can_use_tma, combine, n_programs, row_strides, strides
from fusedlm.ops.latent import sdpa
from fusedlm.ops.latent.kernels import attend_kernel

_MOST_NEW = 256  # tokens per row
_ACCUMULATOR = {2: 32768, 4: 8192}  # elements of a program's accumulator at most, by bytes of an element of q
_DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def config_of(block_c: int, rows: int, dtype: torch.dtype, quantised: bool, paged: bool) -> Config:
    """By the width of the latent (a power of two) and the queries of a program."""
    if dtype == torch.float32:
        return Config(32, 1, 8, 1, tma=False)
    if quantised:
        return Config(32, 3, 4, 2, tma=False) if rows <= 16 else Config(128, 2, 8, 1, tma=False)
    if rows > 32:
        return Config(32, 3, 8, 1)
    if paged:
        return Config(32, 3, 4, 2)
    if block_c <= 256:
        return Config(64, 4, 4, 2) if block_c <= 128 else Config(64, 3, 4, 1)
    return Config(64, 2, 4, 1)


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
        config = config_of(block_c, rows, q.dtype, quantised, page_table is not None)
    if programs is None:
        programs = n_programs(batch, n_keys, row_blocks, config, q.device)
    tma = config.tma and page_table is None and can_use_tma(latent, rope)
    split, differs = programs > 0, n_signal < n_heads
    work = Workspace(batch, n_new * n_heads, rank, programs, split or differs, q.device)
    attend_kernel[(row_blocks, programs if split else batch)](
        q,
        _descriptor(latent, config, block_c) if tma else latent,
        _descriptor(rope, config, block_r) if tma else rope,
        token_scale, page_table, starts, visible, out, work.partial, work.log_sum, work.pieces,
        batch, n_keys, programs, scale * math.log2(math.e), *q.stride()[:3], latent.stride(0), rope.stride(0),
        token_scale.stride(0) if quantised else 0, 0 if page_table is None else page_table.stride(0),
        *row_strides(visible),
        N_NEW=n_new, N_HEADS=n_heads, RANK=rank, ROPE=rope_width, LATENT_STRIDE=latent.stride(1),
        ROPE_STRIDE=rope.stride(1), PAGE_SIZE=page_size, HAS_STARTS=starts is not None,
        HAS_VISIBLE=visible is not None, QUANTISED=quantised, PARTIAL=differs, SPLIT=split, TMA=tma,
        DOT=tl.float16 if quantised and q.dtype != torch.float32 else _DOTS[q.dtype],
        BATCH=max(64, triton.next_power_of_2(batch)), BLOCK_T=triton.next_power_of_2(n_new), ROWS=rows,
        BLOCK=config.block, BLOCK_C=block_c, BLOCK_R=block_r, STAGES=config.stages, num_warps=config.warps,
        **pdl_options(q.device),
    )  # fmt: skip
    if split or differs:
        combine(work, out, starts, visible, n_keys, n_heads, 1, programs, noise_weight)
    return out


def _descriptor(x: torch.Tensor, config: Config, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [*strides(x), 1], [1, config.block, columns])


def latent_decode(
    q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
) -> torch.Tensor:  # fmt: skip
    tensors = (q, state, token_scale, rope_key, noise_weight)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    run_of = sdpa.latent_decode if differentiable or q.shape[1] > _MOST_NEW else _latent_decode
    return run_of(
        q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
    )  # fmt: skip
