"""A split with the teacher's logits as datasets of torch, for trainers that are not ours.

`DistillationDataset` is map-style: any row, alone or with others. `DistillationBatches` is iterable: whole batches, in
the order of our own training. Both are picklable: a DataLoader's worker maps the same files as the process that made
them, and copies none.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from akd_dist import recipe
from akd_dist.base.errors import RecipeError
from akd_dist.data.origins import SourceCheck
from akd_dist.data.row_fetch import rows_for
from akd_dist.data.rows import Rows
from akd_dist.distill.cohort import VOUCHED, check_fingerprints
from akd_dist.distill.orders import ALL, LABELLED, Mix
from akd_dist.distill.stream import BatchStream, Said
from akd_dist.recipe import LastBatch, NoAugmentation
from akd_dist.storage.content import Guard
from akd_dist.storage.decoded import StoredLogits
from akd_dist.storage.mean import AnyStore, StoreRef, open_logits
from akd_dist.storage.rows import SealedRows

Tensors = dict[str, torch.Tensor]
"""What a row or a batch is: `inputs` (of text `input_ids`, `attention_mask` and perhaps `token_type_ids`), `labels`,
`teacher_logits` where there are any, and `row`."""


@dataclass(frozen=True)
class DatasetJob:
    """What a process needs to open a split: small, picklable, every path absolute."""

    data: recipe.DataSpec
    """The dataset, prepared already."""
    split: recipe.Split
    """Which part of it."""
    fingerprints: dict[str, str]
    """The dataset fingerprint of each split, as they were when it was opened first."""
    cache_root: str
    """Prepared data and decoded stores of this node."""
    store: StoreRef | None
    """The store of the split's logits; None where there is none."""
    rows: SealedRows | None = None
    """Where the rows lie for every node; None where each prepares them."""
    batch: int = 1
    """Rows of a global batch, for batches in our order."""
    last_batch: LastBatch = "keep"
    """What becomes of a last batch that is not full."""
    window: int | None = None
    """Rows of a window of the shuffle; None shuffles globally, and holds all rows and a whole view of logits."""
    labelled: int | None = None
    """How many of a batch's train rows have labels, where some have none; all of them shows those with labels alone,
    and None takes the rows as they fall when all are shuffled together."""

    @property
    def views(self) -> int:
        """How many views the epochs go round: only train rows are augmented."""
        return self.data.views if self.split == "train" else 1

    def stream(self) -> tuple[BatchStream, AnyStore | None]:
        """The split as a stream, and the store; nothing of them is read yet.

        Raises:
            AkdError: rows or store are not there, are others, or have no room in the cache.
        """
        data = self.data.model_copy(update={"window": self.window})
        splits = rows_for(data, Path(self.cache_root), self.fingerprints, self.rows)
        check_fingerprints(self.fingerprints, splits)
        rows: Rows = getattr(splits, self.split)
        store = None if self.store is None else open_logits(self.store)
        logits = None
        if store is not None:
            logits = StoredLogits(
                store,
                Path(self.cache_root),
                self.views,
                beside=splits.held_bytes,
                windowed=self.window is not None,
                beside_windows=rows.moving is not None,
            )
        stream = BatchStream(
            rows,
            logits,
            data.augmentation if self.split == "train" else NoAugmentation(),
            seed=data.seed,
            views=self.views,
            batch=_counted("batch", self.batch, 1),
            last_batch=self.last_batch,
            window=self.window,
            mix=self._mix(rows),
        )
        return stream, store

    def _mix(self, rows: Rows) -> Mix:
        if self.labelled is None:
            return ALL
        labelled = _counted("labelled", self.labelled, 1, self.batch)
        if not rows.labelled or not rows.unlabelled:
            raise RecipeError(
                "the argument labelled is for rows of which some have a label and others have none",
                got=f"{rows.labelled:,} {self.split} rows with a label, {rows.unlabelled:,} without",
                expected="train rows of a recipe with `data.unlabelled`",
                next="leave out labelled",
            )
        return LABELLED if labelled == self.batch else Mix("all", labelled)


class Item(Mapping[str, torch.Tensor]):
    """One row of `Items`, cut out of them where it is asked for.

    By its class `default_collate` knows that it is part of a batch.
    """

    def __init__(self, tensors: Tensors, place: int) -> None:
        self._tensors, self._place = tensors, place

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name][self._place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Items(Sequence[Item]):
    """Rows that were gathered together, [n, ...] each: a batch for `collate`, a list of rows for everybody else."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["row"])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Items({name: values[place] for name, values in self.tensors.items()})
        return Item(self.tensors, range(len(self))[place])


def collate(rows: Sequence[Mapping[str, torch.Tensor]], *, collate_fn_map: object = None) -> Tensors:
    """Rows of a `DistillationDataset` as one batch, without a copy where they were gathered together.

    `default_collate` does the same, so a DataLoader needs no `collate_fn`; trainers with a collation of their own do.
    """
    return rows.tensors if isinstance(rows, Items) else cast(Tensors, default_collate([dict(row) for row in rows]))


default_collate_fn_map[Item] = collate


class _Opened:
    """A split as one process has it mapped."""

    def __init__(self, job: DatasetJob) -> None:
        self.process, self._cache_root = os.getpid(), Path(job.cache_root)
        self.stream, self._store = job.stream()
        self._held: tuple[int, Any] | None = None
        self._guard: Guard | None = None
        self._sources = SourceCheck({}, lambda: None)

    def check(self, sources: SourceCheck) -> None:
        """Compare probe views with what the teacher saw; hash what is read in the background, from now on."""
        for manifest in () if self._store is None else self._store.manifests:
            self.stream.check_probes(manifest, self._cache_root)
        contents = [self.stream.rows.content()] if self.stream.rows.held else []
        self._guard, self._sources = Guard(contents, self._cache_root / VOUCHED), sources
        for one in self.stream.moving:
            one.watch(self._guard)
        sources.begin()

    def look(self) -> None:
        """Refuse to go on if it is known by now that something was not what it should be."""
        if self._guard is not None:
            self._guard.look()
        self._sources.look()

    def verify(self) -> None:
        """The same, once everything is known."""
        if self._guard is not None:
            self._guard.vouch()
        self._sources.finish()

    def hold(self, view: int) -> Any:
        """The logits of a view, at hand as a whole."""
        if self._held is None or self._held[0] != view:
            self._held = view, self.stream.hold(view)
        return self._held[1]

    def close(self) -> None:
        """End the threads."""
        if self.process == os.getpid():
            if self._guard is not None:
                self._guard.__exit__()
            for one in self.stream.moving:
                one.close()


_OF_PARENTS: list[object] = []


class _Split:
    """A split that each process maps for itself: what both datasets share."""

    def __init__(self, job: DatasetJob, epoch: int = 0, start_step: int = 0) -> None:
        self.job = job
        begins = [_counted("epoch", epoch), _counted("start_step", start_step)]
        # In memory that the workers of a DataLoader share, so that one that lives on sees the next epoch.
        self._begins: torch.Tensor = torch.tensor(begins).share_memory_()  # type: ignore[no-untyped-call]
        self._opened: _Opened | None = None

    def open(self, sources: SourceCheck | None = None) -> Self:
        """Map everything and check it, in the process whose workers get their rows from the same files.

        Args:
            sources: files that the rows are believed to be made from, read from now on in the background.

        Raises:
            RefusedError: a probe view does not show what the teacher saw.
            DamagedError: the store is not what was sealed.
            MachineError: the cache has no room for what is read.
        """
        opened = self._here
        opened.check(sources or SourceCheck({}, lambda: None))
        weakref.finalize(self, opened.close)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.job.split} rows, epoch {self.epoch})"

    @property
    def epoch(self) -> int:
        """The epoch that is shown: train rows in its view, the epoch modulo the number of views."""
        return int(self._begins.numpy()[0])  # a tensor's own item takes ten times as long

    @property
    def rows(self) -> Rows:
        """The rows themselves: shape, classes, their names, what token ids mean, the fingerprint."""
        return self._here.stream.rows

    def verify(self) -> None:
        """Return once all that this process has read is known to be what was written; else refuse, as training does.

        Raises:
            CorruptCacheError: prepared rows or decoded logits are not what was written. They were removed from the
                cache, and the same program makes them anew.
            RefusedError: a file of the data has changed since its rows were prepared.
        """
        self._here.verify()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @property
    def _here(self) -> _Opened:
        # A worker that was forked maps for itself: threads and locks are its parent's, and so that nothing of them is
        # touched, what it inherited stays as it is.
        if self._opened is None or self._opened.process != os.getpid():
            _OF_PARENTS.append(self._opened)
            self._opened = _Opened(self.job)
        return self._opened


class DistillationDataset(_Split, Dataset[Tensors]):
    """Rows of a split as the epoch's view shows them, with the teacher's logits of that view: made by
    `akd_dist.distillation_dataset`.

    `dataset[row]` is one row; `dataset[[row, ...]]` a whole batch, [n, ...] each. Of each row: `inputs` as they are
    stored (uint8, float32; images are [channels, height, width], not normalised), of text instead `input_ids`,
    `attention_mask` and where the tokenizer has them `token_type_ids`, int64 [length]; `labels`, int64, or float32 for
    regression, and -1 or NaN where a train row has none; `teacher_logits` [classes] where there is a store, as stored:
    float32, or float16 where `cache.encoding` says so; and `row`, its number, int64.
    """

    collate = staticmethod(collate)
    """For trainers that collate rows by a function of their own: a batch that was gathered whole stays one."""

    def open(self, sources: SourceCheck | None = None) -> Self:
        """As `_Split.open`, with the view's logits at hand."""
        super().open(sources)
        self._here.hold(self.view)
        return self

    @property
    def view(self) -> int:
        """The view that is shown."""
        return self.epoch % self.job.views

    def set_epoch(self, epoch: int) -> None:
        """Show another epoch's view, here and in workers that live on, from the next batch on.

        Raises:
            AkdError: it is known by now that what was read is not what was written, or the view's logits cannot be
                read.
        """
        self._begins[0] = _counted("epoch", epoch)
        # Here and not in a worker, so that its refusal is told as it is.
        self._here.look()
        self._here.hold(self.view)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensors:
        numbers = _numbers(rows, len(self))
        if numbers.ndim == 0:
            return {name: values[0] for name, values in self._tensors(numbers[None]).items()}
        return self._tensors(numbers)

    def __getitems__(self, rows: Sequence[int]) -> Items:
        """Several rows, gathered at once: what a DataLoader asks for."""
        return Items(self._tensors(_numbers(rows, len(self))))

    def _tensors(self, numbers: np.ndarray) -> Tensors:
        here, view = self._here, self.view
        stream, rows = here.stream, numbers
        if numbers.ndim != 1 or (numbers.size and numbers.min() < 0):
            numbers = _from_the_start(numbers, len(stream.rows))
        try:
            gathered = stream.gather(numbers, view, here.hold(view))
        except IndexError:
            raise IndexError(f"rows {rows} of {len(stream.rows):,}") from None
        return named_tensors(stream.rows, numbers, *gathered)


class DistillationBatches(_Split, IterableDataset[Tensors]):
    """A split as whole batches, in the order, for the ranks and from the position of our own training: made by
    `akd_dist.distillation_batches`, for `DataLoader(..., batch_size=None)`.

    A batch has what a row of `DistillationDataset` has, [n, ...] each; the share of a rank may have no rows. With
    several workers batches keep their order, and each comes once. `state_dict` and `load_state_dict` hold the position,
    as torchdata's StatefulDataLoader asks for it in whichever process iterates.

    Args:
        job: what is read; its `batch` and `window` decide the order.
        rank, world: which share of each global batch: the slices of all ranks, one after the other, are the batch.
        start_step: the step, from 0, with which the first epoch begins.
    """

    def __init__(self, job: DatasetJob, epoch: int = 0, rank: int = 0, world: int = 1, start_step: int = 0) -> None:
        super().__init__(job, epoch, start_step)
        self._world = _counted("world", world, 1)
        self._rank = _counted("rank", rank, most=world - 1)
        self._next: int | None = None
        self._resumed: int | None = None

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Begin another epoch, here and in workers that live on, when batches are asked for next.

        Raises:
            AkdError: it is known by now that what was read is not what was written.
        """
        self._begins[0], self._begins[1] = _counted("epoch", epoch), _counted("start_step", start_step)
        self._next = None
        self._here.look()

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch, and the step of the batch that this process gives next."""
        return {"epoch": self.epoch, "step": int(self._begins[1]) if self._next is None else self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position, when batches are asked for next."""
        self._begins[0] = _counted("epoch", state["epoch"])
        self._next = self._resumed = _counted("step", state["step"])

    def __len__(self) -> int:
        return self._here.stream.steps_per_epoch

    def __iter__(self) -> Iterator[Tensors]:
        stream, info = self._here.stream, get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # A position that was loaded is that of this very worker.
        first, self._resumed = self._resumed, None
        first = int(self._begins[1]) + worker if first is None else first
        for batch in stream.batches(self.epoch, first, self._rank, self._world, stride=workers):
            self._next = batch.step + workers
            yield named_tensors(stream.rows, batch.rows, batch.inputs, batch.labels, batch.logits)
        self._next = None


def named_tensors(
    rows: Rows, numbers: np.ndarray, inputs: torch.Tensor, labels: torch.Tensor, logits: Said | None
) -> Tensors:
    """What trainers get of some rows."""
    found = {"inputs": inputs} if rows.tokens is None else _of_text(inputs, rows.tokens.padding)
    found["labels"] = labels
    if isinstance(logits, torch.Tensor):  # a store that describes them is refused before
        found["teacher_logits"] = logits
    found["row"] = torch.from_numpy(numbers)
    return found


def _from_the_start(numbers: np.ndarray, count: int) -> np.ndarray:
    """Row numbers of which some are counted from the end, as numbers from the first row on."""
    if numbers.ndim != 1 or (numbers.size and numbers.min() < -count):
        raise IndexError(f"rows {numbers.tolist()} of {count:,}")
    return np.where(numbers < 0, numbers + count, numbers)


def _numbers(rows: Any, count: int) -> np.ndarray:
    """Row numbers as somebody asks for them, one or several: int64.

    Raises:
        TypeError: they are no whole numbers; a mask, for example, would be taken for rows 0 and 1.
    """
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count))
    numbers = np.asarray(rows)
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise TypeError(
            f"rows are taken by their numbers, and these are of {numbers.dtype}; of a mask, give its nonzero()"
        )
    return numbers.astype(np.int64, copy=False)


def _of_text(inputs: torch.Tensor, padding: int) -> Tensors:
    """Ids int32 [n, length], or [n, 2, length] with token types in the second row, as models of text take them."""
    ids, *types = [inputs] if inputs.dim() == 2 else inputs.unbind(dim=1)
    found = {"input_ids": ids.long(), "attention_mask": (ids != padding).long()}
    return found | ({"token_type_ids": types[0].long()} if types else {})


def _counted(name: str, value: object, least: int = 0, most: int | None = None) -> int:
    """A whole number within its range.

    Raises:
        RecipeError: it is none.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or cast(int, value) < least or (most is not None and cast(int, value) > most):
        raise RecipeError(
            f"the argument {name} is not what it takes",
            got=repr(value),
            expected=f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}",
        )
    return int(cast(int, value))
