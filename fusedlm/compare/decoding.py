"""Measurements of decoding: bytes of the live state, and the time of one-token steps."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fusedlm.generation.sampling import Sampling
from fusedlm.generation.steps import Predictor, StaticSteps, graph_obstacle
from fusedlm.model import Decoder
from fusedlm.model.precision import autocast

_PROMPT = 64  # tokens that are computed; State.extend_to fills the state up to the length
_WARM_UP, _STEPS = 8, 32


@torch.no_grad()
def measure_decoding(
    model: Decoder, lengths: Sequence[int], device: torch.device, dtype: torch.dtype
) -> dict[int, tuple[int, float] | None]:
    """Measure decoding of one sequence after each number of tokens.

    The prompt is random. Steps are those of `generate`: one token, and on a GPU the choice of the most likely next one,
    as a CUDA graph where that is possible.

    Returns:
        length -> (bytes of the state's live tensors, tokens per second from the median step), or None if the device is
        out of memory.
    """
    was_training = model.training
    model.eval()
    try:
        return {length: _measure(model, length, device, dtype) for length in lengths}
    finally:
        model.train(was_training)


def _measure(model: Decoder, length: int, device: torch.device, dtype: torch.dtype) -> tuple[int, float] | None:
    try:
        n_bytes = _state(model, length, None, device, dtype).nbytes()
        return n_bytes, 1 / _step_seconds(model, length, device, dtype)
    except torch.OutOfMemoryError:
        return None


def _state(model: Decoder, length: int, max_tokens: int | None, device: torch.device, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.vocab_size, (1, min(_PROMPT, length)), generator=generator).to(device)
    state = model.init_state(1, max_tokens)
    with autocast(device, dtype):
        model(prompt, state=state)
    state.extend_to(length)
    return state


def _step_seconds(model: Decoder, length: int, device: torch.device, dtype: torch.dtype) -> float:
    step = _step(model, length, length + _WARM_UP + _STEPS, device, dtype)
    seconds = []
    for _ in range(_WARM_UP + _STEPS):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_WARM_UP:])


def _step(model: Decoder, length: int, capacity: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    predictor, state = Predictor(model, None, device, dtype), _state(model, length, capacity, device, dtype)
    if graph_obstacle(model, device, dtype) is None:
        steps = StaticSteps(predictor, Sampling(capacity, 0.0, None, None), 1, graph=True)
        steps.adopt(state, capacity)
        return steps.step
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return lambda: predictor.logits(token, state)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
