"""What every test runs under: one torch thread a worker; a seed; without a GPU, Triton's interpreter and no GPU tests;
signals as in a terminal."""

import importlib.util
import os
import signal
import tempfile

import pytest
import torch

torch.set_num_threads(1)
# In the background of a script or under nohup they are ignored, and what a test sends would be lost.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Where Transformers copies the code of models to, before it is imported.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="modules-"))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined
    if importlib.util.find_spec("triton"):
        from tests.interpreter import hasten

        hasten()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Random numbers without a seed of their own do not depend on the tests before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    n_gpus = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and n_gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {n_gpus}"))
