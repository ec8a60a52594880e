"""The training loop: steps, validations and checkpoints of one run."""

import contextlib
import signal
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from fusedlm.config import Recipe
from fusedlm.data import Batch, Loader, PreparedData, prepare
from fusedlm.data.manifest import DamagedData
from fusedlm.data.preparation import ChangedText, paths
from fusedlm.data.summary import summarise
from fusedlm.data.training_text import open_training_text
from fusedlm.distributed import OneProcessFailed, World
from fusedlm.evaluate import first_tokens, score_documents
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.model.low_precision import outlier_figures, precision_table
from fusedlm.model.precision import autocast
from fusedlm.model.sharding import build_sharded_model
from fusedlm.model.waiting import waiting_module
from fusedlm.optim import Averages, build_optimizer, describe_split, optimizer_split, schedule_scale
from fusedlm.runs.backends import use_backends
from fusedlm.runs.folder import RunFolder
from fusedlm.runs.hardware import device_name, environment
from fusedlm.runs.metrics import MetricsFile
from fusedlm.runs.precision import describe_precision, use_precision
from fusedlm.runs.signals import StopSignal
from fusedlm.runs.start import Start
from fusedlm.runs.state import TrainState, restore_state, save_state
from fusedlm.runs.text import open_text
from fusedlm.runs.writer import CheckpointWriter
from fusedlm.train.cuda_graph import CapturedBackward
from fusedlm.train.display import Display
from fusedlm.train.loggers import Loggers
from fusedlm.train.parallel import dropout_seed
from fusedlm.train.quantization_aware import QuantizationAware
from fusedlm.train.slowdown import Slowdown
from fusedlm.train.speed import Speed
from fusedlm.train.step import StepResult, train_step
from fusedlm.train.teacher import Teacher


class TrainingDiverged(ValueError):
    """Loss or gradient norm was not finite in too many steps in a row."""


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    step: int  # optimizer steps taken, skipped ones included
    val_bpb: float | None  # bits per byte of the last validation; None: none yet
    signal: signal.Signals | None  # that stopped the run before its last step; None: it is finished

    @property
    def stopped_by_signal(self) -> bool:
        return self.signal is not None


class _Interrupted(Exception):
    """A signal came during a validation."""


class Trainer:
    """Trains one run to its end.

    Args:
        folder: the locked run folder.
        device, dtype: where the model runs, and the dtype of autocast.
        start: the run, and the verified checkpoint to resume from.
        text, strict_backends: as `fusedlm.train.train` takes them.
        teacher: of `train.distill`; None: there is none.
        world: the processes of the run.
        mesh: of them (`fusedlm.train.parallel`); None: there is one.

    Raises:
        ValueError: as `fusedlm.train.train`.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        device: torch.device,
        dtype: torch.dtype,
        display: Display,
        start: Start,
        *,
        text: str | None,
        strict_backends: bool,
        teacher: Teacher | None,
        world: World,
        mesh: DeviceMesh | None,
    ):
        self.recipe, self.settings, self.runtime, self.folder = recipe, recipe.train, recipe.runtime, folder
        self.device, self.dtype, self.display, self.world = device, dtype, display, world
        self.data = world.main_first(lambda: self._open_text(text, start))
        self.text = open_training_text(self.data.train, recipe)
        self.teacher = teacher
        if teacher is not None:
            teacher.check_tokenizer(self.data.tokenizer)
        torch.manual_seed(self.settings.seed)
        vocab_size = self.data.tokenizer.vocab_size
        options = {"vocab_size": vocab_size, "device": device, "seed": self.settings.seed}

        def prepare(model) -> None:
            self.backends = use_backends(model, self.runtime, device, dtype, strict=strict_backends)
            self.precision = use_precision(model, recipe, device, dtype, world)
            if self.precision:  # with the op of the layers that are now in place
                self.backends = model.explain(device, dtype, self.runtime.deterministic)

        if mesh is None:
            self.model = build_model(recipe.model, **options)
            prepare(self.model)
        else:
            options |= {"mesh": mesh, "dtype": dtype, "zero": self.runtime.parallel.zero}
            self.model = build_sharded_model(recipe.model, **options, prepare=prepare)
        self.optimizer = build_optimizer(self.model, self.settings.optimizer, device, dtype)
        self.averages = Averages(self.model, self.settings)
        self.qat = QuantizationAware(self.model, self.settings)
        self.identity = start.identity
        self.state = TrainState(
            data=self.data.manifest["fingerprint"], run=start.run, tokenizer=self.data.tokenizer.fingerprint
        )
        self._writer = CheckpointWriter(
            folder.checkpoints,
            world,
            keep=self.settings.keep_checkpoints,
            in_background=self.settings.checkpoint_async,
            device=device,
        )
        self._saved: TrainState | None = None
        self._signal: signal.Signals | None = None
        if start.state is not None:
            self._restore(start.state.step)
        self.model.recompute(self.runtime.recompute)
        if self.runtime.compile:
            # Each shape has a static graph of its own, as in a run that begins or resumes with it.
            self.model.compile_blocks(dynamic=False if self.settings.ramps else None)
        self.micro_batch_size = self.settings.micro_batch_size or self.settings.batch_size
        self._captured = self._capture() if self.runtime.cuda_graph else None
        self._slowdown = Slowdown() if device.type == "cpu" else None
        lengths = {seq_len for _, seq_len in self.settings.shapes()}
        self._speed = Speed(self.model, lengths, device, world.size)

    def _open_text(self, text: str | None, start: Start) -> PreparedData:
        """The text of the checkpoint, or that with the fingerprint `text`, or what the source holds now."""
        config, report = self.recipe.data, self.display.preparing
        if start.state is not None:
            saved = start.state.data
            if text not in (None, saved):
                raise ValueError(
                    f"run folder {self.folder.path} holds a run on other text (fingerprint {saved[:12]}) than the "
                    f"{text[:12]} that was requested; name another folder with --out"
                )
            text = saved
        if text is None:
            return prepare(config, report)
        remedy = "restore the text or start a new run with --out"
        if start.recipe is not None and paths(start.recipe.data) != paths(config):
            # The user named other files: they must hold the text, even if it is prepared already.
            try:
                return prepare(config, report, fingerprint=text)
            except ChangedText as error:
                raise ValueError(f"{error}; {remedy}") from None
        return open_text(self.recipe, text, self.folder.path, remedy=remedy, progress=report)

    def _restore(self, checkpoint: int) -> None:
        tokenizer = self.state.tokenizer
        run = self.state.run
        self.state = restore_state(
            self.folder.checkpoints, checkpoint, self.model, self.optimizer, self.averages, self.device
        )
        if self.state.tokenizer not in (None, tokenizer):
            raise ValueError(
                f"the tokenizer has changed since the run to resume began (fingerprint {self.state.tokenizer[:12]} "
                f"then, {tokenizer[:12]} now), so its prepared text has other tokens; start a new run with --out"
            )
        self.state.run, self.state.tokenizer = run, tokenizer  # missing in checkpoints of earlier versions
        if self.state.best_step not in self.folder.checkpoints.steps():
            self.state.best_step = self.state.best_val_bpb = None
        self._saved = replace(self.state)

    def _capture(self) -> CapturedBackward:
        """Raises ValueError for a recipe whose passes wait for the device, which a graph cannot hold."""
        if self.device.type != "cuda":
            raise ValueError(
                f"runtime.cuda_graph=true: needs a CUDA device, not {self.device.type}; set runtime.cuda_graph=false"
            )
        if self.recipe.data.document_mask:
            raise ValueError(
                "runtime.cuda_graph=true: document boundaries differ from batch to batch; set data.document_mask=false"
            )
        if waiting := waiting_module(self.model, self.device, self.dtype):
            raise ValueError(
                f"runtime.cuda_graph=true: {type(waiting[1]).__name__} waits for the device; "
                "set runtime.cuda_graph=false"
            )
        several = any(self.settings.micro_batch_rows(*shape) < shape[0] for shape in self.settings.shapes())
        return CapturedBackward(self.model, partial(autocast, self.device, self.dtype), accumulates=several)

    def run(self) -> TrainResult:
        """Train to the last step or to the first signal; see `fusedlm.train.train`."""
        self._announce()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopSignal())
            self._metrics, self._loggers = None, None
            self.world.together(lambda: self._open_records(stack), only_main=True)
            loader = stack.enter_context(self._open_loader())
            stack.enter_context(self._writer)
            try:
                self._loop(loader, stop)
            except DamagedData as error:
                failure = DamagedData if self.world.size == 1 else OneProcessFailed
                raise failure(f"{error}; {self._rescue()}") from None
        return TrainResult(
            run_dir=self.folder.path,
            step=self.state.step,
            val_bpb=self.state.val_bpb,
            signal=self._signal,
        )

    def _write_header(self) -> None:
        tokenizer, run = self.data.tokenizer, self.state.run
        # A finished run keeps the record of the machine and the recipe that its steps were computed with.
        if self.state.step >= self.settings.steps:
            self.folder.complete_header(tokenizer, self.identity, run)
            return
        described = environment(self.device, self.dtype) | {
            "processes": self.world.size,
            "data": self.data.counts(),
            "parameters": asdict(count_parameters(self.model)),
            "backends": {op: selection.backend for op, selection in self.backends.items()},
            "optimizer": optimizer_split(self.optimizer),
        }
        self.folder.write_header(self.recipe, tokenizer, described, run, self.identity)

    def _open_records(self, stack: contextlib.ExitStack) -> None:
        # Loggers first: one that cannot start must not leave a longer recipe or shorter metrics behind.
        self._loggers = Loggers(self.recipe, self.folder.path, self.state.step)
        stack.callback(self._loggers.close)
        self._write_header()
        self._metrics = MetricsFile(self.folder.metrics, self.state.step, self.state.metrics)
        stack.callback(self._metrics.close)
        for number in self._metrics.damaged_lines:
            self.display.note(f"warning: line {number} of {self._metrics.path} is damaged and was removed")
        for problem in self._metrics.problems:
            self.display.note(f"warning: {self._metrics.path}: {problem}")

    def _stopped(self, stop: StopSignal) -> bool:
        """Whether any process received a signal; all then know which. Finishes a checkpoint that all have written."""
        number, unwritten = self.world.largest_of_each([stop.received or 0, int(not self._writer.is_written)])
        self._signal = signal.Signals(number) if number else None
        if self._writer.is_writing and not unwritten:
            self._speed.leave_out(self._writer.finish())
        return self._signal is not None

    def _loop(self, loader: Loader, stop: StopSignal) -> None:
        self.display.begin(self.state.step, self.settings.steps)
        self.model.train()
        batches = iter(loader)
        # The run may have been stopped between a step and its validation.
        if self._validation_is_due() and self._validate(stop):
            self._save()
        self._speed.restart(loader)
        while self.state.step < self.settings.steps and not self._stopped(stop):
            self._step(next(batches), loader)
            restart_clock = False
            if self._validation_is_due():
                restart_clock = self._validate(stop)
            every = self.settings.checkpoint_every
            if (every and self.state.step % every == 0) or self._is_best():
                self._save()
                restart_clock = True
            if restart_clock:
                self._speed.restart(loader)
        if self.state != self._saved:
            self._save()
        self._writer.finish()
        if self._stopped(stop):
            self.display.note(f"{self._signal.name}: stopped at step {self.state.step} and saved")

    def _step(self, batch: Batch, loader: Loader) -> None:
        scale = schedule_scale(self.settings.schedule, self.state.step, self.settings.steps)
        if self.world.size > 1 and self.recipe.model.dropout:
            torch.manual_seed(dropout_seed(self.settings.seed, self.state.step, self.world.rank))
        rows = self.settings.micro_batch_rows(*batch.tokens.shape)
        if self.model.mtp is not None:
            self.model.set_mtp_weight(self.recipe.model.mtp.weight_at(self.state.step, self.settings.steps))
        try:
            result = train_step(
                self.model,
                self.optimizer,
                batch,
                lr_scale=scale,
                micro_batch_size=rows,
                grad_clip=self.settings.grad_clip,
                autocast=partial(autocast, self.device, self.dtype),
                # Only after the first update, so that the optimizer state is allocated before the capture.
                captured=self._captured if self.optimizer.state else None,
                weights=self.qat.weights(self.state.step),
                teacher=self.teacher,
                world=self.world,
            )
        except torch.OutOfMemoryError:
            raise OneProcessFailed(
                f"train.micro_batch_size={self.micro_batch_size}: the GPU is out of memory with "
                f"{rows} x {batch.tokens.shape[1]} tokens; lower train.micro_batch_size "
                "(the batch stays the same) or set runtime.recompute=mixer or block"
            ) from None
        state = self.state
        state.step += 1
        state.next_sample = batch.next_sample
        if result.skipped:
            state.skipped += 1
            state.skipped_in_row += 1
        else:
            state.skipped_in_row = 0
            self.averages.update(state.step - 1)
            state.ema_updates, state.swa_updates = self.averages.updates()
        record = self._step_record(result, scale, batch, loader)
        self._record(record)
        self.display.step(record)
        if self._slowdown is not None and (note := self._slowdown.step(record["step_seconds"])) is not None:
            self.display.note(note)
        if state.skipped_in_row >= self.settings.max_bad_steps:
            raise TrainingDiverged(self._divergence())

    def _step_record(self, result: StepResult, lr_scale: float, batch: Batch, loader: Loader) -> dict:
        first, *others = self.settings.optimizer.rates().values()
        record = {
            "step": self.state.step,
            "loss": result.loss,
            "lr": first * lr_scale,
            "grad_norm": result.grad_norm,
            "tokens": self._tokens(),
            **self._speed.measure(*batch.tokens.shape, loader),
        }
        if (seconds := self._writer.take_seconds()) > 0:
            record["checkpoint_seconds"] = seconds
        record |= {f"loss_{name}": value for name, value in result.layer_losses.items()}
        figures = self.model.summarise(result.metrics)
        if self.teacher is not None and (nll := figures.pop("nll")) is not None:  # that of the step is weighted
            record["loss"] = nll
        record |= figures
        record |= outlier_figures(self.model)
        if self.text.schedule is not None:
            for key, by_source in (("tokens", self.text.tokens), ("epochs", self.text.epochs)):
                record |= {f"source_{key}_{name}": n for name, n in by_source(self.state.next_sample).items()}
        if others:
            record["lr_rest"] = others[0] * lr_scale
        record |= self.qat.record(self.state.step)
        if result.skipped:
            record["skipped"] = True
        return record

    def _tokens(self) -> int:
        """Tokens of all steps taken, whatever their shapes: the loader counts windows of train.seq_len."""
        return self.state.next_sample * self.settings.seq_len

    def _rescue(self) -> str:
        """Save after the text failed, unless other processes would have to take part; what to resume from."""
        if self.world.size == 1:
            if self.state.step > 0 and self.state != self._saved:
                self._save()
            self._writer.finish()
        return self._last_checkpoint()

    def _last_checkpoint(self) -> str:
        checkpoints = self.folder.checkpoints
        steps = checkpoints.steps()
        return f"the last checkpoint is {checkpoints.path(steps[-1])}" if steps else "no checkpoint was written"

    def _divergence(self) -> str:
        self._writer.finish()
        rates = " and ".join(f"train.optimizer.{key}={lr}" for key, lr in self.settings.optimizer.rates().items())
        return (
            f"loss or gradient norm was not finite in {self.state.skipped_in_row} steps in a row, "
            f"up to step {self.state.step}; {self._last_checkpoint()}; "
            f"lower {rates}"
        )

    def _validation_is_due(self) -> bool:
        step, every = self.state.step, self.settings.eval_every
        if step == 0 or self.state.validated_step == step:
            return False
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def _validate(self, stop: StopSignal) -> bool:
        """Score the held-out text. False if a signal came before the end; then nothing is recorded."""
        try:
            score = self._score(stop)
            record = {
                "step": self.state.step,
                "val_bpb": score.bpb,
                "val_nll_per_token": score.nll_per_token,
                "val_tokens": score.tokens,
                "val_bytes": score.bytes,
                "val_window": self.settings.seq_len,
                "val_stride": self.settings.seq_len,
                "tokens": self._tokens(),
            }
            record |= {f"val_{name}": value for name, value in score.figures.items()}
            for name, weights in (self.averages.kept() | self.qat.kept(self.state.step)).items():
                with weights.applied():
                    record[f"val_bpb_{name}"] = self._score(stop).bpb
        except _Interrupted:
            return False
        self.state.validated_step, self.state.val_bpb = self.state.step, score.bpb
        self._record(record)
        self.display.validation(record)
        return True

    def _score(self, stop: StopSignal):
        def interrupt(_):
            if self._stopped(stop):
                raise _Interrupted

        return score_documents(
            self.model,
            first_tokens(self.data.validation.documents(), self.settings.eval_tokens, self.data.tokenizer),
            window=self.settings.seq_len,
            stride=self.settings.seq_len,
            # Fits in memory, as it does in training together with the activations saved for backward.
            batch_tokens=self.micro_batch_size * self.settings.seq_len,
            longest=self.data.validation.longest,
            device=self.device,
            dtype=self.dtype,
            progress=interrupt,
            world=self.world,
        )

    def _is_best(self) -> bool:
        """Whether the current weights were validated and score better than every checkpoint."""
        state = self.state
        if state.val_bpb is None or state.validated_step != state.step:
            return False
        return state.best_val_bpb is None or state.val_bpb < state.best_val_bpb

    def _save(self) -> None:
        state = self.state
        if self._is_best():
            state.best_step, state.best_val_bpb = state.step, state.val_bpb
        if self._metrics is not None:
            self._metrics.sync()
            state.metrics = self._metrics.check
        save_state(self._writer, state, self.recipe, self.model, self.optimizer, self.averages, self.device)
        self._saved = replace(state)

    def _record(self, record: dict) -> None:
        if self._metrics is not None:
            self._metrics.write(record)
            self._loggers.log(record)

    def _open_loader(self) -> Loader:
        return Loader(
            self.data.train,
            seq_len=self.settings.seq_len,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            samples=self.text.samples,
            document_mask=self.recipe.data.document_mask,
            start_sample=self.state.next_sample,
            start_step=self.state.step,
            step_shape=self.settings.step_shape,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.device,
        )

    def _announce(self) -> None:
        count, summary = count_parameters(self.model), summarise(self.data, self.recipe, self.text)
        steps, start = self.settings.steps, self.state.step
        shapes = ", then ".join(f"{rows} x {seq_len}" for rows, seq_len in self.settings.shapes())
        facts = {
            "run": f"{self.folder.path}" + (f", resuming from step {start:,}" if start else ""),
            "device": f"{self.device.type} ({device_name(self.device)}), {str(self.dtype).removeprefix('torch.')}",
            "model": f"{count.total:,} parameters, {count.embedding:,} of them in the embedding",
            "optimizer": describe_split(self.optimizer),
            "text": summary.one_line(),
            "steps": f"{steps:,} of {shapes} tokens, {self.settings.total_tokens():,} in all",
        }
        if self.precision:
            facts["precision"] = describe_precision(self.precision, self.runtime, self.device)
        if self.teacher is not None:
            facts["teacher"] = self.teacher.describe()
        self.display.header(facts, self.backends)
        for line in precision_table(self.precision):
            self.display.note(f"  {line}")
        for warning in summary.warnings():
            self.display.note(f"warning: {warning}")
