"""A user without a home or a name, as in a container that was started with a bare number; folders that are gone.

Where this is not root, or there is no `setpriv`, the commands cannot be run as another user. A whole run as such a user
is that of test_quickstart.py.
"""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

import akd_dist
from akd_dist.cli import main
from akd_dist.jobs import cluster
from tests.fleets import HARD, a_recipe, a_student
from tests.nobody import POSSIBLE, as_nobody

needs_setpriv = pytest.mark.skipif(not POSSIBLE, reason="running as another user takes root and setpriv")


@pytest.fixture
def work() -> Any:
    """A folder in which that user may write, below none that he may not look into."""
    with tempfile.TemporaryDirectory(prefix="no-home-") as name:
        Path(name).chmod(0o777)
        recipe = a_recipe([a_student("one", objective=HARD | {"epochs": 1})], teacher={
            "model": {"kind": "mlp", "hidden": 8}, "train": {"epochs": 1, "optimizer": {"kind": "sgd", "lr": 0.1}},
        })  # fmt: skip
        (Path(name) / "recipe.yaml").write_text(recipe.to_yaml())
        yield Path(name)


@needs_setpriv
@pytest.mark.parametrize(
    "home", [{}, {"HOME": "/nonexistent"}, {"HOME": "/proc"}], ids=["none", "nowhere", "read-only"]
)
def test_without_a_home_the_refusal_says_how_to_do_without(home: dict[str, str], work: Path) -> None:
    told = as_nobody(work, "train-students", "recipe.yaml", "--dry-run", **home)
    assert told.returncode == 6, told.stderr
    assert told.stderr.count("error:") == 1
    assert "Traceback" not in told.stderr
    for word in ("--cache-root", "AKD_DIST_CACHE", "HOME"):
        assert word in told.stderr


@pytest.mark.parametrize("temporary", [True, False])
def test_a_bug_is_reported_although_there_is_no_home(
    temporary: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def nowhere(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("could not determine the home directory")

    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("platformdirs.user_log_path", nowhere)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not temporary:
        monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(akd_dist, "cache_teacher", lambda *_, **__: 1 // 0)
    with pytest.raises(SystemExit) as left:
        main(["cache-teacher", "recipe.yaml"])
    assert left.value.code == 70
    told = capsys.readouterr().err
    reported = next(tmp_path.rglob("bug-*.log")).read_text() if temporary else told
    assert "ZeroDivisionError: integer division or modulo by zero" in reported
    assert "Traceback (most recent call last)" in reported
    assert ("the log " if temporary else "told above") in told


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/akd"), "no room to write /somewhere/akd"),
        (OSError(errno.EROFS, "Read-only file system", "/somewhere/akd"), "cannot write /somewhere/akd"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
    ],
)
def test_no_room_for_something_temporary_is_the_machines(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(akd_dist, "cache_teacher", fail)
    with pytest.raises(SystemExit) as left:
        main(["cache-teacher", "recipe.yaml"])
    assert left.value.code == 6
    assert said in capsys.readouterr().err


def test_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD"; exec "$0" -m akd_dist.cli stores list'
    told = subprocess.run(
        ["sh", "-c", script, sys.executable], cwd=gone, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert told.returncode == 6, told.stderr
    assert "the folder that this command was started in" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize("home", ["", "/proc", None])
def test_where_rays_token_cannot_be_kept_it_is_kept_nowhere(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # restored afterwards, whatever it is then
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("akd_dist.jobs.ray_internals.has_token", lambda: False)
    cluster._ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
