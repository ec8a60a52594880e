"""Set the backends that a recipe names on a model, those that can run on this machine."""

import logging

import torch

from fusedlm.config.runtime import RuntimeConfig
from fusedlm.model import Decoder
from fusedlm.ops.common import BackendSelection, check_backends

_log = logging.getLogger(__name__)


def use_backends(
    model: Decoder, runtime: RuntimeConfig, device: torch.device, dtype: torch.dtype, *, strict: bool
) -> dict[str, BackendSelection]:
    """Set the backends of `runtime.backends` on a model.

    Args:
        dtype: dtype of the activations.
        strict: whether a backend that cannot run here is an error. If not, a warning names it and "auto" is used: the
            case of a run that was trained on another machine.

    Returns:
        The backend selected for each op and the reason, by `block letter.op` and `head.op`.

    Raises:
        ValueError: an op or a backend is unknown, or with `strict` cannot run here.
    """
    requested = runtime.backends
    check_backends(requested, "runtime.backends")
    model.use_backends({})
    selections = model.explain(device, dtype, runtime.deterministic)
    refused = {
        selection.op: reason
        for selection in selections.values()
        if (reason := selection.unsupported.get(requested.get(selection.op))) is not None
    }
    for op, reason in refused.items():
        problem = f"runtime.backends.{op}={requested[op]}: cannot run here ({reason})"
        if strict:
            raise ValueError(f"{problem}; use auto")
        _log.warning("%s; auto is used", problem)
    model.use_backends({op: backend for op, backend in requested.items() if op not in refused})
    return model.explain(device, dtype, runtime.deterministic)
