"""The training loop: steps, validations and checkpoints of one run in one process."""

import contextlib
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fusedlm.config import Recipe
from fusedlm.data import Loader, prepare
from fusedlm.evaluate import score_documents
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters, training_flops_per_token
from fusedlm.model.auxiliary import RoutingTally
from fusedlm.model.precision import autocast
from fusedlm.optim import ExponentialMovingAverage, build_optimizer, schedule_scale
from fusedlm.train.cuda_graph import CapturedBackward
from fusedlm.train.folder import RunFolder
from fusedlm.train.hardware import device_name, environment, peak_flops, peak_memory_bytes
from fusedlm.train.loggers import open_loggers
from fusedlm.train.metrics import MetricsFile
from fusedlm.train.progress import Display
from fusedlm.train.signals import StopSignal
from fusedlm.train.state import Progress, restore_state, save_state
from fusedlm.train.step import train_step


class TrainingDiverged(ValueError):
    """Too many steps in a row without a finite loss and gradient."""


@dataclass(frozen=True)
class TrainResult:
    run_dir: Path
    step: int  # optimizer steps behind the run, skipped ones included
    val_bpb: float | None  # bits per byte of the last validation; None: there was none yet
    stopped_by_signal: bool


class _Interrupted(Exception):
    """A signal came during a validation."""


class Trainer:
    """One run to its end, from the checkpoint of a verified step or, with None, from its start."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        device: torch.device,
        dtype: torch.dtype,
        display: Display,
        checkpoint: int | None,
    ):
        self.recipe, self.settings, self.folder = recipe, recipe.train, folder
        self.device, self.dtype, self.display = device, dtype, display
        self.data = prepare(recipe.data, display.preparing)
        torch.manual_seed(self.settings.seed)
        self.model = build_model(
            recipe.model,
            vocab_size=self.data.tokenizer.vocab_size,
            device=device,
            dtype=dtype,
            deterministic=self.settings.deterministic,
        )
        self.optimizer = build_optimizer(self.model, self.settings.optimizer, device)
        self.ema = ExponentialMovingAverage(self.model, self.settings.ema) if self.settings.ema is not None else None
        self.progress = Progress(data=self.data.manifest["fingerprint"])
        self._saved: Progress | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.settings.recompute == "mixer":
            self.model.recompute_mixers()
        if self.settings.compile:
            self.model.compile_blocks()
        self.micro_batch_size = self.settings.micro_batch_size or self.settings.batch_size
        self._captured = self._capture() if self.settings.cuda_graph else None
        self.tokens_per_step = self.settings.batch_size * self.settings.seq_len
        peak = peak_flops(device)
        flops_per_token = training_flops_per_token(self.model, self.settings.seq_len)
        self._mfu_per_token_rate = None if peak is None else flops_per_token / peak

    def _restore(self, checkpoint: int) -> None:
        fingerprint = self.progress.data
        self.progress = restore_state(
            self.folder.checkpoints, checkpoint, self.model, self.optimizer, self.ema, self.device
        )
        if self.progress.data != fingerprint:
            raise ValueError(
                f"the text has changed since the run to resume began (fingerprint {self.progress.data[:12]} then, "
                f"{fingerprint[:12]} now); restore the text or start anew with --out"
            )
        if self.progress.best_step not in self.folder.checkpoints.steps():
            self.progress.best_step = self.progress.best_val_bpb = None
        self._saved = replace(self.progress)

    def _capture(self) -> CapturedBackward:
        """Refuses what waits for the device in the middle of a pass, which a graph cannot."""
        if self.device.type != "cuda":
            raise ValueError(f"train.cuda_graph=true needs a CUDA device, not {self.device.type}; turn it off")
        if self.recipe.data.document_mask:
            raise ValueError(
                "train.cuda_graph=true does not go with documents of varying length; set data.document_mask=false"
            )
        if RoutingTally(self.model):
            raise ValueError("train.cuda_graph=true does not go with routed feed-forwards; turn it off")
        several = self.micro_batch_size < self.settings.batch_size
        return CapturedBackward(self.model, partial(autocast, self.device, self.dtype), accumulates=several)

    def run(self) -> TrainResult:
        """Train to the end of the recipe or to the first signal; see `fusedlm.train.train`."""
        self._announce()
        record = environment(self.device, self.dtype) | {
            "parameters": asdict(count_parameters(self.model)),
            "implementations": {name: choice.name for name, choice in self.model.implementations.items()},
        }
        self.folder.write_header(self.recipe, record, self.data.tokenizer)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopSignal())
            self._metrics = MetricsFile(self.folder.metrics, after_step=self.progress.step)
            stack.callback(self._metrics.close)
            for number in self._metrics.damaged_lines:
                self.display.note(f"warning: line {number} of {self._metrics.path} was damaged and is left out")
            self._loggers = open_loggers(self.recipe, self.folder.path, self.progress.step)
            for logger in self._loggers:
                stack.callback(logger.close)
            loader = stack.enter_context(self._open_loader())
            self._loop(loader, stop)
        return TrainResult(
            run_dir=self.folder.path,
            step=self.progress.step,
            val_bpb=self.progress.val_bpb,
            stopped_by_signal=stop.received is not None,
        )

    def _loop(self, loader: Loader, stop: StopSignal) -> None:
        self.display.begin(self.progress.step, self.settings.steps)
        self.model.train()
        batches = iter(loader)
        # A signal may have come between a step and its validation: the validation is made up for here.
        if self._validation_is_due() and self._validate(stop):
            self._save()
        self._clock, self._waited = time.perf_counter(), loader.wait_seconds
        while self.progress.step < self.settings.steps and stop.received is None:
            self._step(next(batches), loader)
            off_clock = False
            if self._validation_is_due():
                off_clock = self._validate(stop)
            every = self.settings.checkpoint_every
            if (every and self.progress.step % every == 0) or self._is_best():
                self._save()
                off_clock = True
            if off_clock:
                self._clock, self._waited = time.perf_counter(), loader.wait_seconds
        if self.progress != self._saved:
            self._save()
        if stop.received is not None:
            self.display.note(f"{stop.received.name}: stopped at step {self.progress.step} and saved")

    def _step(self, batch, loader: Loader) -> None:
        scale = schedule_scale(self.settings.schedule, self.progress.step, self.settings.steps)
        lr = self.settings.optimizer.lr * scale
        try:
            result = train_step(
                self.model,
                self.optimizer,
                batch,
                lr=lr,
                micro_batch_size=self.micro_batch_size,
                grad_clip=self.settings.grad_clip,
                autocast=partial(autocast, self.device, self.dtype),
                # Not before the first update has made the moments: the memory of the capture then is that of a step.
                captured=self._captured if self.optimizer.state else None,
            )
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU's memory does not hold a micro-batch of {self.micro_batch_size} x {self.settings.seq_len} "
                "tokens; lower train.micro_batch_size (the batch stays what it is)"
            ) from None
        progress = self.progress
        progress.step += 1
        progress.next_sample = batch.next_sample
        if result.skipped:
            progress.skipped += 1
            progress.skipped_in_row += 1
        else:
            progress.skipped_in_row = 0
            if self.ema is not None:
                self.ema.update()
                progress.ema_updates = self.ema.updates
        now, waited = time.perf_counter(), loader.wait_seconds
        seconds, self._clock = now - self._clock, now
        loader_wait, self._waited = waited - self._waited, waited
        rate = self.tokens_per_step / seconds
        record = {
            "step": progress.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": progress.step * self.tokens_per_step,
            "tokens_per_second": rate,
            "mfu": None if self._mfu_per_token_rate is None else rate * self._mfu_per_token_rate,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "loader_wait_seconds": loader_wait,
            "step_seconds": seconds,
        }
        if result.routing is not None:
            record |= result.routing.record()
        if result.skipped:
            record["skipped"] = True
        self._record(record)
        self.display.step(record)
        if progress.skipped_in_row >= self.settings.max_bad_steps:
            raise TrainingDiverged(self._divergence())

    def _divergence(self) -> str:
        checkpoints = self.folder.checkpoints
        steps = checkpoints.steps()
        last = f"the last good checkpoint is {checkpoints.path(steps[-1])}" if steps else "no checkpoint was written"
        return (
            f"loss or gradient norm was not finite in {self.progress.skipped_in_row} steps in a row, "
            f"up to step {self.progress.step}; {last}; lower train.optimizer.lr={self.settings.optimizer.lr}"
        )

    def _validation_is_due(self) -> bool:
        step, every = self.progress.step, self.settings.eval_every
        if step == 0 or self.progress.validated_step == step:
            return False
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def _validate(self, stop: StopSignal) -> bool:
        """Score the held-out text; False when a signal came before the end, and nothing is recorded."""
        try:
            score = self._score(stop)
            record = {
                "step": self.progress.step,
                "val_bpb": score.bpb,
                "val_nll_per_token": score.nll_per_token,
                "val_tokens": score.tokens,
                "val_bytes": score.bytes,
                "tokens": self.progress.step * self.tokens_per_step,
            }
            if score.routing is not None:
                record |= {f"val_{name}": value for name, value in score.routing.record().items()}
            if self.ema is not None:
                with self.ema.applied():
                    record["val_bpb_ema"] = self._score(stop).bpb
        except _Interrupted:
            return False
        self.progress.validated_step, self.progress.val_bpb = self.progress.step, score.bpb
        self._record(record)
        self.display.validation(record)
        return True

    def _score(self, stop: StopSignal):
        def interrupt(_):
            if stop.received is not None:
                raise _Interrupted

        return score_documents(
            self.model,
            self.data.validation.documents(),
            window=self.settings.seq_len,
            stride=self.settings.seq_len,
            # What fits with the activations that training keeps fits without them.
            batch_tokens=self.micro_batch_size * self.settings.seq_len,
            max_tokens=self.settings.eval_tokens,
            device=self.device,
            dtype=self.dtype,
            progress=interrupt,
        )

    def _is_best(self) -> bool:
        """Whether the weights as they are were validated and no checkpoint scored better."""
        progress = self.progress
        if progress.val_bpb is None or progress.validated_step != progress.step:
            return False
        return progress.best_val_bpb is None or progress.val_bpb < progress.best_val_bpb

    def _save(self) -> None:
        progress = self.progress
        if self._is_best():
            progress.best_step, progress.best_val_bpb = progress.step, progress.val_bpb
        self._metrics.sync()
        checkpoints = self.folder.checkpoints
        save_state(checkpoints, progress, self.recipe, self.model, self.optimizer, self.ema, self.device)
        self._saved = replace(progress)
        checkpoints.prune(self.settings.keep_checkpoints, progress.best_step)

    def _record(self, record: dict) -> None:
        self._metrics.write(record)
        for logger in self._loggers:
            logger.log(record)

    def _open_loader(self) -> Loader:
        return Loader(
            self.data.train,
            seq_len=self.settings.seq_len,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            document_mask=self.recipe.data.document_mask,
            start_sample=self.progress.next_sample,
            device=self.device,
        )

    def _announce(self) -> None:
        count = count_parameters(self.model)
        steps, start = self.settings.steps, self.progress.step
        facts = {
            "run": f"{self.folder.path}" + (f", going on from step {start}" if start else ""),
            "device": f"{self.device.type} ({device_name(self.device)}), {str(self.dtype).removeprefix('torch.')}",
            "parameters": f"{count.total:,} (embedding {count.embedding:,})",
            "training text": f"{self.data.train.n_tokens:,} tokens, {self.data.train.n_documents:,} documents",
            "tokens per step": f"{self.tokens_per_step:,} ({self.settings.batch_size} x {self.settings.seq_len})",
            "steps": f"{steps:,} ({steps * self.tokens_per_step:,} tokens)",
        }
        self.display.header(facts, self.model.implementations)
