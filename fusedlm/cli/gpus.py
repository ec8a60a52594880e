"""GPUs by the names that `fusedlm plan --gpu` takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """memory_bytes and bf16_flops (dense, per second) are those of the vendor's data sheet."""

    title: str
    memory_bytes: float
    bf16_flops: float


GPUS = {
    "b200": GPU("B200", 180e9, 2250e12),
    "h200": GPU("H200 SXM", 141e9, 989e12),
    "h100": GPU("H100 SXM", 80e9, 989e12),
    "h100-pcie": GPU("H100 PCIe", 80e9, 756e12),
    "a100": GPU("A100, 80 GB", 80e9, 312e12),
    "a100-40": GPU("A100, 40 GB", 40e9, 312e12),
    "l40s": GPU("L40S", 48e9, 362e12),
    "rtx5090": GPU("GeForce RTX 5090", 32e9, 209e12),
    "rtx4090": GPU("GeForce RTX 4090", 24e9, 165e12),
    "rtx3090": GPU("GeForce RTX 3090", 24e9, 71e12),
    "l4": GPU("L4", 24e9, 121e12),
    "a10": GPU("A10", 24e9, 125e12),
}
USABLE = 0.9  # of the memory: the rest is for the CUDA context, gaps of the allocator and the error of the estimate


def find_gpu(name: str) -> GPU:
    """Raises ValueError for an unknown name."""
    if name.lower() not in GPUS:
        raise ValueError(f"--gpu {name}: unknown; one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
