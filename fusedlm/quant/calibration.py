"""What calibration text sends into the weights of a model: Hessians of inputs, and how often rows are looked up."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fusedlm.data import Loader
from fusedlm.data.training_text import TrainingText
from fusedlm.model.precision import autocast
from fusedlm.nn.module import use_backends
from fusedlm.ops.experts.reference import activate
from fusedlm.quant.matrix import Inputs
from fusedlm.quant.targets import Stage, Target

# With these, layers would get the inputs of the layer before and compute both in one op.
_FUSIONS = ("rmsnorm_linear", "swiglu_mlp", "relu2_mlp", "token_linear")
_BATCH_TOKENS = {"cpu": 4096}
_OTHER_BATCH_TOKENS = 65536


class _Stop(Exception):
    """The rest of a forward pass is not needed."""


@dataclass(frozen=True)
class CalibrationBatch:
    """tokens (B, T) int64; documents (B, T) int64 or None: as `Decoder.forward` takes them."""

    tokens: torch.Tensor
    documents: torch.Tensor | None


def calibration_batches(
    shards, text: TrainingText, *, n_tokens: int, seed: int, document_mask: bool, device: torch.device
) -> list[CalibrationBatch]:
    """Samples of training text, from the first of their order.

    Args:
        shards: the training split.
        text: its samples; their order comes from their own seed.
        n_tokens: rounded up to whole samples.
        document_mask: whether documents are separated.
        device: of the model, whose memory decides how many samples a batch has.
    """
    seq_len = text.seq_len
    rows = -(-n_tokens // seq_len)
    most = max(1, _BATCH_TOKENS.get(device.type, _OTHER_BATCH_TOKENS) // seq_len)
    sizes = [min(most, rows - start) for start in range(0, rows, most)]
    options = {"seq_len": seq_len, "batch_size": most, "seed": seed, "samples": text.samples}
    shapes = {"step_shape": lambda step: (sizes[min(step, len(sizes) - 1)], seq_len)}
    with Loader(shards, **options, **shapes, document_mask=document_mask) as loader:
        batches = [next(loader) for _ in sizes]
    return [CalibrationBatch(batch.tokens, batch.documents) for batch in batches]


class Calibration:
    """Runs batches through a model, as evaluation does, and measures the inputs of the targets of a stage.

    Args:
        batches: at least one.
        device, dtype: of the model, and of autocast.
    """

    def __init__(
        self, model: torch.nn.Module, batches: Sequence[CalibrationBatch], device: torch.device, dtype: torch.dtype
    ):
        self._model, self._batches, self._device, self._dtype = model, batches, device, dtype
        self.n_tokens = sum(batch.tokens.numel() for batch in batches)

    def inputs(self, stage: Stage, progress: Callable[[int], None] | None = None) -> dict[str, list[Inputs]]:
        """Of each target of a stage by name, one entry per matrix of its stack.

        Args:
            progress: called with the number of tokens so far.
        """
        measures = {target.name: _MEASURES[_kind(target)](target, self._model) for target in stage.targets}
        if stage.last is None:
            return {name: measure.inputs() for name, measure in measures.items()}
        with contextlib.ExitStack() as stack:
            for measure in measures.values():
                stack.callback(measure.attach().remove)
            stack.callback(stage.last.register_forward_hook(_stop).remove)
            for _ in self._outputs(self._batches, progress):
                pass
        return {name: measure.inputs() for name, measure in measures.items()}

    @torch.no_grad()
    def _outputs(self, batches, progress) -> Iterator[None]:
        model, done = self._model, 0
        with unfused(model):
            for batch in batches:
                tokens = batch.tokens.to(self._device)
                documents = None if batch.documents is None else batch.documents.to(self._device)
                with contextlib.suppress(_Stop), autocast(self._device, self._dtype):
                    model(tokens, documents=documents)
                done += batch.tokens.numel()
                if progress is not None:
                    progress(done)
                yield

    def gradients(self, targets: Iterable[Target], n_tokens: int = 16384) -> dict[str, float]:
        """|G|^2 per token of each target by name, G the gradient of the summed nll of a sample whose next tokens are
        drawn from the model's own distribution; a mean over samples, of n_tokens or as many as there are.

        With targets of the model itself, gradients give the Fisher information, which is the curvature of the loss
        (Martens, arXiv 1412.1193), whether or not the model predicts the text well. Of tokens with independent
        gradients g of the outputs and inputs x it is E|g|^2 E|x|^2.
        """
        targets, model = list(targets), self._model
        sums, done = {target.name: 0.0 for target in targets}, 0
        generator = torch.Generator(self._device).manual_seed(0)
        with unfused(model), torch.enable_grad():
            for tokens, documents in self._rows():
                if done >= n_tokens:
                    break
                model.zero_grad(set_to_none=True)
                with autocast(self._device, self._dtype):
                    logits_BTV = model(tokens, documents=documents).logits
                log_p_NV = logits_BTV.float().flatten(0, 1).log_softmax(-1)
                drawn_N1 = torch.multinomial(log_p_NV.detach().exp(), 1, generator=generator)
                (-log_p_NV.gather(1, drawn_N1).sum()).backward()
                done += tokens.numel()
                for target in targets:
                    if target.parameter.grad is not None:
                        sums[target.name] += float(target.parameter.grad.double().square().sum())
        model.zero_grad(set_to_none=True)
        return {name: total / done for name, total in sums.items()}

    def _rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Tokens and documents of one sample after another, on the device."""
        for batch in self._batches:
            for row in range(len(batch.tokens)):
                documents = None if batch.documents is None else batch.documents[row : row + 1].to(self._device)
                yield batch.tokens[row : row + 1].to(self._device), documents


@contextlib.contextmanager
def unfused(model: torch.nn.Module) -> Iterator[None]:
    """Every linear layer gets its own input as a tensor."""
    backends = model.backends
    use_backends(model, {**backends, **dict.fromkeys(_FUSIONS, "reference")})
    try:
        yield
    finally:
        use_backends(model, backends)


def _stop(module, arguments, output) -> None:
    raise _Stop


class _LinearInputs:
    """E[x x^T] of the inputs of a linear layer, or of the head, whose inputs are the outputs of its norm."""

    def __init__(self, target: Target, model: torch.nn.Module):
        self._target, self._head = target, model.head
        width = target.shape[1]
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=target.parameter.device)
        self._n = 0

    def attach(self):
        if self._target.tied or self._target.module is self._head:
            return self._head.norm.register_forward_hook(lambda module, arguments, output: self._add(output))
        return self._target.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module, arguments, options) -> None:
        if not options.get("transposed"):  # there the inputs are along the rows of the weight
            self._add(arguments[0])

    def _add(self, x: torch.Tensor) -> None:
        x_NK = x.detach().flatten(0, -2)
        self._sum += second_moment(x_NK)
        self._n += len(x_NK)

    def inputs(self) -> list[Inputs]:
        if not self._n:
            return [Inputs(note="no calibration inputs")]
        return [Inputs(self._sum / self._n, self._n)]


class _LookUps:
    """How often each row of an embedding is looked up. Its inputs are one-hot: H is diagonal over the rows, so that no
    column can compensate another, and a row's frequency weights its error."""

    def __init__(self, target: Target, model: torch.nn.Module):
        self._target = target
        self._counts = torch.zeros(target.shape[0], dtype=torch.float64, device=target.parameter.device)

    def attach(self):
        return self._target.module.register_forward_pre_hook(self._before)

    def _before(self, module, arguments) -> None:
        self._counts += torch.bincount(arguments[0].flatten(), minlength=len(self._counts)).double()

    def inputs(self) -> list[Inputs]:
        n_tokens = int(self._counts.sum())
        if not n_tokens:
            return [Inputs(note="no calibration inputs")]
        return [Inputs(None, n_tokens, self._counts / n_tokens)]


class _ExpertInputs:
    """E[x x^T] of each expert, over the tokens that are routed to it. An expert with fewer tokens than columns is mixed
    with the mean of all: n / K of its own."""

    def __init__(self, target: Target, model: torch.nn.Module):
        self._target, self._is_down = target, target.attribute == "down"
        width = target.shape[1]
        shape = (target.stack, width, width)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=target.parameter.device)
        self._n, self._tokens = [0] * target.stack, 0

    def attach(self):
        return self._target.module.register_forward_pre_hook(self._before)

    def _before(self, module, arguments) -> None:
        x_ND, indices_NK = arguments[0], arguments[1]
        self._tokens += len(x_ND)
        for expert in range(self._target.stack):
            x = x_ND[(indices_NK == expert).any(-1)]
            if self._is_down:
                hidden = torch.nn.functional.linear(x, module.up[expert].to(x.dtype))
                x = activate(hidden, module.activation, module.slope)
            self._sums[expert] += second_moment(x)
            self._n[expert] += len(x)

    def inputs(self) -> list[Inputs]:
        total, width = sum(self._n), self._sums.shape[-1]
        if not total:
            return [Inputs(note="no calibration inputs")] * self._target.stack
        mean_KK = self._sums.sum(0) / total
        few = sum(n < width for n in self._n)
        note = f"{few} of {len(self._n)} experts with fewer than {width} tokens: mixed with the mean" if few else None
        result = []
        for sums_KK, n in zip(self._sums, self._n, strict=True):
            own = min(1.0, n / width)
            hessian_KK = own * sums_KK / max(n, 1) + (1 - own) * mean_KK
            used = torch.full((1,), n / self._tokens, dtype=torch.float64, device=hessian_KK.device)
            result.append(Inputs(hessian_KK, n, used, note if n < width else None))
        return result


def second_moment(x_NK: torch.Tensor) -> torch.Tensor:
    """X^T X in float64, of products in float32 or better."""
    x_NK = x_NK.to(torch.promote_types(x_NK.dtype, torch.float32))
    return (x_NK.T @ x_NK).double()


_MEASURES = {"linear": _LinearInputs, "look-ups": _LookUps, "experts": _ExpertInputs}


def _kind(target: Target) -> str:
    if target.parameter.dim() == 3:
        return "experts"
    return "look-ups" if target.kind == "embedding" and not target.tied else "linear"
