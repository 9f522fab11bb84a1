"""Files that cannot be opened because too many others are: the limit is named, and not the file."""

import errno
from pathlib import Path

import pytest

from akd_dist.base.errors import AkdError, MachineError, RefusedError, unreadable
from akd_dist.base.files import write_error
from akd_dist.storage.objects import storage_error


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_a_limit_of_open_files_is_no_fault_of_the_file(code: int) -> None:
    error = OSError(code, "Too many open files")
    found: list[AkdError] = [
        unreadable(RefusedError, "data.parquet", error, expected="a file"),
        write_error(error, Path("runs/a/fleet.json"), 10),
        storage_error("read", "stores/a", error),
    ]
    for one in found:
        assert isinstance(one, MachineError)
        assert "ulimit -n" in str(one.next)
        assert "free some space" not in str(one)


def test_other_errors_stay_those_of_the_file() -> None:
    refused = unreadable(RefusedError, "data.parquet", OSError(errno.EACCES, "Permission denied"), expected="a file")
    assert isinstance(refused, RefusedError)
    assert "data.parquet" in str(refused)
    assert "free some space" in str(write_error(OSError(errno.ENOSPC, "No space left"), Path("fleet.json"), 10))
