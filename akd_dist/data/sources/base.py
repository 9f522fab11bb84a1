"""Where rows come from: one small class per kind of source. A source yields its rows as they are stored.

`key` is cheap and says when rows may have changed; `open` looks at the rows without reading them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from akd_dist.base.errors import RefusedError
from akd_dist.data.blocks import Block, Reader
from akd_dist.data.columns import Place
from akd_dist.data.file_sets import FileSet
from akd_dist.storage.remote import RemoteFile, is_remote


@dataclass(frozen=True)
class Source:
    """Rows in an order that never changes, looked at and not yet read."""

    name: str
    """For messages."""
    rows: int
    """How many."""
    blocks: Reader
    """Reads them."""
    where: Callable[[int], str]
    """A row's place, for messages."""
    label_blocks: Reader | None = None
    """Reads labels alone, in blocks without columns of inputs; None where they come with the inputs only."""
    notes: tuple[str, ...] = ()
    """What a user should know of the source, a line each."""
    inputs: tuple[str, ...] = ()
    """The columns of inputs, if they have names."""
    label: tuple[str, ...] = ()
    """The column of labels, if it has a name."""
    class_names: tuple[str, ...] | None = None
    """What the source calls its class ids."""
    classes: int | None = None
    """How many classes there are, if it is known beforehand."""
    cuts: np.ndarray | None = None
    """The rows at which reading may begin, int64, sorted, the first one 0: to read another one, those since the cut
    before it are read as well, and dropped. None where it may begin anywhere."""
    files: tuple[str, ...] = ()
    """The files that rows lie in, in order; none where the source is one whole."""
    file_starts: np.ndarray | None = None
    """The first row of each file, int64 [files]; None with no files."""
    labels_at_hand: bool = False
    """Whether labels are known without reading anything: then they are checked before inputs are read."""
    names: Callable[[int, int], Sequence[str]] | None = None
    """What rows start..stop - 1 are called where they come from, as files of pictures are."""
    keys: Callable[[np.ndarray], Any] | None = None
    """By what rows are known within their file, as samples by their key: row numbers -> an Arrow array of strings. None
    where they are known by their number."""
    known: Any = None
    """What tasks are told of the source, so that they need not look for it again; small, picklable."""
    sample: Callable[[], str] | None = None
    """A hash of a few rows, by which a change is noticed that no file shows; of sources of the user's own."""

    def __post_init__(self) -> None:
        if self.rows == 0:
            raise no_rows(self.name)

    @property
    def input_place(self) -> Place:
        """Where inputs stand."""
        return Place(self.where, self.inputs)

    @property
    def label_place(self) -> Place:
        """Where labels stand."""
        return Place(self.where, self.label)


def no_rows(name: str) -> RefusedError:
    """What to say of a source that is empty."""
    return RefusedError(
        f"{name} has no rows",
        got="0 rows",
        expected="at least one",
        next="correct the source in the recipe",
    )


class Kind(Protocol):
    """A place that rows may come from."""

    def key(self) -> dict[str, Any]:
        """JSON that changes when the rows may have changed; cheap. Refuses what is not there."""

    def open(self) -> Source:
        """Look at the rows: how many there are, and whether they have the columns that the recipe names."""


def slices(
    rows: int,
    read: Callable[[int, int], tuple[Sequence[Any], Any]],
    most: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Block]:
    """Blocks of rows that can be read from anywhere: `read(start, stop)` gives columns of inputs, and labels."""
    stop = rows if stop is None else min(stop, rows)
    for first in range(start, stop, most):
        yield Block(first, *read(first, min(first + most, stop)))


def stats_of(files: Sequence[Path | RemoteFile]) -> list[list[Any]]:
    """Path, size and time of each file, of an object its entity tag: cheap, and different when its content may be."""
    return [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        if isinstance(file, Path)
        else [file.uri, file.size, file.tag]
        for file in files
    ]


def local_files(kinds: Mapping[str, Kind], keys: Mapping[str, Mapping[str, Any]]) -> list[Path | FileSet]:
    """The local files that the keys of sources name, each once; those of a folder of pictures as one."""
    paths = dict.fromkeys(file[0] for key in keys.values() for file in key.get("files", []))
    sets = {str(one): one for kind in kinds.values() if (one := getattr(kind, "file_set", None)) is not None}
    return [*(Path(path) for path in paths if not is_remote(path)), *sets.values()]


def remote_files(keys: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """What the keys of sources say of their objects; of those of a folder of pictures, what they say of all."""
    files = [list(file) for key in keys.values() for file in key.get("files", []) if is_remote(file[0])]
    return files + [
        [key["path"], *key["listing"]] for key in keys.values() if is_remote(key.get("path") or "") and "listing" in key
    ]


def row_of(name: str) -> Callable[[int], str]:
    """How a row of a source is named in messages."""
    return lambda row: f"row {row} of {name}"
