"""What a run left behind, read back: content that is not what was written is told as damage, of whichever file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from akd_dist.base.errors import DamagedError
from akd_dist.base.files import mistakes, parse_json, read_json, read_small
from akd_dist.documents.base import Document
from akd_dist.documents.fleet import EpochRecord, StudentResult
from akd_dist.storage.objects import storage_error

WROTE = "what train-students wrote"
AnyDocument = TypeVar("AnyDocument", bound=Document)


@contextlib.contextmanager
def reading(path: Path, *, expected: str, next: str) -> Iterator[None]:
    """Refuse what is read in this block if anything is wrong with it; a file that is not there is the caller's affair.

    Args:
        expected: what wrote the file, and what should be in it.
        next: what to do about it.

    Raises:
        DamagedError: the content is not what was written.
        MachineError: the file cannot be read.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except ValidationError as error:
        raise _damaged(path, mistakes(error), expected, next) from error
    # Arrow's errors are of these kinds; those about content are OSErrors without a number, too.
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise storage_error("read", str(path), error) from error
        raise _damaged(path, str(error).partition("\n")[0], expected, next) from error


def load(path: Path, kind: type[AnyDocument], *, expected: str = WROTE, next: str) -> AnyDocument:
    """The document in a file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        DamagedError: it is not of this kind; names the field.
        MachineError: it cannot be read.
    """
    with reading(path, expected=expected, next=next):
        return kind.model_validate(parse_json(read_small(path)))


def read_result(folder: Path) -> StudentResult | None:
    """What a student left when it ended; None if it has not ended, or the file was torn.

    A file that is no JSON was cut by a loss of power: the student goes on from its last checkpoint, and ends the same.

    Raises:
        DamagedError: it is JSON, and not what a student leaves.
        MachineError: it cannot be read.
    """
    path = folder / "result.json"
    if read_json(path) is None:
        return None
    result = load(path, StudentResult, next="restore it; or remove it: what the student still lacks is trained again")
    if result.name != folder.name:
        raise _damaged(path, f"name: {result.name}", f"the result of {folder.name}", "restore it, or remove it")
    return result


def read_epochs(folder: Path) -> list[EpochRecord]:
    """A student's metrics.jsonl: its epochs in order; none if it never finished one.

    A last line without its newline was cut by a loss of power, and is left out.

    Raises:
        DamagedError: a line is not an epoch as training writes it.
        MachineError: it cannot be read.
    """
    path = folder / "metrics.jsonl"
    records: list[EpochRecord] = []
    again = "akd-dist train-students RECIPE --fresh trains the run again"
    # Read and not asked for first: where a folder above it is closed, the asking fails as well.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), reading(path, expected=WROTE, next=again):
        for number, line in enumerate(read_small(path).splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(EpochRecord.model_validate(parse_json(line)))
            except ValueError as error:  # of JSON and of pydantic
                told = line[:80].decode(errors="replace").strip()
                raise ValueError(f"line {number}: {mistakes(error)}: {told}") from error
    return records


def _damaged(path: Path, got: str, expected: str, next: str) -> DamagedError:
    return DamagedError(f"{path} is damaged", got=got, expected=expected, next=next)
