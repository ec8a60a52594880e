"""Train, compare, compress and run small and mid-size hybrid language models."""

import importlib

__version__ = "0.1.0"

# Resolved on first use: `import fusedlm` and `fusedlm --help` do not import torch.
_EXPORTS = {
    "load_recipe": "fusedlm.config",
    "build_model": "fusedlm.model",
    "load": "fusedlm.quant",
    "generate": "fusedlm.generation",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fusedlm' has no attribute {name!r}")


def __dir__():
    return __all__
