"""What a user names to run a model on: Parquet, a folder of pictures, or tar files of them; here or in a bucket."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.data.folder_walk import is_leftover
from akd_dist.data.parquet_files import SKIPPED_PREFIXES, is_skipped, may_be_parquet
from akd_dist.data.picture_files import TABLES, find_pictures, is_picture
from akd_dist.data.sources.parquet import column_names
from akd_dist.data.tar_shards import find_shards, open_shard, read_samples
from akd_dist.storage.objects import ObjectMissing
from akd_dist.storage.remote import files_below, is_remote
from akd_dist.storage.roots import open_root

Holds = Literal["parquet", "pictures", "shards"]
Spec = TypeVar("Spec", bound=recipe.Spec)
_ADVICE = {
    "parquet": "check the path, and name the columns with --input and --label",
    "pictures": "check the path; labels are folders that are called as classes, or a metadata.csv with the columns "
    "file_name and label in the folder; or name a recipe, whose `labels` may lie anywhere",
    "shards": "check the path, and name the label with --label: cls, or a key of key.json",
}


@dataclass(frozen=True)
class NamedData:
    """Rows at a path, and what they are."""

    path: str
    holds: Holds

    @property
    def advice(self) -> str:
        """What to do where they cannot be read."""
        return _ADVICE[self.holds]

    def spec(
        self,
        run: recipe.Recipe | None,
        class_names: Sequence[str] | None,
        columns: tuple[str, ...],
        label: str | None,
        need_labels: bool,
    ) -> recipe.Source:
        """The source that they are, as a recipe would name it.

        Args:
            run: the recipe of the model's run, which tells how labels are called.
            class_names: those that the model knows.
            columns: of inputs, as the user names them.
            label: as the user names it; empty for none.
            need_labels: whether rows without labels are of no use; else labels are read where they are found.

        Raises:
            RecipeError: options that do not go together.
            RefusedError: they cannot be read.
        """
        if self.holds == "parquet":
            return self._parquet(run, columns, label, need_labels)
        if columns:
            raise RecipeError("--input names columns of Parquet", got=f"{self.path}: {self.holds}", next="leave it out")
        found = self._pictures if self.holds == "pictures" else self._shards
        return found(run, class_names, label, need_labels)

    def _parquet(
        self, run: recipe.Recipe | None, columns: tuple[str, ...], label: str | None, need_labels: bool
    ) -> recipe.Parquet:
        """Which columns are read: those asked for, else those of the run's recipe, else `input` and `label`."""
        known = _first(run, recipe.Table) or recipe.Table()
        wanted = known.label if label is None else label
        if label is None and not need_labels and wanted not in column_names(self.path):
            wanted = ""
        return recipe.Parquet(path=self.path, input=_one_or_two(columns) if columns else known.input, label=wanted)

    def _pictures(
        self, run: recipe.Recipe | None, class_names: Sequence[str] | None, label: str | None, need_labels: bool
    ) -> recipe.ImageFolder:
        """Labels are those of a table beside the pictures, or folders that are called as the model's classes."""
        known = _first(run, recipe.ImageFolder) or recipe.ImageFolder(path="")
        found = find_pictures(self.path)
        if not any(name in found.others for name in TABLES):
            known = recipe.ImageFolder(path="")
        wanted = known.label if label is None else label
        if label is None and not need_labels:
            folders = {name.partition("/")[0] if "/" in name else None for name in found.names}
            if not any(name in found.others for name in TABLES) and not folders <= set(class_names or ()):
                wanted = ""
        return recipe.ImageFolder(path=self.path, file=known.file, label=wanted)

    def _shards(
        self, run: recipe.Recipe | None, class_names: Sequence[str] | None, label: str | None, need_labels: bool
    ) -> recipe.WebDataset:
        """Labels are read where the first sample has one."""
        known = _first(run, recipe.WebDataset) or recipe.WebDataset(path="")
        wanted = known.label if label is None else label
        if label is None and not need_labels:
            shard = find_shards(self.path).files[0]
            with open_shard(shard) as opened:
                first = next(read_samples(opened, shard), None)
            if first is None or ("cls" if wanted == "cls" else "json") not in first.others:
                wanted = ""
        return recipe.WebDataset(path=self.path, label=wanted)


def _first(run: recipe.Recipe | None, kind: type[Spec]) -> Spec | None:
    """How the run's own recipe calls such data: its test rows first."""
    sources = () if run is None else (run.data.test, run.data.train)
    return next((one for one in sources if isinstance(one, kind)), None)


def _one_or_two(columns: tuple[str, ...]) -> str | list[str]:
    if len(columns) > 2:
        raise RecipeError(
            "there are too many columns of inputs", got=", ".join(columns), expected="one, or two of a pair of texts"
        )
    return columns[0] if len(columns) == 1 else list(columns)


@contextlib.contextmanager
def named_data(data: str, cache_root: Path) -> Iterator[NamedData]:
    """The data at a path or URI. Parquet in object storage is copied to this machine while it is read.

    Raises:
        RefusedError: there is nothing.
        MachineError: object storage does not answer, or does not let this user in.
    """
    holds = _holds(data)
    if holds != "parquet" or "://" not in data:
        yield NamedData(data, holds)
        return
    with _copied(data, cache_root) as path:
        yield NamedData(path, holds)


def _holds(data: str) -> Holds:
    """What a path names: by its name, or in a folder by the names of the first files that say it."""
    if data.rstrip("/").endswith(".tar"):
        return "shards"
    if is_remote(data):
        names: Iterable[str] = (file.uri.removeprefix(data).lstrip("/") for file in files_below(data.rstrip("/")))
    elif Path(data).is_dir():
        names = _names(data)
    else:
        return "parquet"
    held: Holds = "parquet"
    for name in names:
        last = name.rpartition("/")[2]
        if any(part.startswith(SKIPPED_PREFIXES) for part in name.split("/")) or is_leftover(last):
            continue
        if last not in TABLES and last.lower().endswith((".parquet", ".parq", ".pq")):
            return "parquet"  # which may have pictures beside it, as of its README
        held = "pictures" if is_picture(last) else "shards" if held == "parquet" and last.endswith(".tar") else held
    return held


def _names(folder: str) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        yield from (os.path.relpath(Path(place, name), folder) for name in names)


@contextlib.contextmanager
def _copied(data: str, cache_root: Path) -> Iterator[str]:
    """A path for Parquet in object storage."""
    parent, _, name = data.rstrip("/").rpartition("/")
    one_file = name.endswith(".parquet")
    root = open_root(parent if one_file else data)
    keys = [name] if one_file else [key for key in root.list() if not is_skipped(key) and may_be_parquet(key)]
    if not keys:
        raise RefusedError(
            f"no Parquet file under {data}",
            got="0 objects",
            expected="objects that hold Parquet, pictures or tar files of them",
            next="name a Parquet object, or what its name begins with up to a slash",
        )
    cache_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="examples-", dir=cache_root) as folder:
        for key in keys:
            target = Path(folder) / key
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.write_bytes(root.get(key))
            except ObjectMissing as error:
                raise RefusedError(
                    f"no Parquet file at {data}",
                    got="no object of that name",
                    expected="one object, or a folder of them; a `*` is read as it stands",
                    next="name the folder, whose Parquet files are all read",
                ) from error
        yield str(Path(folder) / name) if one_file else folder
