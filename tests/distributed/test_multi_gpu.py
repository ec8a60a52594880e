"""Two GPUs and more over NCCL: a short run of each layout beside one GPU's."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedlm.config import dump_recipe
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.testing import assert_close
from tests.train.runs import losses, records, tiny_recipe

pytestmark = pytest.mark.multi_gpu

STEPS = 12
_MODEL = """{dim: 128, n_layers: 3, pattern: gam, blocks: {
  g: {mixer: {type: gdn, n_heads: 2}, ffn: {type: relu2, hidden: 256}},
  a: {mixer: {type: attention, n_heads: 4}, ffn: {type: moe, n_experts: 4, top_k: 2, hidden: 128, bias_rate: 0.01}},
  m: {mixer: {type: mla, n_heads: 4, kv_rank: 64, rope_dim: 32}, ffn: {type: swiglu, hidden: 256}}}}"""
_COMMON = [
    f"model={' '.join(_MODEL.split())}",
    "train.seq_len=64",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    f"train.steps={STEPS}",
    "runtime.device=cuda",
]


def run(folder: Path, n: int, name: str, *overrides: str) -> Path:
    """The folder of a run of n processes."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(folder, *_COMMON, *overrides)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    train = ["-m", "fusedlm", "train", str(recipe), "--out", str(folder / name), "--resume"]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": 900}
    done = subprocess.run([sys.executable, *launcher, *train], env=os.environ | {"OMP_NUM_THREADS": "4"}, **options)
    lines = [line for line in done.stderr.splitlines() if "Error" in line]
    assert done.returncode == 0, "\n".join([*lines[:10], done.stderr[-3000:]])
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multi_gpu")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def one_gpu(request, folder):
    """The dtype, and the run of one GPU in it."""
    return request.param, run(folder, 1, f"one-{request.param}", f"runtime.dtype={request.param}", NORMUON)


NORMUON = "train.optimizer={type: normuon_adamw}"
# Copies, shards of each, parts of the experts.
LAYOUTS = [(1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 1, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["x".join(map(str, layout)) for layout in LAYOUTS])
@pytest.mark.parametrize("compiles", [False, True])
def test_losses_are_those_of_one_gpu(folder, one_gpu, layout, compiles):
    n = math.prod(layout)
    if torch.cuda.device_count() < n:
        pytest.skip(f"needs {n} GPUs")
    dtype, expected = one_gpu
    copies, shards, experts = layout
    name = f"{copies}x{shards}x{experts}-{dtype}-{compiles}"
    parallel = f"runtime.parallel={{replicate: {copies}, shard: {shards}, experts: {experts}}}"
    options = [f"runtime.dtype={dtype}", parallel, f"runtime.compile={str(compiles).lower()}", NORMUON]
    found = run(folder, n, name, *options)
    rel = 1e-3 if dtype == "float32" else 1e-2
    assert losses(found) == pytest.approx(losses(expected), rel=rel)
    assert losses(found)[-1] < 0.9 * losses(found)[0]
    scores = [[r["val_bpb"] for r in records(path) if "val_bpb" in r] for path in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=rel)


@pytest.mark.parametrize("experts", [1, 2])
def test_adamw_in_float32_is_that_of_one_gpu(folder, experts):
    adamw = ["runtime.dtype=float32", "train.optimizer={type: adamw, lr: 0.001}"]
    one = run(folder, 1, "adamw-1", *adamw)
    two = run(folder, 2, f"adamw-2-{experts}", *adamw, f"runtime.parallel.experts={experts}")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    tensors = [Checkpoints(path / "checkpoints").read_tensors(STEPS, "model") for path in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        assert_close(tensors[1][name], tensors[0][name], 0.05, name)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_run_of_two_gpus_is_resumed_by_one(folder, one_gpu, experts):
    dtype, expected = one_gpu
    steady = "train.schedule={type: wsd, warmup: 0.0, decay: 0.0}"
    options = [f"runtime.dtype={dtype}", NORMUON, steady]
    name = f"chain-{dtype}-{experts}"
    run(folder, 2, name, *options, "train.steps=6", f"runtime.parallel.experts={experts}")
    chain = run(folder, 1, name, *options)
    straight = run(folder, 1, f"steady-{dtype}", *options)
    assert losses(chain) == pytest.approx(losses(straight), rel=1e-3 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("compiles", [False, True])
def test_products_in_8_bits_are_those_of_one_gpu(folder, compiles):
    low = ["runtime.dtype=bfloat16", "runtime.precision=fp8", "runtime.low_precision.layers=all", NORMUON]
    low.append(f"runtime.compile={str(compiles).lower()}")
    one, two = (run(folder, n, f"fp8-{n}-{compiles}", *low) for n in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-2) and losses(two)[-1] < 0.9 * losses(two)[0]
