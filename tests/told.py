"""Documents of the verbs, made up for tests of what commands say of them; and commands that are started."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "jobs" / "digits.yaml")

PART = {
    "store": "stores/" + "ab" * 32, "id": "ab" * 32, "hit": False, "rows": 1168, "views": 4, "classes": 10,
    "encoding": "float32", "bytes": 186_880, "shards": 20, "shards_computed": 20,
}  # fmt: skip
SPLITS = {"validation": PART | {"views": 1}, "test": PART | {"views": 1}}
CACHED = PART | {"seconds": 3.25, "splits": SPLITS, "assistants": []}
ASSISTANT = PART | {
    "store": "stores/" + "ef" * 32, "model": "mlp-64", "path": "stores/teachers/9", "fingerprint": "ef" * 32,
    "splits": SPLITS,
}  # fmt: skip
PLANNED = {"rows": 1168, "views": 4, "hit": False, "shards": 20, "bytes": 186_880}
PLAN = {
    "dry_run": True, "store_root": "stores", "bytes": 560_640, "free": 10**12,
    "splits": {"train": PLANNED, "validation": PLANNED, "test": PLANNED}, "assistants": [],
}  # fmt: skip
STUDENT = {
    "name": "mlp-4-hard_labels-s0", "model": "mlp-4", "parameters": 310, "objective": "hard_labels", "tau_max": None,
    "seed": 0, "state": "done", "reason": None, "epochs": 40, "validation": {"accuracy": 0.9, "loss": 0.3},
    "test": {"accuracy": 0.91}, "agreement": 0.93, "seconds": 1.5, "path": "runs/digits/students/mlp-4-hard_labels-s0",
    "store": PART["store"], "teacher": "cd" * 32,
}  # fmt: skip
FLEET = {
    "run": "runs/digits", "store": PART["store"], "students": [STUDENT], "cohorts": 1, "seconds": 12.5,
    "task": "classification", "metric": "accuracy",
    "teacher": {"model": "cnn-32", "parameters": 19_210, "test": {"accuracy": 0.98}, "fingerprint": "cd" * 32},
}  # fmt: skip
ESTIMATE = {"n": 2, "mean": 0.9, "low": 0.88, "high": 0.92}
COMPARED = {
    "run": "runs/digits-compare", "command": "akd-dist compare r.yaml", "task": "classification", "metric": "accuracy",
    "confidence": 0.95, "rows": {"train": 1168, "validation": 269, "test": 360}, "assistants": [], "missing": ["takd"],
    "teacher": {"model": "cnn-32", "parameters": 19_210, "test": 0.98, "agreement": None},
    "table": [{
        "name": "mlp-4-kd", "model": "mlp-4", "parameters": 310, "objective": "kd", "tau_max": None, "epochs": 40,
        "seeds": [0, 1], "test": ESTIMATE, "over_scratch": ESTIMATE, "over_kd": None, "agreement": 0.93, "lost": [],
    }],
}  # fmt: skip


def started(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command as a shell starts it."""
    command = [sys.executable, "-m", "akd_dist", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, **options)


def in_a_terminal(*words: str, width: int = 80) -> str:
    """What a terminal gets to see of a command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "akd_dist", *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal says that nobody is there any more
        while data := os.read(ours, 65536):
            seen += data
    os.close(ours)
    process.wait(timeout=900)
    return seen.decode()
