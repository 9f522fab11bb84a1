"""Commands as a user without a home or a name, as in a container that was started with a bare number."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

POSSIBLE = os.geteuid() == 0 and shutil.which("setpriv") is not None
"""Whether commands can be run as another user here: that takes root and setpriv."""
# Python and this checkout may lie in a folder of root's alone: they are read, and nothing of them is written.
NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def as_nobody(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command of a user who has neither an entry in passwd nor any variable but these."""
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [*NOBODY, sys.executable, "-m", "akd_dist.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True, check=False, timeout=900)
