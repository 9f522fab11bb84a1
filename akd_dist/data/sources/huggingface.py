"""A dataset of the `datasets` library: its Arrow table, so that nothing is decoded but by us."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data import hub
from akd_dist.data.blocks import Block
from akd_dist.data.parquet_files import nothing_at
from akd_dist.data.schemas import check_schema
from akd_dist.data.sources.base import Source, no_rows, row_of, slices, stats_of
from akd_dist.data.sources.tables import columns_of, columns_of_table, source_of_table


class HuggingFaceSource:
    """A dataset of the `datasets` library: its Arrow table, so that nothing is decoded but by us."""

    def __init__(self, spec: recipe.HuggingFaceData) -> None:
        self.spec = spec
        self.name = str(spec.path or spec.name) + (f" [{spec.split}]" if spec.split else "")

    def key(self) -> dict[str, Any]:
        """By name, the name alone: the hub is not asked again once the rows are prepared."""
        files = [] if self.spec.path is None else sorted(one for one in self._folder().rglob("*") if one.is_file())
        return {**self.spec.model_dump(mode="json"), "files": stats_of(files)}

    def open(self) -> Source:
        """Look at the rows, without reading them."""
        dataset = self._from_folder() if self.spec.path is not None else self._from_hub()
        schema = dataset.features.arrow_schema
        check_schema(schema, self.spec, self.name)
        rows: int = len(dataset)

        def blocks(spec: recipe.Table, most: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
            # As Arrow, since in any other format the library decodes images and casts numbers by rules of its own.
            chosen = dataset.select_columns(columns_of(spec)).with_format("arrow")

            def read(first: int, last: int) -> tuple[list[Any], Any]:
                try:
                    table = chosen[first:last]
                except (pa.ArrowException, OSError) as error:
                    raise self._refused(error) from error
                return columns_of_table(spec, table)

            return slices(rows, read, most, start, stop)

        return source_of_table(self.spec, self.name, rows, blocks, row_of(self.name), schema)

    def _folder(self) -> Path:
        folder = Path(self.spec.path or "")
        if "://" in str(self.spec.path):
            raise RefusedError(
                f"datasets of the library are not read from {self.spec.path}",
                got="a URI",
                expected="a folder of each node",
                next="write it as Parquet, which is read from s3:// and gs:// (kind: parquet), or copy the folder",
            )
        if not folder.is_dir():
            raise nothing_at(folder, "dataset", "a folder that save_to_disk wrote")
        return folder

    def _from_folder(self) -> Any:
        datasets = hub.require_extra("datasets")
        folder = self._folder()
        try:
            found = datasets.load_from_disk(str(folder))
        except IndexError as error:  # what the library says of a dataset without rows
            raise no_rows(self.name) from error
        except Exception as error:  # of many kinds: whatever a damaged folder leads to
            raise self._refused(error) from error
        splits = dict(found) if isinstance(found, datasets.DatasetDict) else {str(found.split or "train"): found}
        if self.spec.split is None and len(splits) == 1:
            return next(iter(splits.values()))
        if self.spec.split not in splits:
            raise RefusedError(
                f"{folder} holds several splits" if self.spec.split is None else f"{folder} has no such split",
                got=self.spec.split or "no `split` in the recipe",
                expected=f"one of {', '.join(splits)}",
                next="correct `split` in the recipe",
            )
        return splits[self.spec.split]

    def _from_hub(self) -> Any:
        datasets = hub.require_extra("datasets")
        name = str(self.spec.name)
        hub.reach("dataset", name)
        try:
            return datasets.load_dataset(name, self.spec.config, split=self.spec.split)
        except ConnectionError as error:
            raise hub.unreachable("dataset", name, error) from error
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> RefusedError:
        return RefusedError(
            f"{self.name} cannot be read as a Hugging Face dataset",
            got=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            expected="a folder that save_to_disk wrote, or a dataset with such a configuration and split",
            next="check that it was copied whole, and `config` and `split` in the recipe",
        )
