"""The contenders of `benchmarks/peers.py`: each writes the same rows in its own format, and streams them shuffled.

Each is used as its documentation recommends for speed, and gives batches of torch tensors: `row` int64 [n], `inputs`
uint8 [n, *shape], `labels` int64 [n] and `logits` [n, classes] as they are stored. A peer is imported only where it is
used, so those that are not installed are left out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from benchmarks.contender import NAMES, Contender, Content, Tensors

BUFFER = 8_192
"""Rows that are shuffled together where a contender shuffles in a buffer."""


class NumPy(Contender):
    """The floor: memory maps, and a permutation of row numbers."""

    packages = ("numpy",)
    workers = 0

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        super().__init__(folder, batch, workers)
        content = Content.load(folder)
        # As plain arrays, since `np.memmap` makes a new object of its class for whatever is taken from it.
        self.arrays = {name: np.asarray(getattr(content, name)) for name in NAMES}

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """Write it."""
        content.save(folder)

    def epoch(self, number: int) -> Iterator[Tensors]:
        """The batches of an epoch."""
        order = np.random.default_rng(number).permutation(len(self.arrays["row"]))
        for start in range(0, len(order), self.batch):
            picked = order[start : start + self.batch]
            yield {name: torch.from_numpy(array.take(picked, axis=0)) for name, array in self.arrays.items()}


class Ours(Contender):
    """This project: a sealed store and prepared rows, by `akd_dist.distillation_batches`.

    The store itself is made by `peers.py`, since it is where the content comes from.
    """

    packages = ("akd-dist",)
    imports = ("akd_dist.jobs.opening",)
    workers = 0

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        import akd_dist

        super().__init__(folder, batch, workers)
        self.batches = akd_dist.distillation_batches(
            folder / "recipe.yaml",
            batch=batch,
            store_root=folder / "stores",
            cache_root=folder / self._cache,
            console=None,
        )
        keep = workers > 0
        self.loader = DataLoader(self.batches, batch_size=None, num_workers=workers, persistent_workers=keep)

    _cache: ClassVar[str] = "cache"

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """Nothing to do."""

    def epoch(self, number: int) -> Iterator[Tensors]:
        """The batches of an epoch."""
        self.batches.set_epoch(number)
        return self._named()

    def state(self) -> Any:
        """The position of this process."""
        return self.batches.state_dict()

    def resumed(self, number: int, state: Any) -> Iterator[Tensors]:
        """The rest of an epoch."""
        self.batches.load_state_dict(state)
        return self._named()

    def _named(self) -> Iterator[Tensors]:
        for batch in self.loader:
            batch["logits"] = batch.pop("teacher_logits")
            yield batch


class OursOnNewNode(Ours):
    """The same where neither prepared rows nor decoded logits are there yet: both are made from data and store."""

    format = "akd-dist"
    _cache = "new-cache"


class OwnLoader(Contender):
    """A peer with a loader of its own, which counts epochs and keeps its position."""

    loader: Any

    def epoch(self, number: int) -> Iterator[Tensors]:
        """The batches of the epoch that is next."""
        yield from self.loader

    def state(self) -> Any:
        """The loader's."""
        return self.loader.state_dict()

    def resumed(self, number: int, state: Any) -> Iterator[Tensors]:
        """The rest of an epoch."""
        self.loader.load_state_dict(state)
        yield from self.loader


class LitData(OwnLoader):
    """litdata: chunks of whole rows, mapped in place; as it is by default, in-chunk blocks of 256 rows."""

    packages = ("litdata", "lightning-utilities")
    imports = ("litdata",)
    shuffle = "blocks of 256 rows, then rows within one"
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        import litdata

        super().__init__(folder, batch, workers)
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, seed=0, **self.settings)
        self.loader = litdata.StreamingDataLoader(
            dataset, batch_size=batch, num_workers=workers, persistent_workers=workers > 0
        )

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """By `optimize`, which is what its documentation begins with."""
        import litdata

        litdata.optimize(content.at, list(range(len(content))), str(folder), chunk_bytes="64MB", num_workers=2)


class LitDataFull(LitData):
    """The same, with the rows of a whole chunk shuffled together, and decoded one by one: not 256 for each."""

    shuffle = "chunks, then rows within one (64 MB)"
    settings: ClassVar[dict[str, Any]] = {"item_shuffle_window": "full", "batch_decode": 0}
    format = "litdata"


class Streaming(OwnLoader):
    """mosaicml-streaming: MDS shards, shuffled by its default algorithm, py1e, over 262,144 rows at a time."""

    packages = ("mosaicml-streaming", "torchvision", "xxhash")
    imports = ("streaming",)
    shuffle = "global (py1e, blocks of 262,144 rows)"

    @classmethod
    def load(cls) -> None:
        """Import it, and so torchvision, of which it uses nothing for arrays.

        A build of torchvision for CUDA does not find its operators beside torch for CPUs, and is not imported unless
        somebody has declared them.
        """
        found = importlib.util.find_spec("torchvision")
        assert found is not None
        assert found.origin is not None
        try:
            torch.ops.load_library(next(Path(found.origin).parent.glob("_C*.so")))  # type: ignore[no-untyped-call]
        except OSError:
            for name in ("nms", "qnms"):
                torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        super().load()

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        import streaming

        super().__init__(folder, batch, workers)
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=0, batch_size=batch)
        self.loader = streaming.StreamingDataLoader(
            dataset, batch_size=batch, num_workers=workers, persistent_workers=workers > 0
        )

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """By its writer, with shape and dtype of arrays in the schema, so that rows do not repeat them."""
        import streaming

        def kind(array: np.ndarray) -> str:
            return f"ndarray:{array.dtype.name}:{','.join(map(str, array.shape[1:]))}"

        columns = {"row": "int", "inputs": kind(content.inputs), "labels": "int", "logits": kind(content.logits)}
        with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
            for row in range(len(content)):
                writer.write(content.at(row))


class Arrow(Contender):
    """datasets, map-style: mapped Arrow files, of which whole batches are taken by their row numbers.

    In its format "torch" whole numbers become int64 and the rest float32, at a tenth of this speed: tables of Arrow
    become tensors here without such a detour.
    """

    packages = ("datasets",)
    imports = ("datasets",)
    workers = 0

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        import datasets

        super().__init__(folder, batch, workers)
        self.dataset = datasets.load_from_disk(str(folder)).with_format("arrow")

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """Columns of a fixed shape, so that a batch is copied whole, and sixteen files."""
        import datasets
        import pyarrow as pa

        columns = [getattr(content, name) for name in NAMES]
        arrays = [pa.array(np.asarray(one).reshape(-1)) for one in columns]
        fixed = [
            flat if one.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, one[0].size)
            for one, flat in zip(columns, arrays, strict=True)
        ]
        datasets.Dataset(pa.table(fixed, names=list(NAMES))).save_to_disk(str(folder), num_shards=16)
        (folder / "shape.json").write_text(json.dumps(content.inputs.shape[1:]))

    def epoch(self, number: int) -> Iterable[Tensors]:
        """The batches of an epoch."""
        rows = RandomSampler(self.dataset, generator=torch.Generator().manual_seed(number))
        return DataLoader(
            self.dataset,
            sampler=BatchSampler(rows, self.batch, drop_last=False),
            batch_size=None,
            num_workers=self.workers_used,
            collate_fn=self.tensors,
        )

    def tensors(self, table: Any) -> Tensors:
        """A table as tensors, with the pictures in shape."""
        found: Tensors = {}
        for name in NAMES:
            column = table[name].combine_chunks()
            fixed = hasattr(column.type, "list_size")
            flat = np.array((column.flatten() if fixed else column).to_numpy(zero_copy_only=True))
            found[name] = torch.from_numpy(flat.reshape(len(column), -1) if fixed else flat)
        found["inputs"] = found["inputs"].view(-1, *self.shape)
        return found

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """That of a picture."""
        return tuple(json.loads((self.folder / "shape.json").read_text()))


class ArrowStream(Arrow):
    """datasets, iterable: what its documentation recommends where a map-style one is too slow."""

    shuffle = f"files, then a buffer of {BUFFER:,} rows"
    format = "datasets"

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        super().__init__(folder, batch, workers)
        self.stream = self.dataset.to_iterable_dataset(num_shards=16).shuffle(seed=0, buffer_size=BUFFER)

    def epoch(self, number: int) -> Iterable[Tensors]:
        """The batches of an epoch."""
        self.stream.set_epoch(number)
        if not self.workers_used:
            return map(self.tensors, self.stream.iter(self.batch))
        return DataLoader(
            self.stream.batch(self.batch), batch_size=None, num_workers=self.workers_used, collate_fn=self.unbatched
        )

    def unbatched(self, table: Any) -> Tensors:
        """A table of one row, whose columns are lists of the batch's rows."""
        import pyarrow as pa

        return self.tensors(pa.table([table[name].combine_chunks().flatten() for name in NAMES], names=list(NAMES)))

    def state(self) -> Any:
        """The dataset's."""
        return self.stream.state_dict()

    def resumed(self, number: int, state: Any) -> Iterable[Tensors]:
        """The rest of an epoch."""
        self.stream.load_state_dict(state)
        return self.epoch(number)


class RayData(Contender):
    """Ray Data: Parquet files in a random order, then a buffer that is shuffled where batches are made."""

    packages = ("ray", "pyarrow")
    imports = ("ray.data",)
    shuffle = f"files, then a buffer of {BUFFER:,} rows"

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        import ray

        super().__init__(folder, batch, workers)
        ray.init("local", num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True  # else the order depends on which task ends first

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """Sixteen Parquet files with tensor columns, one for a block."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from ray.data.extensions import ArrowTensorArray

        folder.mkdir(parents=True)
        size = -(-len(content) // 16)
        for start in range(0, len(content), size):
            part = content.part(start, start + size)
            columns = [pa.array(one) if one.ndim == 1 else ArrowTensorArray.from_numpy(one) for one in part.values()]
            pq.write_table(pa.table(columns, names=list(part)), folder / f"{start:08}.parquet")

    def epoch(self, number: int) -> Iterable[Tensors]:
        """The batches of an epoch."""
        batches: Iterable[Tensors] = self._dataset(number).iter_torch_batches(
            batch_size=self.batch, local_shuffle_buffer_size=BUFFER, local_shuffle_seed=number, prefetch_batches=4
        )
        return batches

    def _dataset(self, number: int) -> Any:
        import ray

        shuffle = ray.data.FileShuffleConfig(seed=number, reseed_after_execution=False)
        return ray.data.read_parquet(str(self.folder), shuffle=shuffle)

    def close(self) -> None:
        """Stop the cluster."""
        import ray

        ray.shutdown()


class RayShuffle(RayData):
    """Ray Data, all rows shuffled with each other in every epoch."""

    shuffle = "global"
    format = "ray"

    def epoch(self, number: int) -> Iterable[Tensors]:
        """The batches of an epoch."""
        shuffled = self._dataset(number).random_shuffle(seed=number)
        batches: Iterable[Tensors] = shuffled.iter_torch_batches(batch_size=self.batch, prefetch_batches=4)
        return batches


class Zarr(Contender):
    """Plain Zarr: stretches of rows in a random order, as many at a time as make a buffer, read by a thread ahead."""

    packages = ("zarr",)
    imports = ("zarr",)
    workers = 1
    shuffle = f"stretches of 1,024 rows, then {BUFFER:,} rows"
    stretch: ClassVar[int] = 1_024

    def __init__(self, folder: Path, batch: int, workers: int) -> None:
        import zarr

        super().__init__(folder, batch, workers)
        group = zarr.open_group(folder, mode="r")
        self.arrays: dict[str, Any] = {name: group[name] for name in NAMES}

    @staticmethod
    def write(content: Content, folder: Path) -> None:
        """Chunks of 1,024 rows, sixteen in a shard, without compression: neither noise nor logits become smaller."""
        import zarr

        group = zarr.open_group(folder, mode="w")
        for name in NAMES:
            array = getattr(content, name)
            rest = array.shape[1:]
            made = group.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=(Zarr.stretch, *rest),
                shards=(16 * Zarr.stretch, *rest),
                compressors=None,
            )
            made[:] = np.asarray(array)

    def epoch(self, number: int) -> Iterator[Tensors]:
        """The batches of an epoch."""
        draw = np.random.default_rng(number)
        rows = self.arrays["row"].shape[0]
        starts = draw.permutation(np.arange(0, rows, self.stretch))
        at_once = BUFFER // self.stretch
        groups = [starts[first : first + at_once] for first in range(0, len(starts), at_once)]
        held: dict[str, np.ndarray] = {}
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._read, groups[0])
            for place in range(len(groups)):
                found = coming.result()
                if place + 1 < len(groups):
                    coming = pool.submit(self._read, groups[place + 1])
                held = {name: np.concatenate([held[name], found[name]]) for name in NAMES} if held else found
                order = draw.permutation(len(held["row"]))
                full = len(order) if place + 1 == len(groups) else len(order) // self.batch * self.batch
                for start in range(0, full, self.batch):
                    picked = order[start : min(start + self.batch, full)]
                    yield {name: torch.from_numpy(array.take(picked, axis=0)) for name, array in held.items()}
                held = {name: array.take(order[full:], axis=0) for name, array in held.items()}

    def _read(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        """Stretches, one after the other."""
        return {
            name: np.concatenate([array[start : start + self.stretch] for start in starts])
            for name, array in self.arrays.items()
        }


CONTENDERS: dict[str, type[Contender]] = {
    "numpy": NumPy,
    "akd-dist": Ours,
    "akd-dist, new node": OursOnNewNode,
    "zarr": Zarr,
    "datasets": Arrow,
    "datasets, iterable": ArrowStream,
    "litdata": LitData,
    "litdata, full": LitDataFull,
    "mosaicml-streaming": Streaming,
    "ray": RayData,
    "ray, random_shuffle": RayShuffle,
}
