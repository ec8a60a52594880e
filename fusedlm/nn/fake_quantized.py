"""Quantisation-aware training: matrices on a grid of integers while a forward and backward pass runs."""

import contextlib
from collections.abc import Iterator

import torch

from fusedlm.distributed import forget_gathered, local
from fusedlm.nn.module import parameters_by_kind
from fusedlm.ops.quantized.integer import fake_quantize


class FakeQuantization:
    """Rounds matrices of a model for a pass and restores them after it.

    The values are written into the parameters themselves, so that whatever reads them computes with the grid: linear
    layers, experts, tied heads, compiled blocks, CUDA graphs. The gradients of the rounded values are left in `grad`
    and are applied to the weights as they were: the straight-through estimator (Bengio et al., arXiv 1308.3432). The
    optimizer, averages and checkpoints never see rounded values.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        bits: int,
        embedding_bits: int | None = None,
        group: int | None = None,
        clip: float | None = None,
        embedding_clip: float | None = None,
    ):
        """
        Args:
            bits: of hidden matrices, 2 to 8.
            embedding_bits: of embeddings and an untied head; None: they are not rounded.
            group, clip: as `integer_scales` takes them. embedding_clip: of embeddings and head.

        Raises:
            ValueError: the model has no such matrix.
        """
        widths = {"matrix": bits, "embedding": embedding_bits, "head": embedding_bits}
        clips = {"matrix": clip, "embedding": embedding_clip, "head": embedding_clip}
        self._model, self._group = model, group
        self._grids = {
            name: (parameter, widths[kind], clips[kind])
            for name, kind, parameter in parameters_by_kind(model)
            if widths.get(kind) is not None
        }
        if not self._grids:
            raise ValueError("the model has no matrix to quantise")

    def names(self) -> list[str]:
        """Of the parameters that are rounded."""
        return list(self._grids)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the parameters have the values of their codes. Their own are restored bit for bit."""
        own = [local(parameter.detach()).clone() for parameter, *_ in self._grids.values()]
        try:
            self.write()
            yield
        finally:
            with torch.no_grad():
                for (parameter, *_), value in zip(self._grids.values(), own, strict=True):
                    local(parameter.detach()).copy_(value)
            forget_gathered(self._model)

    @torch.no_grad()
    def write(self) -> None:
        """Round the parameters for good."""
        for parameter, bits, clip in self._grids.values():
            weight = local(parameter.detach())  # shards are whole rows, which have scales of their own
            weight.copy_(fake_quantize(weight, bits, self._group, clip))
        forget_gathered(self._model)
