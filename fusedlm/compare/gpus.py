"""The GPUs that runs are spread over, each as what its process is told to see."""

import os

import torch

from fusedlm.config import Recipe
from fusedlm.model.precision import resolve_device

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def choose_gpus(count: int, recipes: dict[str, Recipe]) -> list[str | None]:
    """The first `count` GPUs that torch sees.

    Returns:
        Their values of CUDA_VISIBLE_DEVICES. For one GPU None: its process sees what this one sees.

    Raises:
        ValueError: there are fewer, they are of different models, or a recipe runs on the CPU.
    """
    if count < 1:
        raise ValueError(f"--gpus {count}: must be at least 1")
    if count == 1:
        return [None]
    for name, recipe in recipes.items():
        if resolve_device(recipe.runtime.device).type == "cpu":
            raise ValueError(
                f"--gpus {count}: variant {name} runs on the CPU (runtime.device={recipe.runtime.device}); use --gpus 1"
            )
    found = gpu_names()
    if count > len(found):
        raise ValueError(f"--gpus {count}: torch sees {len(found)} GPU{'s' * (len(found) > 1)}; use at most that many")
    other = next((index for index in range(count) if found[index] != found[0]), None)
    if other is not None:
        raise ValueError(
            f"--gpus {count}: cuda:0 is {found[0]} and cuda:{other} is {found[other]}, whose results are not "
            f"comparable; name GPUs of one model in {VISIBLE_GPUS}"
        )
    visible = os.environ.get(VISIBLE_GPUS)
    names = visible.split(",") if visible is not None else map(str, range(count))
    return [name.strip() for name in names][:count]


def gpu_names() -> list[str]:
    """Models of the GPUs that torch sees, by index."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
