"""A model that is trained in a folder of its node alone, and published under a root that every node reaches.

Everything is published create-only: a worker that was taken for dead, and is late, finds what the later one published.
Checkpoints go there too, so that another node can go on from them.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from akd_dist.base.errors import AkdError
from akd_dist.base.files import replace, sha256
from akd_dist.distill.checkpoint import checkpoints
from akd_dist.distill.cohort import train_cohort
from akd_dist.distill.job import CohortJob, forget_failures, read_progress, renewals
from akd_dist.documents.status import CohortProgress
from akd_dist.models.card import CARD, WEIGHTS, card_bytes, parse_card
from akd_dist.storage.roots import open_root

FOLLOW_SECONDS = 1.0
"""How often whoever follows is told how far it is, and asked whether to stop."""
CHECKPOINTS = "checkpoints"
"""Where checkpoints lie under a model's folder."""

Follow = Callable[[CohortProgress | None], bool]
"""Told how far a model is; says whether it is to stop."""


def train_and_publish(job: CohortJob, uri: str, follow: Follow = lambda progress: False) -> dict[str, Any]:
    """Train the one student of a job, and publish its model folder under a URI.

    Args:
        job: its folders lie on this node, and in the way of nobody else.
        follow: told of its progress, every FOLLOW_SECONDS.

    Returns:
        As `train_cohort`; and "renewed", what `renewals` says.

    Raises:
        AkdError: as `train_cohort`, and where the URI cannot be written.
    """
    folder = Path(job.root) / job.students[0].name
    Path(job.control).mkdir(parents=True, exist_ok=True)
    job.stop_file.unlink(missing_ok=True)
    forget_failures(job)
    fetch_checkpoints(Path(job.control), uri)
    with _followed(job, uri, follow):
        outcome = train_cohort(job)
    outcome["renewed"] = renewals(job)
    if [result["state"] for result in outcome["students"]] == ["done"]:
        publish_model(folder, uri)
        open_root(uri).delete_folder(CHECKPOINTS)
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def publish_model(folder: Path, uri: str) -> None:
    """Publish a model folder create-only; `model.json` last, since it says: I am there.

    Where other weights are there already, of one who was stopped before the card, they are the model, and get its card.

    Raises:
        MachineError: the URI cannot be written.
    """
    root = open_root(uri)
    weights, card = (folder / WEIGHTS).read_bytes(), (folder / CARD).read_bytes()
    if not root.put_new(WEIGHTS, weights):
        parsed = parse_card(card, folder)
        card = card_bytes(parsed.model_copy(update={"weights_sha256": sha256(root.get(WEIGHTS))}))
    root.put_new(CARD, card)


def fetch_checkpoints(folder: Path, uri: str) -> None:
    """Bring checkpoints that another node has published into a folder that has no later ones."""
    root = open_root(uri)
    there = [path.name for path in checkpoints(folder)]
    for key in root.list(CHECKPOINTS):
        name = key.rpartition("/")[2]
        if name.endswith(".ckpt") and name > max(there, default=""):
            replace(folder / name, root.get(key))


class _Mirror:
    """The checkpoints of a folder, published under a URI as they come; older ones of its own are removed there."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.root, self.sent = folder, open_root(uri), list[str]()

    def send(self) -> None:
        for path in checkpoints(self.folder):
            if path.name not in self.sent:
                with contextlib.suppress(FileNotFoundError):  # two later ones have come meanwhile
                    self.root.put_new(f"{CHECKPOINTS}/{path.name}", path.read_bytes())
                    self.sent.append(path.name)
        kept = {path.name for path in checkpoints(self.folder)}
        for name in [name for name in self.sent if name not in kept]:
            self.root.delete(f"{CHECKPOINTS}/{name}")
            self.sent.remove(name)


@contextlib.contextmanager
def _followed(job: CohortJob, uri: str, follow: Follow) -> Iterator[None]:
    """On a thread beside the training: tell how far it is, pass on that it is to stop, publish its checkpoints."""
    over, mirror = threading.Event(), _Mirror(Path(job.control), uri)

    def look() -> None:
        while not over.wait(FOLLOW_SECONDS):
            if follow(read_progress(job)):
                job.stop_file.touch()
            with contextlib.suppress(AkdError):  # the root may be out of reach for a while; what is there stays
                mirror.send()

    beside = threading.Thread(target=look, daemon=True)
    beside.start()
    try:
        yield
    finally:
        over.set()
        beside.join()
        with contextlib.suppress(AkdError):
            mirror.send()
