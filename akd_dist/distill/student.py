"""One student: its training state, a step, the end of an epoch, and its checkpoints.

A student owns its random state, so it trains bit for bit the same alone or beside others, in a plain loop or under Ray.
What else it leaves (model, result, metrics, log) is written by `delivery`; the loop around it is `lockstep`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.base.fence import FencedWriter
from akd_dist.base.files import failpoint
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_norm import has_batch_norm, synchronise_batch_norms
from akd_dist.distill.beginnings import copy_of, make_optimizer, seeded_states
from akd_dist.distill.checkpoint import decode, newest_checkpoint, save_checkpoint
from akd_dist.distill.language_metrics import Known, evaluate_language
from akd_dist.distill.language_step import Step
from akd_dist.distill.metrics import evaluate, is_better
from akd_dist.distill.objectives import Stage, mix_of, row_losses, stages_of
from akd_dist.distill.orders import Mix
from akd_dist.distill.packed import Packed
from akd_dist.distill.ranks import AgreedError, Ranks
from akd_dist.distill.schedules import learning_rate
from akd_dist.distill.sparse_losses import losses_of_logits
from akd_dist.distill.stream import Batch
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, generator_states, set_generator_states, weights_dtype
from akd_dist.models.language import LanguageModel, check_linear_head

CPU = torch.device("cpu")


class DivergedError(AgreedError):
    """The loss of a student is no longer a number."""


class Student:
    """The training state of one student.

    Args:
        spec: what the recipe says of it.
        card: its model for this dataset.
        folder: where its checkpoints go.
        attempt: which attempt of the run this is; part of checkpoint names.
        ranks: the data-parallel workers it is trained on; rank 0 alone writes.
        writer: what rank 0 writes through, so that a later worker can shut it out; None where there can be no other.
        metric: what picks the best epoch of each stage; None takes the usual one of the task.
        own_metric: what measures it, where it is one of the user's own.
        device: where module, optimizer and batches lie.
        together: whether its steps are those of a `stack.Stack`; a property of the student, also where it is alone.
        known: of a language model, what it is measured by beside the rows.

    Raises:
        NotStackableError: they are, and its weights cannot be packed.
    """

    def __init__(
        self,
        spec: recipe.StudentSpec,
        card: ModelCard,
        folder: Path,
        *,
        attempt: int = 1,
        ranks: Ranks | None = None,
        writer: FencedWriter | None = None,
        metric: recipe.Metric | None = None,
        own_metric: recipe.CustomMetric | None = None,
        device: torch.device = CPU,
        together: bool = False,
        known: Known | None = None,
    ) -> None:
        self.spec, self.card, self.folder, self.attempt = spec, card, folder, attempt
        self.ranks, self.writer = ranks or Ranks(), writer or FencedWriter()
        self.metric, self.own_metric, self.device = metric, own_metric, device
        self.known = known or Known()
        self.stages, self.stage1 = stages_of(spec), spec.stage1
        # Where it stands: `epoch` counts on through all stages, `step` within the epoch.
        self.epoch = self.step = self.stage_index = 0
        self.loss_sum, self.loss_rows = 0.0, 0  # of this rank's rows, in the epoch so far
        self.seconds = 0.0
        self.stage1_from: str | None = None  # the student whose stage I it goes on from, by name
        self.history: list[dict[str, Any]] = []
        self.lines: list[str] = []  # of its metrics.jsonl, as far as they were written
        self.told_at = float("-inf")  # when that was, by the monotonic clock
        self.best: dict[str, torch.Tensor] | None = None  # the weights of the stage's best epoch so far
        self.best_record: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None  # its entry of fleet.json, once it has ended
        with self.ranks.agree():
            self.rng = seeded_states(self.device, spec.seed, 0, 0)  # the first use of a GPU, which may fail on one rank
            with self._own_generator():
                module = build(card, pretrained=True)
                if spec.sync_batchnorm and self.ranks.world > 1:
                    synchronise_batch_norms(module, self.ranks.go_on)
                self.module = module.to(self.device, weights_dtype(spec.precision))
        self.packed = Packed(self.module) if together else None
        if self.ranks.rank > 0:  # all ranks make the same weights, and then drop other units
            self.rng = seeded_states(self.device, spec.seed, 0, self.ranks.rank)
        self.optimizer, self.scaler = self._new_optimizer()
        self.forward: nn.Module = self.module
        if isinstance(self.module, LanguageModel):
            self._prepare_language_model(self.module)
        elif self.ranks.world > 1:
            self.forward = DistributedDataParallel(self.module)

    def _prepare_language_model(self, module: LanguageModel) -> None:
        with self.ranks.agree():
            if any(stage.needs_linear_head for stage in self.stages):
                check_linear_head(module, f"the squared norm of {self.spec.objective.kind}")
            if self.spec.gradient_checkpointing:
                module.gradient_checkpointing_enable()

    # ---- where it stands

    @property
    def training(self) -> bool:
        """Whether it has not ended."""
        return self.result is None

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.stage_index]

    def stage_of(self, epoch: int) -> Stage | None:
        """The stage of an epoch, 0-based through all stages; None after the last."""
        ends = itertools.accumulate(stage.epochs for stage in self.stages)
        return next((stage for end, stage in zip(ends, self.stages, strict=True) if epoch < end), None)

    def mix_in(self, stage: Stage) -> Mix:
        """Which train rows it is shown in one of its stages."""
        return mix_of(stage, self.spec.labelled)

    @property
    def optimizer_spec(self) -> recipe.Optimizer:
        """The optimizer of the current stage, as the recipe describes it."""
        return self.stage.optimizer or self.spec.optimizer

    @property
    def not_started(self) -> bool:
        """Whether it has not taken a step yet."""
        return self.training and self.epoch == self.step == 0

    @property
    def epochs_shared(self) -> int:
        """Epochs of a stage I that another student trained for it."""
        return self.stages[0].epochs if self.stage1_from else 0

    @property
    def stage_epoch(self) -> int:
        """The 0-based epoch within the current stage."""
        return self.epoch - sum(stage.epochs for stage in self.stages[: self.stage_index])

    @property
    def epochs(self) -> int:
        """Epochs of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    # ---- training

    def take_step(self, batch: Batch, steps_per_epoch: int) -> None:
        """One optimizer step on this rank's share of a global batch.

        Raises:
            DivergedError: the loss is not finite on some rank; the weights are still those of the step before.
            PeerFailedError: the forward pass failed on another rank.
        """
        started = time.perf_counter()
        stage, epoch, optimizer = self.stage, self.stage_epoch, self.optimizer_spec
        self.module.train()  # an evaluation leaves it in eval mode

        # Learning rate: a pure function of the step within the stage, so that no scheduler has to be checkpointed.
        stage_step, stage_steps = epoch * steps_per_epoch + self.step, stage.epochs * steps_per_epoch
        rate = learning_rate(optimizer.lr, optimizer.schedule, stage_step, stage_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        # Dropout draws from the student's own generator: it drops the same units beside other students as alone.
        with self._own_generator():
            value, counted = self._gradients(batch, rate)

            # Every rank now holds the gradient of the whole batch, so all of them clip by the same norm and take the
            # same step. In float16 the scaler leaves out a step whose gradients overflowed; else it does nothing.
            if optimizer.clip is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.module.parameters(), optimizer.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()

        self.stepped(value, counted, time.perf_counter() - started)

    def _gradients(self, batch: Batch, rate: float) -> tuple[float, int]:
        """Leave the gradient of the mean loss over the global batch in all parameters, on every rank.

        Returns:
            The sum of this rank's losses, and of how many rows or targets these are.
        """
        if isinstance(self.module, LanguageModel):
            self.optimizer.zero_grad()
            kind = self.card.classes, self.spec.precision, self.spec.micro_batch
            step = Step(self.stage, self.stage_epoch, *kind, self.ranks, self.scaler)
            value, counted = step.gradients(self.module, batch)
            self._check_finite(value, rate)
            self.ranks.sum_gradients(self.module)
            return value, counted

        # Forward. The inputs show the epoch's view already, the one that the teacher's logits are of.
        # A rank without rows (of a small last batch) takes part, since the others wait for its gradients. Many models
        # cannot reshape a batch of no rows, so it runs a spare row and keeps nothing of it; its gradients are zero.
        # Batch norm would take the spare row into its running statistics, so there it runs no rows.
        spare = None if batch.spare is None or has_batch_norm(self.module) else batch.spare
        with self.ranks.agree():  # if this fails on one rank, all of them raise; else they would wait for it
            with autocast(self.device, self.spec.precision):
                logits = self.forward(batch.inputs) if spare is None else self.forward(spare)[:0]
            loss = self._row_losses(logits, batch).sum()
        value = float(loss.detach())
        self._check_finite(value, rate)

        # Backward. Gradients add up, so those that a step may have left when it failed half way are cleared first.
        # DistributedDataParallel averages gradients over the ranks here. Each rank's sum of losses, times the ranks and
        # divided by the rows of the whole batch, makes that the gradient of the mean over the batch: exactly, for
        # unequal shares and short last batches too. In another order than * and / it would round otherwise, and the
        # weights would not be those of earlier versions bit for bit.
        self.optimizer.zero_grad()
        self.scaler.scale(loss * self.ranks.world / batch.global_rows).backward()  # type: ignore[no-untyped-call]
        return value, len(batch.rows)

    def _row_losses(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of each row of a classifier, [n]; from what a store describes block by block."""
        stage, epoch, weight = self.stage, self.stage_epoch, batch.label_weight
        if batch.targets is None or not stage.needs_logits:
            return row_losses(stage, epoch, logits, batch.logits, batch.labels, weight)
        targets = batch.targets.of_rows(0, len(batch.rows), weights_dtype(self.spec.precision))
        return losses_of_logits(logits, stage.term(epoch, targets, batch.labels, weight))

    def _check_finite(self, value: float, rate: float) -> None:
        """The ranks leave together, before any weight has changed."""
        if self.ranks.any(not math.isfinite(value))[0]:
            value = self.ranks.sum(value)
            raise DivergedError(f"the loss is {value} in epoch {self.epoch}, step {self.step}, at lr {rate:g}")

    def stepped(self, loss: float, rows: int, seconds: float) -> None:
        """Count a step that was taken: the sum of the losses of so many rows, or targets, and the time it took."""
        # Python floats, added in the order of the steps and kept in checkpoints: an epoch that was resumed records the
        # same train loss to the last bit.
        self.loss_sum += loss
        self.loss_rows += rows
        self.step += 1
        self.seconds += seconds

    def end_epoch(self, validation: Rows, measured: dict[str, float] | None = None) -> dict[str, Any]:
        """Validate, remember the best weights of the stage, and move on to the next epoch or stage.

        Args:
            measured: its metrics on these rows, where it was evaluated together with others.

        Returns:
            The epoch's record, a line of metrics.jsonl.

        Raises:
            DivergedError: the validation loss is not finite.
        """
        started = time.perf_counter()
        # One rank's numbers for all: ranks that chose different best weights would train different models.
        metrics: dict[str, float] = measured or self.ranks.from_first(self.evaluate(validation)[0])
        if not math.isfinite(metrics["loss"]):
            raise DivergedError(f"the validation loss is {metrics['loss']} after epoch {self.epoch}")
        stage, epoch = self.stage, self.stage_epoch
        record = {
            "epoch": self.epoch,
            "stage": stage.name,
            "stage_epoch": epoch,
            "temperature": stage.temperature(epoch),
            "phi": stage.phi(epoch),
            "psi": stage.psi(epoch),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.ranks.sum(self.loss_sum) / self.ranks.sum(self.loss_rows),
            "validation": metrics,
            "seconds": round(self.seconds + time.perf_counter() - started, 3),
        }
        self.history.append(record)
        metric = self.metric or recipe.METRICS[validation.task][0]
        # Only what is strictly better: of equal epochs the earliest stays the best.
        if self.best is None or is_better(metric, metrics[metric], self.best_record["validation"][metric]):
            self.best, self.best_record = copy_of(self.module.state_dict()), record
        self.epoch, self.step, self.loss_sum, self.loss_rows = self.epoch + 1, 0, 0.0, 0
        if epoch + 1 == stage.epochs and self.stage_index + 1 < len(self.stages):
            self._begin_stage(self.stage_index + 1, self.best)
        self.seconds += time.perf_counter() - started
        return record

    def _begin_stage(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Start a stage from the best validation weights of the one before, with a fresh optimizer and seed."""
        self.module.load_state_dict(weights)
        self.ranks.share_state(self.module)
        failpoint("student.between_stages")
        self.stage_index, self.best, self.best_record = index, None, {}
        self.optimizer, self.scaler = self._new_optimizer()
        self.rng = seeded_states(self.device, self.spec.seed, index, self.ranks.rank)

    def fork_from(self, stage1_leader: Student) -> None:
        """Enter stage II beside another student, which has just entered it: stage I would have been the same.

        It has to be saved at once: without a checkpoint, stage I would have to be trained again.
        """
        self.enter_stage2(stage1_leader.spec.name, stage1_leader.history, stage1_leader.module.state_dict())

    def enter_stage2(self, whose: str, history: list[dict[str, Any]], weights: dict[str, torch.Tensor]) -> None:
        """Enter stage II with what another student had when it did, after a stage I that would have been the same.

        Args:
            whose: that student's name; that of its run and a slash before it, if it is of another run.
            history: its epochs until then.
            weights: those of its best validation epoch; of rank 0, which are given to the others.
        """
        self.stage1_from = whose
        self.epoch, self.history = self.stages[0].epochs, list(history)
        self._begin_stage(1, weights)

    def keep_initial(self, validation: Rows) -> None:
        """Where there are no epochs to choose from, the weights as they were made are the best."""
        metrics = self.ranks.from_first(self.evaluate(validation)[0])
        self.best, self.best_record = copy_of(self.module.state_dict()), {"validation": metrics}

    def evaluate(self, rows: Rows) -> tuple[dict[str, float], np.ndarray]:
        """Metrics and predictions of its weights as they are now, as `metrics.evaluate`."""
        with self.ranks.agree(), self._own_generator():  # some models draw numbers here as well
            if isinstance(self.module, LanguageModel):
                return evaluate_language(self.module, rows, self.device, self.spec.precision, self.known)
            return evaluate(self.module, rows, self.device, self.spec.precision, self.own_metric)

    def end(self, result: dict[str, Any]) -> None:
        """Keep the result; the memory is left to the other students of this worker."""
        self.result, self.best = result, None
        del self.forward, self.module, self.optimizer, self.scaler, self.packed

    # ---- to disk and back

    def save(self, rests_on: str | None = None) -> None:
        """Checkpoint everything that the next step depends on. Every rank calls it; rank 0 writes.

        Args:
            rests_on: what `Lockstep.vouch` returned since the last step: None where all bytes behind the state were
                hashed after it, else the marks of the files that they lie in.
        """
        states = [self.ranks.gather(state) for state in self.rng]
        losses = self.ranks.gather(torch.tensor([self.loss_sum, self.loss_rows], dtype=torch.float64))
        if self.ranks.rank != 0:
            return
        tree = {
            "epoch": self.epoch,
            "step": self.step,
            "stage_index": self.stage_index,
            "losses": losses,
            "seconds": self.seconds,
            "stage1_from": self.stage1_from,
            "rests_on": rests_on,
            "stacked": self.packed is not None,
            "history": self.history,
            "best": self.best,
            "best_record": self.best_record,
            "rng": states,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        # Numbers of fixed width, so that names sort by progress, and where that is equal by attempt.
        name = f"{self.epoch:06d}-{self.step:08d}-{self.attempt:04d}"
        save_checkpoint(self.folder / "checkpoints", name, tree, self.writer)

    def resume(self, tell: Callable[[str], None] = lambda text: None) -> bool:
        """Take up the newest intact checkpoint; False where there is none.

        Args:
            tell: told of each damaged checkpoint that is passed over.

        Raises:
            DamagedError: there are checkpoints and none of them is intact.
            RefusedError: they are of a student whose steps were taken in another way.
        """
        tree = self._newest_checkpoint(tell)
        if tree is None:
            return False
        if tree.get("stacked", False) is not (self.packed is not None):
            before, now = ("in a stack", "alone") if tree.get("stacked") else ("alone", "in a stack")
            raise RefusedError(
                f"the checkpoints of {self.spec.name} cannot be gone on from",
                got=f"a checkpoint of steps that were taken {before}",
                expected=f"one of steps {now}, as they are taken now",
                next="put the run's identity.json back, which says how they were taken; or start over with --fresh",
            )
        self.epoch, self.step, self.stage_index = tree["epoch"], tree["step"], tree["stage_index"]
        self.loss_sum, rows = tree["losses"][self.ranks.rank].tolist()
        self.loss_rows = int(rows)
        self.seconds, self.history, self.stage1_from = tree["seconds"], tree["history"], tree["stage1_from"]
        self.best, self.best_record = tree["best"], tree["best_record"]
        self.rng = [states[self.ranks.rank] for states in tree["rng"]]
        self.module.load_state_dict(tree["module"])
        self.optimizer, self.scaler = self._new_optimizer()
        # Into an optimizer of the stage that was entered above: it may be of another kind than that of the first stage.
        self.optimizer.load_state_dict(tree["optimizer"])
        self.scaler.load_state_dict(tree["scaler"])
        return True

    def _newest_checkpoint(self, tell: Callable[[str], None]) -> Any | None:
        """The tree of the checkpoint that rank 0 chooses: it alone looks for damage, and sets aside what is damaged."""
        folder, found = self.folder / "checkpoints", None
        with self.ranks.agree():
            if self.ranks.rank == 0:
                found = newest_checkpoint(folder, self.writer, tell)
        name = self.ranks.from_first(found and found[0].name)
        if name is None:
            return None
        with self.ranks.agree():
            return found[1] if found else decode((folder / name).read_bytes(), folder / name)

    def _new_optimizer(self) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
        """A fresh optimizer, and what keeps float16's small gradients above zero; elsewhere that does nothing."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.spec.precision == "float16")
        trained = self.module.parameters() if self.packed is None else [self.packed.vector]
        return make_optimizer(trained, self.optimizer_spec), scaler

    @contextlib.contextmanager
    def _own_generator(self) -> Iterator[None]:
        """Run under this student's torch generator states, and keep where they got to."""
        outer = generator_states(self.device)
        set_generator_states(self.device, self.rng)
        try:
            yield
        finally:
            self.rng = generator_states(self.device)
            set_generator_states(self.device, outer)
