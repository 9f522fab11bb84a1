"""The SLURM script with Ray in earnest: two nodes played by this machine, and `srun` by a few lines of shell."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.test_slurm import JOB, SCRIPT, script

pytestmark = pytest.mark.slow
# Runs the command of a step as often as it has tasks, and hands SIGTERM on to all of them, as srun does.
SRUN = """
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
started=()
trap 'kill -TERM "${started[@]}" 2>/dev/null' TERM
for ((task = 0; task < tasks; task++)); do
    "$@" &
    started+=($!)
done
for process in "${started[@]}"; do
    while :; do
        wait "$process"
        code=$?
        kill -0 "$process" 2>/dev/null || break
    done
done
exit $code
"""
# In place of akd-dist: says what it finds, and then works until it is told to stop, or not at all.
COMMAND = """
import json, os, pathlib, signal, sys, threading
import ray

signal.signal(signal.SIGTERM, lambda *_: stopped.set())
stopped = threading.Event()
words = sys.argv[1:]
ray.init(address=words[words.index("--address") + 1], log_to_driver=False)
found = {"words": words, "nodes": sum(node["Alive"] for node in ray.nodes()), "cpus": ray.cluster_resources()["CPU"]}
ray.shutdown()
found["token"] = os.environ["RAY_AUTH_TOKEN"]
told = pathlib.Path(words[1])
told.with_suffix(".partial").write_text(json.dumps(found))
told.with_suffix(".partial").rename(told)
if words[0] == "work":
    stopped.wait()
    sys.exit(143)
"""


class Job:
    """A job whose command is a program of the test."""

    def __init__(self, root: Path, *words: str) -> None:
        # Ports and folder follow from the number.
        self.number, self.found = 10**9 + secrets.randbelow(10**9), root / "found"
        self.log = root / "log"
        bin_ = root / "bin"
        bin_.mkdir()
        script(bin_ / "scontrol", 'printf "node-1\\nnode-2\\n"')
        script(bin_ / "srun", SRUN)
        (bin_ / "akd-dist").write_text(f"#!{sys.executable}\n{COMMAND}")
        (bin_ / "akd-dist").chmod(0o755)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= JOB | {"SLURM_JOB_ID": str(self.number), "AKD_DIST_HEAD_IP": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
        env |= {"PATH": os.pathsep.join([str(bin_), str(Path(sys.executable).parent), os.environ["PATH"]])}
        env |= {"RAY_raylet_start_wait_time_s": "600", "SLURM_MEM_PER_NODE": "2000", "AKD_DIST_START_SECONDS": "900"}
        with self.log.open("w") as told:
            command = ["bash", str(SCRIPT), words[0], str(self.found), *words[1:]]
            self.process = subprocess.Popen(command, env=env, stdout=told, stderr=told, cwd=root)

    def started(self) -> list[psutil.Process]:
        """Everything that the job has started, by its folder or as its child."""
        found = {}
        if self.process.poll() is None:
            found = {one.pid: one for one in psutil.Process(self.process.pid).children(recursive=True)}
        for one in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(one.info["cmdline"] or ()):
                found[one.pid] = one
        return list(found.values())

    @property
    def folder(self) -> Path:
        return Path("/tmp", f"akd-{self.number}")

    def end(self) -> int:
        return self.process.wait(timeout=900)


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[list[Job]]:
    """Ends what a job has left, should the script not have done it."""
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        left = job.started()
        job.process.kill()
        job.process.wait()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(job.folder, ignore_errors=True)  # where the script has left Ray's logs


def test_a_command_finds_all_nodes_and_everything_ends_with_it(tmp_path: Path, jobs: list[Job]) -> None:
    jobs.append(job := Job(tmp_path, "look", "--set", "name=with a space"))
    assert job.end() == 0, job.log.read_text()
    found = json.loads(job.found.read_text())
    assert found["nodes"] == 2
    assert found["cpus"] == 2
    assert found["words"][2:4] == ["--set", "name=with a space"]
    assert len(found["token"]) == 64
    assert found["token"] not in job.log.read_text()
    assert not job.started()
    assert not job.folder.exists()


def test_sigterm_reaches_the_command_and_its_exit_code_comes_back(tmp_path: Path, jobs: list[Job]) -> None:
    jobs.append(job := Job(tmp_path, "work"))
    while not job.found.exists():
        assert job.process.poll() is None, job.log.read_text()
        time.sleep(0.2)
    token = json.loads(job.found.read_text())["token"]
    running = [" ".join(one.cmdline()) for one in job.started()]
    assert any("raylet" in words for words in running)
    assert not [words for words in running if token in words]
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143, job.log.read_text()
    assert not job.started()
