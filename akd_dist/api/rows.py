"""The verbs that hand rows and stored logits to trainers of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from akd_dist.api.base import taking
from akd_dist.options import BatchesOptions, DatasetOptions, RayDatasetOptions, SplitOptions

if TYPE_CHECKING:
    from akd_dist.data.source_rows import SourceRows
    from akd_dist.distill.dataset import DistillationBatches, DistillationDataset
    from akd_dist.jobs.ray_data import Dataset
    from akd_dist.storage.reader import LogitStore


def open_store(store: str | Path, *, store_root: str | Path | None = None) -> LogitStore:
    """Open a sealed store, its presence and sizes checked: `.rows(view, start, stop)` -> float32 [n, classes].

    Args:
        store: its folder or `s3://` URI, at whose end the id may be shortened; or its id alone, shortened or not.
        store_root: where an id alone is looked for: a folder or `s3://` URI; None takes $AKD_DIST_STORE_ROOT, or
            `stores`.

    Raises:
        RefusedError: there is no store, or it is not sealed; or several ids begin so.
        DamagedError: it is not what was sealed.
    """
    from akd_dist.storage.catalog import locate
    from akd_dist.storage.reader import open_store

    return open_store(locate(store, store_root))


@taking(DatasetOptions)
def distillation_dataset(options: DatasetOptions) -> DistillationDataset:
    """A split of a recipe or a run with the teacher's stored logits, as a map-style dataset of torch.

        loader = DataLoader(akd_dist.distillation_dataset("digits.yaml"), batch_size=256, shuffle=True)

    For trainers of your own, of Hugging Face or Lightning; see docs/howto/trainers.md. Rows are prepared on this
    machine if they are not yet; the teacher never runs, and neither does Ray. Its arguments are the fields of
    `akd_dist.options.DatasetOptions`.

    Raises:
        AkdError: a refusal: there is no sealed store of train rows, rows or pixels are not those that the teacher saw,
            or the cache has no room for all rows and a view of logits.
    """
    from akd_dist.jobs.opening import open_dataset

    return open_dataset(options)


@taking(BatchesOptions)
def distillation_batches(options: BatchesOptions) -> DistillationBatches:
    """The same as an iterable of whole batches, in the order of our own training, by rank and from a position.

        loader = DataLoader(akd_dist.distillation_batches("digits.yaml", batch=256), batch_size=None)

    Rows that the cache has no room for are read window by window, as training does. The arguments are the fields of
    `akd_dist.options.BatchesOptions`.

    Raises:
        AkdError: as `distillation_dataset`.
    """
    from akd_dist.jobs.opening import open_batches

    return open_batches(options)


@taking(RayDatasetOptions)
def ray_dataset(options: RayDatasetOptions) -> Dataset:
    """The teacher's logits as a dataset of Ray Data, read shard by shard where its tasks run.

    Of a store: `view`, `row` and `logits`, all views. Of a recipe or a run also what a row of `distillation_dataset`
    has, as each view shows it, with the logits as `teacher_logits`. Every node has to see the store, and the data. Its
    arguments are the fields of `akd_dist.options.RayDatasetOptions`.

    Raises:
        AkdError: a refusal: there is no sealed store; Ray Data is not installed, or no cluster answers.
    """
    from akd_dist.jobs.ray_data import ray_dataset

    return ray_dataset(options)


@taking(SplitOptions)
def source_rows(options: SplitOptions) -> SourceRows:
    """Which row of which file each row of a split was: `.where(row)` -> (file, row in it, or key in a tar file).

    Rows of a split are counted as in stores, datasets and predictions. Its arguments are the fields of
    `akd_dist.options.SplitOptions`.

    Raises:
        AkdError: a refusal: the recipe, or a source that cannot be opened.
    """
    from akd_dist.jobs.opening import source_rows_of

    return source_rows_of(options)
