"""Finished matrices, kept in a folder until all are, so that a killed quantisation resumes after the last."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fusedlm.files import write_atomic
from fusedlm.ops import QuantizedWeight
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.quant.low_rank import LowRank
from fusedlm.quant.matrix import Outcome

_FOLDER, _SETTINGS = "unfinished", "settings.json"
_FIGURES = ("error", "power", "weight_error", "damping", "dead", "tokens", "notes")


class UnfinishedFolder:
    """FOLDER/unfinished: one file per finished matrix. The folder is made when the first is saved.

    Args:
        folder: of the run to write.
        settings: all that decides the result, JSON.

    Raises:
        ValueError: the folder holds finished matrices of other settings.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict):
        self.path = folder / _FOLDER
        self._settings = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        file = self.path / _SETTINGS
        if file.exists() and file.read_text(encoding="utf-8") != self._settings:
            raise ValueError(
                f"{self.path} holds an unfinished quantisation with other settings; remove it, or name another --out"
            )

    def save(self, name: str, outcome: Outcome) -> None:
        """Write a matrix; after a crash its file is complete or absent."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / _SETTINGS, self._settings)
        figures = {key: value for key, value in asdict(outcome).items() if key in _FIGURES}
        tensors = {"codes": outcome.matrix.codes, "scales": outcome.matrix.scales}
        if isinstance(outcome.matrix, IntegerMatrix):
            figures["integer"] = {"bits": outcome.matrix.bits, "group": outcome.matrix.group}
        else:
            figures["packed"] = {key: getattr(outcome.matrix, key) for key in ("width", "format", "group")}
        if outcome.low_rank is not None:
            tensors |= {"left": outcome.low_rank.left_NR, "right": outcome.low_rank.right_RK}
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        write_atomic(self._file(name), save(tensors, {"figures": json.dumps(figures)}))

    def load(self, name: str, device: torch.device) -> Outcome | None:
        """A finished matrix; None: it is not.

        Raises:
            ValueError: its file is damaged.
        """
        file = self._file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                figures = json.loads(opened.metadata()["figures"])
            own = {"codes": tensors.pop("codes"), "scales": tensors.pop("scales")}
            integer, packed = figures.pop("integer", None), figures.pop("packed", None)
            matrix = IntegerMatrix(**own, **integer) if packed is None else QuantizedWeight(**own, **packed)
            low_rank = LowRank(tensors["left"], tensors["right"]) if tensors else None
            return Outcome(matrix, low_rank, **figures | {"notes": tuple(figures["notes"])})
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is damaged; remove it, and the matrix is quantised again") from None

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


def remove_unfinished(folder: Path) -> None:
    """Remove the finished matrices in a folder, if there are any, when the run is written."""
    if (folder / _FOLDER).is_dir():
        shutil.rmtree(folder / _FOLDER)
