"""The `akd-dist` command: options in, one message or one document out, and an exit code.

    akd-dist quickstart          the whole story on real digits
    akd-dist --help              every command

Results go to stdout, everything else to stderr. Heavy imports happen inside commands, so that help is instant.
"""

import contextlib
import errno
import gc
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from akd_dist.base.errors import AkdError, InterruptedByUser, MachineError, RecipeError, TerminatedError, limit_reached
from akd_dist.cli.options import Group
from akd_dist.cli.recipes import recipe
from akd_dist.cli.reports import report
from akd_dist.cli.run import cache_teacher, compare, plan, quickstart, train_students
from akd_dist.cli.show import plain_output, print_json, reader_is_gone, settle_streams, silence_streams
from akd_dist.cli.stores import stores
from akd_dist.cli.students import evaluate, export, generate, models, predict
from akd_dist.cli.tune import tune
from akd_dist.cli.watch import status

# As a shell tells of a program that SIGPIPE ended.
PIPE_CLOSED = 128 + signal.SIGPIPE


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="akd-dist", message="akd-dist %(version)s")
def cli() -> None:
    """One teacher, run once; fleets of students from its stored logits.

    \b
    Exit codes: 0 done, 1 some students did not succeed, 2 recipe or options
    wrong, 3 held by someone else, 4 data, teacher or student refused, 5 damaged,
    6 the machine, 70 a bug, 130 interrupted, 143 terminated.
    """


for command_line in (
    quickstart,
    plan,
    cache_teacher,
    train_students,
    compare,
    tune,
    status,
    report,
    evaluate,
    predict,
    generate,
    export,
    models,
    stores,
    recipe,
):
    cli.add_command(command_line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: the one place where an error becomes a message and a code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    gc.set_threshold(50_000)  # importing torch makes hundreds of thousands of objects, and none is garbage
    settle_streams()
    try:
        try:
            _check_folder()
            with _terminable():
                # Not standalone: click would print its own messages, and leave with codes of its own.
                code = cli.main(args=given, prog_name="akd-dist", standalone_mode=False)
        except BaseException as error:
            if isinstance(error, SystemExit | BrokenPipeError) and reader_is_gone():  # click has made the former of it
                raise BrokenPipeError from error
            if isinstance(error, SystemExit):
                raise
            code = refuse(_as_refusal(error, given), as_json="--json" in given)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read what we print has seen enough
        silence_streams()
        code = PIPE_CLOSED
    _leave_beside_ray(code or 0)
    gc.freeze()  # else the interpreter looks through all of these for garbage once more, for a second, to leave
    sys.exit(code or 0)


def _leave_beside_ray(code: int) -> None:
    """End this process at once where Ray's code still runs in it after a start that failed: all is written, and the
    interpreter's own end would crash now and then.
    """
    cluster = sys.modules.get("akd_dist.jobs.cluster")
    if cluster is not None and cluster.is_still_starting():
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)


def _check_folder() -> None:
    """Refuse to work in a folder that is gone: paths, and whatever this starts, begin there."""
    try:
        Path.cwd()
    except OSError as error:
        raise MachineError(
            "the folder that this command was started in cannot be used",
            got=str(error),
            expected="a working directory that exists",
            next="cd to another folder",
        ) from None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Leave with a message on SIGTERM as well, wherever nothing more careful is in charge of it."""

    def leave(_number: int, _frame: object) -> None:
        raise TerminatedError("terminated", next="run the same command again: what was written is kept")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_refusal(error: BaseException, arguments: list[str]) -> AkdError:
    match error:
        case AkdError():
            return error
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "akd-dist"
            return RecipeError(
                error.format_message(), got=shlex.join(["akd-dist", *arguments]), next=f"{command} --help"
            )
        case click.ClickException():
            return RecipeError(error.format_message(), next="akd-dist --help")
        case click.Abort() | KeyboardInterrupt():
            again = "without --fresh" if "--fresh" in arguments else "again"
            return InterruptedByUser("interrupted", next=f"run the same command {again}: what was written is kept")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EROFS):
            from akd_dist.base.files import write_error

            if error.filename is not None:
                return write_error(error, Path(error.filename), 1)
            return MachineError(
                "there is no room to write to",
                got=error.strerror,
                expected=f"some where the output of this command goes, and in {tempfile.gettempdir()}",
                next="free some space, or let the output go elsewhere",
            )
        case OSError(errno=errno.EMFILE | errno.ENFILE | errno.EAGAIN) | RuntimeError(args=("can't start new thread",)):
            return limit_reached(error)
        case FileNotFoundError(strerror=str(reason)) if reason.startswith("No usable temporary directory"):
            return MachineError(
                "there is no folder for temporary files",
                got=reason,
                expected="one that this user can write to",
                next="set TMPDIR to such a folder",
            )
        case _:
            return _bug(error, arguments)


def _bug(error: BaseException, arguments: list[str]) -> AkdError:
    """An error that nobody foresaw: the traceback goes to a file, its path into the message."""
    head = [
        shlex.join(["akd-dist", *arguments]),
        f"akd-dist {_version()}, Python {platform.python_version()}, {platform.platform()}",
    ]
    told = "\n".join([*head, "", *traceback.format_exception(error)])
    log = _kept(told)
    if log is None:
        click.echo(told, err=True)
    return AkdError(
        "something went wrong that akd-dist did not foresee; this is a bug in it",
        got=f"{type(error).__name__}: {error}",
        next=f"report it with {f'the log {log}' if log else 'what is told above'}; "
        "the same command may go on from what was written",
    )


def _kept(told: str) -> Path | None:
    """Where a report was written: the user's folder of logs, else a temporary one; None where neither can be.

    Whatever is wrong with this machine must not hide what is reported.
    """
    import platformdirs

    name = f"bug-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**6}.log"
    for temporary in (False, True):
        with contextlib.suppress(OSError, RuntimeError):  # the latter where there is no home
            folder = tempfile.mkdtemp(prefix="akd-dist-") if temporary else platformdirs.user_log_path("akd-dist")
            log = Path(folder, name)
            log.parent.mkdir(parents=True, exist_ok=True)
            # Names of files that are no UTF-8 stand in it as lone surrogates, which UTF-8 cannot write.
            log.write_text(told, encoding="utf-8", errors="backslashreplace")
            return log
    return None


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("akd-dist")
    except PackageNotFoundError:  # its source alone
        return "of a version that is not known"


def refuse(error: AkdError, *, as_json: bool) -> int:
    """Say what is wrong on stderr, and on stdout as a document if one was asked for; the exit code."""
    # click leaves the colours out where stderr is no terminal, and so do we where they are not wanted.
    colour = False if plain_output() else None
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.what}", err=True, color=colour)
    for label, text in (("got", error.got), ("expected", error.expected), ("next", error.next)):
        if text is not None:
            click.echo(f"  {click.style(f'{label}:', bold=True)} {text}", err=True, color=colour)
    if as_json:
        print_json({"error": error.to_json()})
    return error.code
