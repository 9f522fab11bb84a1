"""What a run left behind, read back: content that is not what was written is told as damage, of whichever file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from akd_dist.storage.errors import DamagedError
from akd_dist.storage.objects import storage_error


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
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        raise _damaged(path, f"{field}: {first['msg']}", expected, next) from error
    # Arrow's errors are of these kinds; those about content are OSErrors without a number, too.
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise storage_error("read", str(path), error) from error
        raise _damaged(path, str(error).partition("\n")[0], expected, next) from error


def _damaged(path: Path, got: str, expected: str, next: str) -> DamagedError:
    return DamagedError(f"{path} is damaged", got=got, expected=expected, next=next)
