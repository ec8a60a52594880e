"""What the extra `prepare` installs."""

import importlib.metadata
import importlib.util

_PACKAGES = {"datatrove": "datatrove", "dill": "dill", "orjson": "orjson", "xxhash": "xxhash"}  # name on PyPI -> module


def require_datatrove() -> None:
    """Raises ValueError if a package that every pipeline needs is missing."""
    missing = [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        named = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"data.pipeline: {', '.join(missing)} {named} not installed; pip install 'fusedlm[prepare]', or set "
            "data.pipeline=null"
        )


def versions() -> dict[str, str]:
    """Of the packages that what a stage writes can depend on."""
    names = ("datatrove", "numpy", "orjson", "tokenizers", "xxhash")
    return {name: importlib.metadata.version(name) for name in names}
