"""How fast the steps of a run are: time, tokens, utilisation and memory of each."""

import time
from collections.abc import Iterable

import torch

from fusedlm.data import Loader
from fusedlm.model.accounting import training_flops_per_token
from fusedlm.model.decoder import Decoder
from fusedlm.runs.hardware import peak_flops, peak_memory_bytes


class Speed:
    """Measures steps, each from the end of the one before.

    Args:
        lengths: tokens per sequence of the steps there will be.
        n_processes: that share the batch.
    """

    def __init__(self, model: Decoder, lengths: Iterable[int], device: torch.device, n_processes: int):
        self._device, self._n_processes = device, n_processes
        self._peak_flops = peak_flops(device)
        self._flops_per_token = {n: training_flops_per_token(model, n) for n in lengths}

    def restart(self, loader: Loader) -> None:
        """What was done since the last step is not part of the next one."""
        self._clock, self._waited = time.perf_counter(), loader.wait_seconds

    def leave_out(self, seconds: float) -> None:
        """So many seconds since the last step were not part of the next one."""
        self._clock += seconds

    def measure(self, rows: int, seq_len: int, loader: Loader) -> dict:
        """Figures of the step that ends now.

        Args:
            rows, seq_len: of the batch of this process.
        """
        before, waited = self._clock, self._waited
        self.restart(loader)
        seconds = self._clock - before
        rate = rows * seq_len * self._n_processes / seconds
        return {
            "tokens_per_second": rate,
            "mfu": self._utilisation(rate, seq_len),
            "peak_memory_bytes": peak_memory_bytes(self._device),
            "loader_wait_seconds": self._waited - waited,
            "step_seconds": seconds,
        }

    def _utilisation(self, tokens_per_second: float, seq_len: int) -> float | None:
        """Model-FLOPs utilisation of all devices; None if their peak is unknown."""
        if self._peak_flops is None:
            return None
        return tokens_per_second * self._flops_per_token[seq_len] / (self._peak_flops * self._n_processes)
