"""One student: its whole training state, a step, the end of an epoch, and its way to disk and back.

A student owns its random state, so it trains bit for bit the same alone or beside others, in a plain loop or under Ray.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from akd_dist import recipe
from akd_dist.base.fence import FencedWriter
from akd_dist.base.files import append, failpoint, sha256
from akd_dist.data.predictions import encode_predictions
from akd_dist.data.rows import Rows
from akd_dist.distill.batch_norm import has_batch_norm, synchronise_batch_norms
from akd_dist.distill.checkpoint import checkpoints, decode, newest_checkpoint, read_header, save_checkpoint
from akd_dist.distill.metrics import measure, predictions
from akd_dist.distill.objectives import Stage, at_least_float32, label_losses, learning_rate, row_losses, stages
from akd_dist.distill.ranks import AgreedError, Ranks, told
from akd_dist.distill.stream import Batch
from akd_dist.models.build import build, num_parameters
from akd_dist.models.card import ModelCard
from akd_dist.models.device import autocast, generator_states, set_generator_states, weights_dtype
from akd_dist.models.folder import save_model
from akd_dist.tracking.status import read_metrics

EVALUATION_ROWS = 512  # fixed, so that evaluation gives the same bits everywhere
CPU = torch.device("cpu")
TEST_NAME = "test.parquet"
"""What student and teacher say of each test row, beside its label."""


class DivergedError(AgreedError):
    """The loss of a student is no longer a number."""


class Student:
    """The training state of one student.

    Args:
        spec: what the recipe says of it.
        card: its model for this dataset.
        folder: where its checkpoints, metrics and delivered model go.
        log: its log file.
        attempt: which attempt of the run this is; part of checkpoint names.
        group: the data-parallel ranks it is trained on; rank 0 alone writes.
        writer: what rank 0 writes through, so that a later worker can shut it out; None where there can be no other.
        metric: what picks the best epoch of each stage; None takes the usual one of the task.
        device: where module, optimizer and batches lie.
        vouch: called before anything is published that depends on rows or logits: returns once these are known to be
            what was prepared and decoded, see `_Lockstep.vouch`, or raises.
    """

    def __init__(
        self,
        spec: recipe.StudentSpec,
        card: ModelCard,
        folder: Path,
        *,
        log: Path,
        attempt: int = 1,
        group: Ranks | None = None,
        writer: FencedWriter | None = None,
        metric: recipe.Metric | None = None,
        device: torch.device = CPU,
        vouch: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.spec, self.card, self.folder, self.attempt, self.vouch = spec, card, folder, attempt, vouch
        self.metric, self.device = metric, device
        self.group, self.writer = group or Ranks(), writer or FencedWriter()
        self.log = self.group.log_beside(log)
        self.stages, self.stage1 = stages(spec.objective), spec.stage1
        self.epoch = self.step = self.stage_index = 0
        self.loss_sum, self.loss_rows = 0.0, 0
        self.seconds = 0.0
        self.stage1_from: str | None = None
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.best_record: dict[str, Any] = {}
        self.result: dict[str, Any] | None = None
        self.module, self.rng = self.group.agree(self._initialise)
        self.optimizer, self.scaler = self._new_optimizer()
        self._forward: nn.Module = self.module
        if self.group.world > 1:
            self._forward = DistributedDataParallel(self.module)

    # ---- where it stands

    @property
    def training(self) -> bool:
        """Whether there are steps left to take."""
        return self.result is None

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.stage_index]

    @property
    def optimizer_spec(self) -> recipe.Optimizer:
        """The optimizer of the current stage, as the recipe describes it."""
        return self.stage.optimizer or self.spec.optimizer

    @property
    def not_started(self) -> bool:
        """Whether it stands where it was made."""
        return self.training and self.epoch == self.step == 0

    @property
    def epochs_shared(self) -> int:
        """Epochs that another student took for it."""
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

        The loss is weighted so that the gradient is that of the exact mean over the global batch: as
        DistributedDataParallel averages over ranks, each rank's sum is divided by the global rows and multiplied by the
        number of ranks.

        Raises:
            DivergedError: the loss is not finite; the weights are still those of the step before.
        """
        started = time.perf_counter()
        stage_step = self.stage_epoch * steps_per_epoch + self.step
        rate = learning_rate(
            self.optimizer_spec.lr, self.optimizer_spec.schedule, stage_step, self.stage.epochs * steps_per_epoch
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        with self._own_generator():
            total = self._agreed_loss(batch)
            value = float(total.detach())
            if self.group.any(not math.isfinite(value))[0]:
                value = self.group.sum(value)
                raise DivergedError(f"the loss is {value} in epoch {self.epoch}, step {self.step}, at lr {rate:g}")
            self._descend(total * self.group.world / batch.global_rows)
        self.loss_sum += value
        self.loss_rows += len(batch.rows)
        self.step += 1
        self.seconds += time.perf_counter() - started

    def _agreed_loss(self, batch: Batch) -> torch.Tensor:
        """The summed loss of this rank's rows."""

        def loss() -> torch.Tensor:
            with autocast(self.device, self.spec.precision):
                logits = self._logits(batch)
            return row_losses(self.stage, self.stage_epoch, logits, batch.logits, batch.labels).sum()

        return self.group.agree(loss)

    def _logits(self, batch: Batch) -> torch.Tensor:
        """What the student says of this rank's rows, [n, classes].

        A rank without rows takes part all the same. Many models cannot reshape a batch of none, so they see a spare
        row, of which nothing is kept and whose gradient is zero. With batch norm it would move the statistics.
        """
        if batch.spare is None or has_batch_norm(self.module):
            return self._forward(batch.inputs)  # type: ignore[no-any-return]
        return self._forward(batch.spare)[:0]  # type: ignore[no-any-return]

    def _descend(self, loss: torch.Tensor) -> None:
        """One step down the gradient of the global batch.

        After the backward pass every rank holds that gradient, so its norm is the same on all of them.
        """
        clip = self.optimizer_spec.clip
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def end_epoch(self, validation: Rows) -> dict[str, Any]:
        """Validate, remember the best weights of the stage, and move on to the next epoch or stage.

        Returns:
            The epoch's record, a line of metrics.jsonl.

        Raises:
            DivergedError: the validation loss is not finite.
        """
        started = time.perf_counter()
        # One rank's numbers for all: ranks that chose different best weights would train different models.
        metrics: dict[str, float] = self.group.from_first(self._evaluate(validation)[0])
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
            "train_loss": self.group.sum(self.loss_sum) / self.group.sum(self.loss_rows),
            "validation": metrics,
            "seconds": round(self.seconds + time.perf_counter() - started, 3),
        }
        self.history.append(record)
        metric = self.metric or recipe.METRICS[validation.task][0]
        if self.best is None or metrics[metric] > self.best_record["validation"][metric]:
            self.best, self.best_record = copy_of(self.module.state_dict()), record
        self.epoch, self.step, self.loss_sum, self.loss_rows = self.epoch + 1, 0, 0.0, 0
        if epoch + 1 == stage.epochs and self.stage_index + 1 < len(self.stages):
            self._begin_stage(self.stage_index + 1, self.best)
        self.seconds += time.perf_counter() - started
        failpoint("student.before_metrics")
        self._write_metrics()
        return record

    def _begin_stage(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Start a stage from the best validation weights of the one before, with a fresh optimizer and seed."""
        self.module.load_state_dict(weights)
        self.group.share_state(self.module)
        failpoint("student.between_stages")
        self.stage_index, self.best, self.best_record = index, None, {}
        self.optimizer, self.scaler = self._new_optimizer()
        self.rng = seeded_states(self.device, self.spec.seed, index, self.group.rank)

    def fork_from(self, leader: Student) -> None:
        """Enter stage II beside another student, which has just entered it: stage I would have been the same.

        What is taken over is in a checkpoint before this returns; without it, stage I would have to be trained again.
        """
        self.stage1_from = leader.spec.name
        self.epoch, self.history = leader.epoch, list(leader.history)
        self._begin_stage(leader.stage_index, leader.module.state_dict())
        self._write_metrics()
        self.note(f"goes on from the stage I of {self.stage1_from}, which would have been the same")
        self.save(self.vouch())

    def keep_initial(self, validation: Rows) -> None:
        """Where there are no epochs to choose from, the weights as they were made are the best."""
        metrics = self.group.from_first(self._evaluate(validation)[0])
        self.best, self.best_record = copy_of(self.module.state_dict()), {"validation": metrics}

    # ---- the end

    def finish(self, test: Rows, teacher_said: np.ndarray | None) -> None:
        """Deliver the best weights of the last stage and measure them on the test rows, once.

        Args:
            teacher_said: what the teacher says of each test row, as `metrics.predictions`; None without a teacher.
        """
        assert self.best is not None
        self.module.load_state_dict(self.best)
        metrics, chosen = self._evaluate(test)
        agreement = None
        if teacher_said is not None and test.task == "classification":
            agreement = float(np.mean(chosen == teacher_said))
        self.vouch()
        if self.group.rank == 0:
            failpoint("student.before_model")
            save_model(self.folder, self.module, self.card, write=self.writer.replace)
            columns = {
                "row": np.arange(len(test)),
                "label": np.array(test.labels),
                "student": chosen,
                "teacher": teacher_said,
            }
            self.writer.replace(self.folder / TEST_NAME, encode_predictions(columns))
        self._conclude(
            "done",
            None,
            test={name: value for name, value in metrics.items() if math.isfinite(value)},  # JSON has no infinite loss
            validation=self.best_record["validation"],
            agreement=agreement,
        )

    def fail(self, error: Exception) -> None:
        """End this student as `diverged` or `failed`; its last good checkpoint stays."""
        self.vouch()  # wrong bytes are no fault of its own
        state = "diverged" if isinstance(error, DivergedError) else "failed"
        reason = str(error) if state == "diverged" else told(error)
        write_note(self.log, "".join(traceback.format_exception(error)))
        self._conclude(state, reason)

    def _conclude(self, state: str, reason: str | None, **measured: Any) -> None:
        self.result = entry(self.spec, state, reason, self.folder, self.attempt) | {
            "parameters": num_parameters(self.module),
            "epochs": self.epoch,
            "seconds": round(self.seconds, 3),
            "stage1_from": self.stage1_from,
            **measured,
        }
        self.note(f"{state}: {reason or measured.get('test')}")
        if self.group.rank == 0:
            self._write_metrics(durable=True)
            failpoint("student.before_result")
            self.writer.replace(self.folder / "result.json", json.dumps(self.result, indent=1).encode())
            failpoint("student.after_result")
        # What is told of it stays; its memory is left to the others of this worker.
        del self._forward, self.module, self.optimizer, self.scaler
        self.best = None

    # ---- to disk and back

    def save(self, rests_on: str | None = None) -> None:
        """Checkpoint everything that the next step depends on. Every rank calls it; rank 0 writes.

        Args:
            rests_on: what `vouch` returned since the last step: None where all bytes behind it were hashed after it,
                else the mark of the files that they lie in.
        """
        states = [self.group.gather(state) for state in self.rng]
        losses = self.group.gather(torch.tensor([self.loss_sum, self.loss_rows], dtype=torch.float64))
        if self.group.rank != 0:
            return
        tree = {
            "epoch": self.epoch,
            "step": self.step,
            "stage_index": self.stage_index,
            "losses": losses,
            "seconds": self.seconds,
            "stage1_from": self.stage1_from,
            "rests_on": rests_on,
            "history": self.history,
            "best": self.best,
            "best_record": self.best_record,
            "rng": states,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        name = f"{self.epoch:06d}-{self.step:08d}-{self.attempt:04d}"
        save_checkpoint(self.folder / "checkpoints", name, tree, self.writer)

    def resume(self) -> bool:
        """Take up the newest intact checkpoint; False where there is none."""
        tree = self._newest_checkpoint()
        if tree is None:
            self._write_metrics()
            return False
        self.epoch, self.step, self.stage_index = tree["epoch"], tree["step"], tree["stage_index"]
        self.loss_sum, rows = tree["losses"][self.group.rank].tolist()
        self.loss_rows = int(rows)
        self.seconds, self.history, self.stage1_from = tree["seconds"], tree["history"], tree["stage1_from"]
        self.best, self.best_record = tree["best"], tree["best_record"]
        self.rng = [ranks[self.group.rank] for ranks in tree["rng"]]
        self.module.load_state_dict(tree["module"])
        self.optimizer, self.scaler = self._new_optimizer()
        self.optimizer.load_state_dict(tree["optimizer"])
        self.scaler.load_state_dict(tree["scaler"])
        self._write_metrics()  # without the epochs after the checkpoint: they are trained again
        self.note(f"resumed at epoch {self.epoch}, step {self.step}")
        return True

    def _newest_checkpoint(self) -> Any | None:
        """The tree of the checkpoint that rank 0 chooses: it alone looks for damage, and sets aside what is damaged."""
        folder, first = self.folder / "checkpoints", self.group.rank == 0
        found = self.group.agree(lambda: newest_checkpoint(folder, self.writer, self.note) if first else None)
        name = self.group.from_first(found and found[0].name)
        if name is None:
            return None
        return self.group.agree(lambda: found[1] if found else decode((folder / name).read_bytes(), folder / name))

    def _write_metrics(self, *, durable: bool = False) -> None:
        """All epochs so far, whole: a line that is added to a file may be cut, and may be added by a late worker."""
        if self.group.rank == 0:
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            self.writer.replace(self.folder / "metrics.jsonl", lines.encode(), durable=durable)

    def note(self, text: str) -> None:
        """Add a line to this student's log."""
        write_note(self.log, text)

    def _evaluate(self, rows: Rows) -> tuple[dict[str, float], np.ndarray]:
        with self._own_generator():  # some models draw numbers here as well
            return self.group.agree(lambda: evaluate(self.module, rows, self.device, self.spec.precision))

    def _new_optimizer(self) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
        """A fresh optimizer, and what keeps float16's small gradients above zero; elsewhere that does nothing."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.spec.precision == "float16")
        return make_optimizer(self.module, self.optimizer_spec), scaler

    # ---- its own randomness

    def _initialise(self) -> tuple[nn.Module, list[torch.Tensor]]:
        """The module from the student's seed, and the generator states that its first step starts with."""
        self.rng = seeded_states(self.device, self.spec.seed, 0, 0)
        with self._own_generator():
            module = build(self.card, pretrained=True)
        if self.spec.sync_batchnorm and self.group.world > 1:
            synchronise_batch_norms(module, self.group.go_on)
        first = self.group.rank == 0
        after = self.rng if first else seeded_states(self.device, self.spec.seed, 0, self.group.rank)
        return module.to(self.device, weights_dtype(self.spec.precision)), after

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


def seeded_state(seed: int, stage: int, rank: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """The state of a device's generator that a stage starts with: a function of (student seed, stage) and the rank."""
    digest = sha256(f"student {seed} stage {stage} rank {rank}".encode())  # ranks drop other units
    return torch.Generator(device).manual_seed(int(digest[:15], 16)).get_state()


def seeded_states(device: torch.device, seed: int, stage: int, rank: int) -> list[torch.Tensor]:
    """The states of all generators that computing on a device draws from, in the order of `generator_states`."""
    devices = dict.fromkeys(("cpu", device.type))
    return [seeded_state(seed, stage, rank, one) for one in devices]


def make_optimizer(module: nn.Module, spec: recipe.Optimizer) -> torch.optim.Optimizer:
    """A fresh optimizer. The fused kernels are several times faster on small models and just as deterministic."""
    if isinstance(spec, recipe.Sgd):
        return torch.optim.SGD(
            module.parameters(),
            lr=spec.lr,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            nesterov=spec.nesterov,
            fused=True,
        )
    return torch.optim.AdamW(
        module.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=True
    )


@torch.inference_mode()
def evaluate(
    module: nn.Module, rows: Rows, device: torch.device, precision: recipe.Precision = "float32"
) -> tuple[dict[str, float], np.ndarray]:
    """Every metric of the task (see `metrics.measure`) and the mean label loss of a module on rows, un-augmented.

    Args:
        module: on `device`, its weights in `weights_dtype(precision)`.

    Returns:
        The metrics with `loss`, mean cross-entropy or squared error; and what the module says of each row: the class,
        int64 [n], or for regression the number, float [n].
    """
    module.eval()
    loss, said = 0.0, []
    for start in range(0, len(rows), EVALUATION_ROWS):
        block = rows.read(start, min(start + EVALUATION_ROWS, len(rows)))
        inputs, labels = (torch.from_numpy(np.array(part)).to(device) for part in block)
        with autocast(device, precision):
            logits = module(inputs)
        logits = at_least_float32(logits)
        loss += float(label_losses(logits, labels).double().sum())
        said.append(predictions(rows.task, logits).cpu())
    together = torch.cat(said)
    metrics = measure(rows.task, together, torch.from_numpy(np.array(rows.labels)), rows.classes)
    return metrics | {"loss": loss / len(rows)}, together.numpy()


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that later steps do not change."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def entry(spec: recipe.StudentSpec, state: str, reason: str | None, folder: Path, attempt: int) -> dict[str, Any]:
    """A student's entry of fleet.json before anything of it was measured."""
    return {
        "name": spec.name,
        "model": spec.model.label,
        "parameters": None,
        "objective": spec.objective.kind,
        "tau_max": getattr(spec.objective, "tau_max", None),
        "seed": spec.seed,
        "state": state,
        "reason": reason,
        "epochs": 0,
        "validation": None,
        "test": None,
        "agreement": None,
        "seconds": 0.0,
        "stage1_from": None,
        "attempt": attempt,
        "path": ".",  # the student's folder, relative to the document in it
    }


def failed_entry(spec: recipe.StudentSpec, reason: str, folder: Path, attempt: int) -> dict[str, Any]:
    """The entry of a student that failed and cannot say how far it was: its folder does."""
    records = read_metrics(folder)
    seconds = records[-1]["seconds"] if records else 0.0
    known = {"epochs": len(records), "seconds": seconds, "stage1_from": forked_from(folder)}
    return entry(spec, "failed", reason, folder, attempt) | known


def forked_from(folder: Path) -> str | None:
    """Whose stage I a student went on from, by its newest checkpoint; None if by none's, or there is no checkpoint."""
    found = checkpoints(folder / "checkpoints")
    return read_header(found[-1]).get("stage1_from") if found else None


def drop_doubtful(folder: Path, writer: FencedWriter, mark: str | None = None) -> None:
    """Remove a student's checkpoints that rest on bytes of which nobody knows whether they were already wrong.

    Args:
        mark: of files that are still to be hashed: a checkpoint that rests on these very ones stays, since wrong bytes
            in them will be found. Any other cache entry, made since, says nothing of the bytes behind a checkpoint.
    """
    for path in checkpoints(folder / "checkpoints"):
        if read_header(path).get("rests_on") not in (None, mark):
            writer.remove(path)


def fail_from_outside(spec: recipe.StudentSpec, folder: Path, reason: str, attempt: int, writer: FencedWriter) -> None:
    """End a student as `failed` that could not be set up, or whose worker dies again and again: the others go on."""
    result = failed_entry(spec, reason, folder, attempt)
    writer.replace(folder / "result.json", json.dumps(result, indent=1).encode())


def write_note(log: Path, text: str) -> None:
    """Add a line with its time to a log."""
    append(log, f"{datetime.now():%Y-%m-%d %H:%M:%S} {text.rstrip()}\n")
