"""What every test runs under: one torch thread a worker, and GPU tests only where there are GPUs."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    n_gpus = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and n_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {n_gpus}"))
