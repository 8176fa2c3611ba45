"""The training loop: a Lightning module around a `TrainableModel`. Imported on demand because Lightning is heavy.

Everything random in step s depends on (seed, s), and everything else is in the saved state. So a resumed run ends with
the same weights, bit for bit, as an uninterrupted one (on one kind of machine, for a budget of steps).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from jidm.errors import JidmError
from jidm.training.config import TrainConfig
from jidm.training.data.batch import PairBatch
from jidm.training.data.batches import Batches
from jidm.training.data.datamodule import TrainingSetup
from jidm.training.distributed import all_reduce_mean
from jidm.training.logger import RunLogger
from jidm.training.model import Calibratable, TrainableModel
from jidm.training.optimizer import MuonAdamW, learning_rate

Visualizer = Callable[[nn.Module, PairBatch, Path], None]
"""Draws what a model predicts for a few pairs into a .png file."""

LAST_CHECKPOINT = "last.ckpt"

_PLOTTED_PAIRS = 2


class TrainingModule(lightning.LightningModule):
    """One run.

    Args:
        setup: model and batches.
        config: of the run.
        save: called with (weights by name, facts) whenever there are new weights to keep.
        run_logger: of losses and metrics; None in all processes but the first.
        visualizer: draws the first validation pairs.
    """

    def __init__(
        self, setup: TrainingSetup, config: TrainConfig, save: Callable[[dict[str, Tensor], dict[str, Any]], None],
        run_logger: RunLogger | None, visualizer: Visualizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = setup.model
        self.config, self.run_logger, self.visualizer = config, run_logger, visualizer
        self._save, self._training_setup = save, setup
        self.ema_weights = {name: x.detach().clone() for name, x in self._float_tensors()} if config.ema else {}
        self.elapsed = 0.0  # [s] of the budget, used in earlier sessions
        self.bad_in_row = self.bad_total = 0
        self.best, self.best_step, self.worse_in_row = math.inf, -1, 0
        self._started_at = self._saved_at = time.monotonic()
        self._step_is_bad = False

    # ---- Lightning hooks -----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configured optimizer; vectors (biases, scales) do not decay."""
        rate, decay = self.config.learning_rate, self.config.weight_decay
        if self.config.optimizer == "muon":
            return MuonAdamW(self.model, rate, decay)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate)

    def train_dataloader(self) -> DataLoader[PairBatch]:
        return DataLoader(_StepDataset(self, self._training_setup.train), batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def on_train_start(self) -> None:
        self._started_at = self._saved_at = time.monotonic()
        self.ema_weights = {name: x.to(self.device) for name, x in self.ema_weights.items()}

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        # Random numbers that the model draws (dropout) depend on the step alone, so that they are the same after a
        # resume.
        torch.manual_seed((self.config.seed * 1_000_003 + self.global_step) * 64 + self.global_rank)
        self.model.progress = self.progress()
        rate = learning_rate(self.config, self.global_step, self.model.progress)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        terms = self.model.losses(batch)
        self._loss_terms = {name: x.detach() for name, x in terms.items()}
        return terms["loss"]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient's norm; skip the step if it is not finite, in all processes, which share gradients."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        self._step_is_bad = not bool(norm.isfinite())
        if self._step_is_bad:
            for p in parameters:
                p.grad = None  # AdamW skips such parameters and their moments

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        self._count_bad_steps()
        if self.config.ema and not self._step_is_bad:
            self._update_ema()
        step, progress = self.global_step, self.progress()
        finished = progress >= 1
        if step % self.config.log_every == 0 or finished:
            means = all_reduce_mean(torch.stack([x.double() for x in self._loss_terms.values()])).tolist()
            values = {**dict(zip(self._loss_terms, means)), "progress": progress, "bad_steps": self.bad_total}
            if self.run_logger:
                self.run_logger.log("train", step, self._elapsed_now(), values)
        if step % self.config.validate_every == 0 or finished:
            self._validate(last=finished)
            finished = finished or (0 < self.config.patience <= self.worse_in_row)
        if finished or self._broadcast(time.monotonic() - self._saved_at) > 60 * self.config.save_minutes:
            self.save_state()
        if finished:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["jidm"] = {
            "ema_weights": self.ema_weights, "elapsed": self._elapsed_now(), "bad_in_row": self.bad_in_row, "bad_total": self.bad_total,
            "best": self.best, "best_step": self.best_step, "worse_in_row": self.worse_in_row,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["jidm"].items():
            setattr(self, name, value)

    # ---- the budget ----------------------------------------------------------------------------------------------

    def progress(self) -> float:
        """Fraction of the budget that is used up, the same in all processes."""
        if self.config.steps is not None:
            return self.global_step / self.config.steps
        assert self.config.minutes is not None
        return self._broadcast(self._elapsed_now() / (60 * self.config.minutes))

    def _elapsed_now(self) -> float:
        return self.elapsed + time.monotonic() - self._started_at

    def _broadcast(self, value: float) -> float:
        """The first process's value."""
        if self.trainer.world_size == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(number, 0)
        return float(number)

    # ---- weights -------------------------------------------------------------------------------------------------

    def _float_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, x in self.model.state_dict().items():
            if x.is_floating_point():
                yield name, x

    def _update_ema(self) -> None:
        # The decay is smaller at first, so that the random start is soon forgotten.
        decay = min(self.config.ema, (1 + self.global_step) / (10 + self.global_step))
        names, values = zip(*self._float_tensors())
        torch._foreach_lerp_([self.ema_weights[name] for name in names], list(values), 1 - decay)

    def save_state(self) -> None:
        """Save everything needed to resume; the file is replaced atomically."""
        folder = self.config.run_folder
        temporary = folder / f".{LAST_CHECKPOINT}.tmp"
        self.trainer.save_checkpoint(temporary)
        if self.trainer.is_global_zero:
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, folder / LAST_CHECKPOINT)
        self._saved_at = time.monotonic()

    def _count_bad_steps(self) -> None:
        self.bad_in_row = self.bad_in_row + 1 if self._step_is_bad else 0
        self.bad_total += self._step_is_bad
        if self.bad_in_row >= self.config.max_bad_steps:
            raise JidmError(
                f"training diverged: {self.bad_in_row} steps in a row up to step {self.global_step} had a loss or gradient "
                f"that is not finite; use a smaller --learning-rate and check the data with `jidm dataset validate`"
            )

    # ---- validation ----------------------------------------------------------------------------------------------

    def _validate(self, last: bool) -> None:
        """Evaluate the averaged weights on fixed pairs, and save them if the policy says so."""
        values: dict[str, float] = {}
        with self._using_ema_weights() as model:
            if (validation := self._training_setup.validation) is not None:
                if isinstance(model, Calibratable):
                    final = last or self.config.save_policy == "best"
                    model.calibrate_uncertainty(self._calibration_batches, rounds=2 if final else 1)
                    if final:
                        model.calibrate_video_uncertainty(x.to(self.device) for x in validation.clips())
                values = {name: self._broadcast(x) for name, x in self._validation_metrics(model).items()}
            monitored = values.get("nve", values.get("loss", math.nan))
            better = monitored < self.best
            if better:
                self.best, self.best_step = monitored, self.global_step
            self.worse_in_row = 0 if better or math.isnan(monitored) else self.worse_in_row + 1
            if self.trainer.is_global_zero and (better or self.config.save_policy == "last" or not values):
                facts = {"step": self.global_step, "validation": values, "bad_steps": self.bad_total}
                self._save(model.state_dict(), facts)
            if self.run_logger:
                self.run_logger.log("validation", self.global_step, self._elapsed_now(), values)
                self._plot(model)

    @cached_property
    def _validation_batches(self) -> list[PairBatch]:
        validation = self._training_setup.validation
        batches = [] if validation is None else validation.validation_batches(self.config.validation_pairs)
        return [x.to(self.device) for x in batches]

    @cached_property
    def _calibration_batches(self) -> list[PairBatch]:
        validation = self._training_setup.validation
        batches = [] if validation is None else validation.calibration_batches(self.config.validation_pairs)
        return [x.to(self.device) for x in batches]

    @contextmanager
    def _using_ema_weights(self) -> Iterator[TrainableModel]:
        """The model with the averaged weights, in evaluation mode; afterwards it is as before."""
        current = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.model.load_state_dict({**current, **self.ema_weights})
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.load_state_dict(current)
            self.model.train()

    def _validation_metrics(self, model: TrainableModel) -> dict[str, float]:
        """Losses, and the normalized velocity error mean |error| / mean |delta_q| of the steps of single pairs."""
        sums: dict[str, float] = {}
        error = size = 0.0
        for batch in self._validation_batches:
            torch.manual_seed(self.config.seed)
            for name, x in model.losses(batch).items():
                sums[name] = sums.get(name, 0.0) + float(x) * len(batch)
            steps = model.predict_steps(batch.first, batch.second, batch.before)
            error += float((steps - batch.delta_q).abs().sum())
            size += float(batch.delta_q.abs().sum())
        count = sum(len(b) for b in self._validation_batches)
        return {name: x / count for name, x in sums.items()} | ({"nve": error / size} if size else {})

    def _plot(self, model: TrainableModel) -> None:
        if self.visualizer is None or not self._validation_batches or self.run_logger is None:
            return
        file = self.config.run_folder / f"images_{self.global_step:07d}.png"
        self.visualizer(model, self._validation_batches[0][:_PLOTTED_PAIRS], file)
        self.run_logger.log_image(file, self.global_step)


class _StepDataset(IterableDataset[PairBatch]):
    """An endless stream of batches from the current step on."""

    def __init__(self, module: TrainingModule, batches: Batches) -> None:
        self.module, self.batches = module, batches

    def __iter__(self) -> Iterator[PairBatch]:
        step = self.module.global_step
        while True:
            yield self.batches.batch_at(step, self.module.global_rank, self.module.trainer.world_size)
            step += 1


def make_trainer(config: TrainConfig) -> lightning.Trainer:
    """A Trainer that leaves saving, logging and stopping to the module."""
    strategy: Any = "auto"
    if config.devices > 1 or config.strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        backend = "nccl" if config.accelerator != "cpu" and torch.cuda.is_available() else "gloo"
        # A model may leave parameters unused, those of its flow head where there is no flow.
        strategy = DDPStrategy(process_group_backend=backend, find_unused_parameters=True)
    return lightning.Trainer(
        accelerator=config.accelerator, devices=config.devices, strategy=strategy, max_epochs=-1,
        max_steps=config.steps if config.steps is not None else -1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, barebones=False,
    )  # fmt: skip
