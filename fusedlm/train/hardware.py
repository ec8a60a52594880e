"""What the run stands on: determinism and precision switches, peak rates, memory, the environment record."""

import contextlib
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from fusedlm import __version__

# Dense bfloat16 peaks in FLOP/s from the vendors' data sheets, by words of the name that the driver reports. More
# special names come first.
_PEAK_FLOPS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of the device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in _PEAK_FLOPS if re.search(rf"\b{words}\b", name)), None)


def device_name(device: torch.device) -> str:
    """What the driver or the system calls the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that tensors took on the GPU; on the CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


@contextlib.contextmanager
def numerics(device: torch.device, dtype: torch.dtype, deterministic: bool) -> Iterator[None]:
    """torch's global switches for one run, put back afterwards.

    TF32 multiplications are admitted only beside bfloat16 on CUDA, where the rest of the arithmetic is coarser still.
    """
    precision = torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        if device.type == "cuda" and dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("high")
        if deterministic:
            # cuBLAS reads this when it is first used; torch refuses to multiply deterministically without it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """Versions and hardware, as RUN/environment.json holds them."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "fusedlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from, `-dirty` when files differ; None when it is installed."""
    folder = Path(__file__).parent
    if not (folder.parent.parent / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
