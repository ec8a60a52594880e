"""The coordinate check: does the scale of activations stay the same as a model gets wider?

Models of several widths take a few steps at a large rate. Under a parametrisation whose rates transfer, the mean |x| of
every activation is the same at every width; under the standard one it grows (arXiv 2203.03466, appendix D.1).
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean, geometric_mean

import numpy as np
import pydantic
import torch

from fusedlm.config.model import ModelConfig, MuPConfig
from fusedlm.config.train import OptimizerConfig
from fusedlm.data import Batch
from fusedlm.data.meter import ReportProgress, silent
from fusedlm.model import Decoder, build_model
from fusedlm.model.precision import autocast
from fusedlm.optim import build_optimizer
from fusedlm.train.step import train_step

WIDTHS = (128, 256, 512, 1024, 2048)
STANDARD, MUP = "standard", "mup"


def probe_coordinates(
    config: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    vocab_size: int,
    widths: tuple[int, ...] = WIDTHS,
    base_width: int | None = None,
    steps: int = 10,
    rate: float = 3.0,
    batch_size: int = 8,
    seq_len: int = 64,
    seed: int = 0,
    n_seeds: int = 1,
    setup: Callable[[Decoder], object] | None = None,
    device: torch.device,
    dtype: torch.dtype,
    progress: ReportProgress = silent,
) -> dict:
    """Train models that differ in `dim` alone on one batch of random tokens, with and without muP.

    Args:
        config: the architecture. With `mup`, its depth scaling is used in both.
        optimizer: of the recipe; its learning rates are multiplied by `rate`.
        widths: increasing.
        base_width: at which both are the same; None: that of `config.mup`, or the smallest width.
        seed: of weights and tokens; the first of `n_seeds`. At a large rate the logits of a single step swing widely,
            more seeds steady them.
        setup: called with each new model before it is trained.

    Returns:
        JSON-able. `values` by parametrisation and kind of module: for each width a list of mean |x| before each step
        and after the last, geometric means over seeds, null where one is not finite; `losses` likewise, means. Kinds
        are `embedding`, `logits` and paths inside a block after its letter, such as `a.mixer.qkv`, means over the
        layers. `growth`, by the same names: the value after the last step at the largest width, over that at the
        smallest.

    Raises:
        ValueError: a value is out of range, or the recipe does not allow a width.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("vocab_size", vocab_size), ("n_seeds", n_seeds)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be at least 2: one token has nothing to mix")
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate={rate} must be a finite number greater than 0")
    if len(widths) < 2 or sorted(set(widths)) != list(widths) or widths[0] < 1:
        raise ValueError(f"widths={list(widths)} must be at least two increasing numbers")
    if config.mup is not None and config.mup.base:
        raise ValueError("model.mup.base: the coordinate check changes model.dim alone; set model.mup.base={}")
    if base_width is None:
        base_width = config.mup.base_width if config.mup is not None else widths[0]
    optimizer = optimizer.with_lr(rate * next(iter(optimizer.rates().values())))
    values: dict[str, dict[str, list]] = {STANDARD: {}, MUP: {}}
    losses: dict[str, list] = {STANDARD: [], MUP: []}
    for name in (STANDARD, MUP):
        for index, width in enumerate(widths):
            at_width = _at_width(config, width, base_width if name == MUP else None)
            runs = []
            for run_seed in range(seed, seed + n_seeds):
                batch = _batch(run_seed, vocab_size, batch_size, seq_len, device)
                model = build_model(at_width, vocab_size=vocab_size, device=device, seed=run_seed)
                if setup is not None:
                    setup(model)
                runs.append(_run(model, optimizer, batch, steps, device, dtype))
                del model
            for kind in runs[0][0]:
                series = _over_seeds([means[kind] for means, _ in runs], _geometric_mean)
                values[name].setdefault(kind, []).append(series)
            losses[name].append(_over_seeds([loss for _, loss in runs], fmean))
            progress(f"{name} parametrisation", index + 1, len(widths))
    return {
        "widths": list(widths),
        "base_width": base_width,
        "steps": steps,
        "rate": rate,
        "optimizer": optimizer.model_dump(mode="json"),
        "batch_size": batch_size,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "seed": seed,
        "n_seeds": n_seeds,
        "values": values,
        "growth": {name: {kind: _growth(series) for kind, series in kinds.items()} for name, kinds in values.items()},
        "losses": losses,
    }


def _at_width(config: ModelConfig, width: int, base_width: int | None) -> ModelConfig:
    mup = None
    if base_width is not None:
        mup = (config.mup or MuPConfig(base_width=base_width)).model_dump() | {"base_width": base_width}
    try:
        return ModelConfig.model_validate(config.model_dump() | {"dim": width, "mup": mup})
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"width {width}: {problem}; give other widths") from None


def _batch(seed: int, vocab_size: int, batch_size: int, seq_len: int, device: torch.device) -> Batch:
    drawn = np.random.default_rng([seed, vocab_size]).integers(0, vocab_size, (batch_size, seq_len + 1))
    tokens = torch.from_numpy(drawn).to(device)
    return Batch(tokens[:, :-1], tokens[:, 1:], None, tokens[:, 1:].numel(), 0)


def _run(model: Decoder, optimizer, batch: Batch, steps: int, device, dtype) -> tuple[dict[str, list], list]:
    """Mean |x| by kind, and the loss, before each step and after the last."""
    torch_optimizer = build_optimizer(model, optimizer, device, dtype)
    means: dict[str, list] = {}
    losses = []
    for step in range(steps + 1):
        found = measure(model.eval(), batch.tokens, partial(autocast, device, dtype))
        for kind, mean in found.items():
            means.setdefault(kind, []).append(mean if math.isfinite(mean) else None)
        if step == steps:
            break
        result = train_step(
            model.train(),
            torch_optimizer,
            batch,
            lr_scale=1.0,
            micro_batch_size=len(batch.tokens),
            grad_clip=None,
            autocast=partial(autocast, device, dtype),
        )
        losses.append(result.loss if math.isfinite(result.loss) else None)
    return means, losses


@torch.no_grad()
def measure(model: Decoder, tokens: torch.Tensor, context: Callable) -> dict[str, float]:
    """Mean |x| of the output of every linear layer, mixer, feed-forward and block, of the embedding as the first block
    gets it, and of the logits. context: gives the context of the forward pass."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []

    def watch(module: torch.nn.Module, kind: str, scale: float = 1.0) -> None:
        def hook(_module, _inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                found.setdefault(kind, []).append(output.double().abs().mean() * scale)

        handles.append(module.register_forward_hook(hook))

    watch(model.embedding, "embedding", model.embedding_scale)
    for letter, block in zip(model.layer_names, model.blocks, strict=True):
        watch(block, letter)
        for path, module in block.named_modules():
            if path in ("mixer", "ffn") or isinstance(module, torch.nn.Linear):
                watch(module, f"{letter}.{path}")
    watch(model.head, "logits")
    try:
        with context():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return {kind: float(torch.stack(means).mean()) for kind, means in found.items()}


def _over_seeds(series: list[list], mean: Callable) -> list:
    return [None if None in found else mean(found) for found in zip(*series, strict=True)]


def _geometric_mean(values: list[float]) -> float:
    return geometric_mean(values) if all(values) else 0.0


def _growth(series: list[list]) -> float | None:
    first, last = series[0][-1], series[-1][-1]
    return None if first is None or last is None or first == 0 else last / first
