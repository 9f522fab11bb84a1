"""Where results and exports go: what is there already is spared, and they come to their place whole or not at all."""

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from akd_dist.base.errors import MachineError, RecipeError, is_limit, limit_reached
from akd_dist.base.files import PARTIAL_SUFFIX, fsync_folder


@contextlib.contextmanager
def made_beside(out: Path, to: str) -> Iterator[Path]:
    """Where to make an export, on the file system of its place; whatever is left there goes away."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PARTIAL_SUFFIX, dir=out.parent)
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield Path(folder) / {"onnx": "made.onnx", "torch-export": "made.pt2", "huggingface": "made"}[to]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, out: Path) -> None:
    """Give an export its name, a file in one step; what was there before goes with the folder that it was made in."""
    try:
        if out.exists() and (out.is_dir() or made.is_dir()):
            out.rename(made.with_name("before"))
        made.replace(out)
        fsync_folder(out.parent)
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> MachineError:
    if is_limit(error):
        return limit_reached(error)
    return MachineError(
        f"cannot write {out}",
        got=error.strerror or str(error),
        expected="a folder that this user can write to",
        next="choose another place with --out",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries print of their inner workings: what matters is in the document."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def refuse_existing(out: Path, overwrite: bool, instead_of: str | None = None) -> None:
    """Refuse a place to write to that is taken, or that is no local path.

    Args:
        out: the place.
        overwrite: whether a file may be overwritten.
        instead_of: a file by which a folder is known that may be overwritten as well; None spares every folder.

    Raises:
        RecipeError: so it is.
    """
    if "://" in str(out):
        raise RecipeError("results are written to a local path", got=out, next="copy them afterwards")
    if not out.exists():
        return
    if not overwrite:
        what = "a folder" if out.is_dir() else "a file"
        raise RecipeError(f"{out} is there already", got=what, expected="a new name", next="choose one, or add --force")
    if out.is_dir() and (instead_of is None or not (out / instead_of).is_file()):
        expected = "a file" if instead_of is None else f"a folder with {instead_of}"
        raise RecipeError(f"{out} is not overwritten", got="a folder", expected=expected, next="choose another name")
