"""The teacher of `train.distill`: a frozen model that gives soft targets."""

import hashlib
from pathlib import Path

import torch

from fusedlm.config import Recipe
from fusedlm.config.train import DistillConfig
from fusedlm.data.same_tokenizer import tokenizer_difference
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.export import load_folder
from fusedlm.model import Decoder
from fusedlm.model.accounting import count_parameters
from fusedlm.nn.quantized import quantized_weights, replace_layers
from fusedlm.nn.soft_targets import SoftTargets
from fusedlm.quant.rounding import round_weights
from fusedlm.runs import load
from fusedlm.runs.backends import use_backends
from fusedlm.runs.state import model_tensors

_HF_CONFIG = "config.json"
_HASH_BYTES = 2**26  # at a time


class Teacher:
    """tokens (B, T), documents (B, T) or None -> SoftTargets of all B * T tokens.

    The model is in eval mode and without gradients. It is no part of the student: no optimizer, checkpoint or count of
    parameters knows it.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, settings: DistillConfig):
        self._model, self._tokenizer, self._settings = model.eval().requires_grad_(False), tokenizer, settings
        self._parameters = count_parameters(model).total

    def quantize(self, format: str) -> None:
        """Round hidden matrices and experts. Raises ValueError if they are rounded already or do not fit the format."""
        if quantized_weights(self._model):
            raise ValueError("its weights are quantised already; leave format out")
        replace_layers(self._model, round_weights(self._model, format))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError unless the teacher's tokenizer gives every text the same ids."""
        if found := tokenizer_difference(self._tokenizer, tokenizer):
            raise ValueError(
                f"train.distill.teacher={self._settings.teacher}: its tokenizer is not that of the run ({found}); "
                "train with the teacher's tokenizer (data.tokenizer of type file), or name another teacher"
            )

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, documents: torch.Tensor | None) -> SoftTargets:
        none = torch.empty(0, dtype=torch.int64, device=tokens.device)
        hidden = self._model(tokens, documents=documents, select=none, hidden=True).hidden
        logits = self._model.head(hidden, pending=True)
        return SoftTargets(logits, self._settings.temperature, self._settings.weight)

    def describe(self) -> str:
        """For the header of a run."""
        format = f", {self._settings.format}" if self._settings.format else ""
        return (
            f"{self._settings.teacher}, {self._parameters:,} parameters{format}, weight {self._settings.weight:g}, "
            f"temperature {self._settings.temperature:g}"
        )


def open_teacher(
    recipe: Recipe, saved: Recipe | None, device: torch.device, dtype: torch.dtype
) -> tuple[Recipe, Teacher | None]:
    """The recipe with the checksum of its teacher, and the teacher on the device; None: the recipe names none.

    Args:
        saved: the recipe of the run to resume, if it is known.

    Raises:
        ValueError: the folder holds no model, or the weights are not those of the checksum in either recipe.
        OSError: a file cannot be read.
    """
    settings = recipe.train.distill
    if settings is None:
        return recipe, None
    path = Path(settings.teacher).expanduser()
    key = f"train.distill.teacher={settings.teacher}"
    try:
        model, tokenizer = _load(path, device)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    sha256 = weights_checksum(model)
    before = saved.train.distill if saved is not None else None
    for known in (settings.sha256, before and before.sha256):
        if known not in (None, sha256):
            raise ValueError(
                f"{key}: its weights (sha256 {sha256[:12]}) are not those that the recipe names ({known[:12]}); "
                "restore them, or start a new run with --out and without train.distill.sha256"
            )
    teacher = Teacher(model, tokenizer, settings)
    if settings.format is not None:
        try:
            teacher.quantize(settings.format)
        except ValueError as error:
            raise ValueError(f"train.distill.format={settings.format}: {error}") from None
    use_backends(model, recipe.runtime, device, dtype, strict=False)
    settings = settings.model_copy(update={"sha256": sha256})
    train = recipe.train.model_copy(update={"distill": settings})
    return recipe.model_copy(update={"train": train}), teacher


def _load(path: Path, device: torch.device) -> tuple[Decoder, Tokenizer]:
    if (path / _HF_CONFIG).is_file():
        return load_folder(path, device)
    model, tokenizer, _ = load(path, device=device)
    return model, tokenizer


def weights_checksum(model: torch.nn.Module) -> str:
    """SHA-256, in hex, of the names, dtypes, shapes and bytes of the model's tensors, whatever file they are from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        for part in flat.split(_HASH_BYTES):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()
