"""What was checked of a store on this node, and need not be checked again by each process there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from akd_dist.base.files import canonical_json, replace, sha256, with_checksum, without_checksum
from akd_dist.base.locks import file_lock
from akd_dist.storage.manifest import Manifest

# Notes of a store that are kept: a driver and workers on other devices, under a few versions of code.
_NOTES = 16


def once(manifest: Manifest, cache_root: Path, given: dict[str, Any], check: Callable[[], None]) -> None:
    """Check something of a store, unless it was checked on this node before; others of the node wait meanwhile.

    Args:
        given: whatever else could change what the check finds, as JSON.
        check: raises where something is wrong; then nothing is noted.
    """
    path = note_of(manifest, cache_root)
    mark = sha256(canonical_json([manifest.sha256, given]))
    with file_lock(path.with_suffix(".lock"), what=f"what is checked of store {manifest.id[:12]}"):
        known = _known(path)
        if mark not in known:
            check()
            # Not durable: where a loss of power takes the note, it is checked once more.
            replace(path, with_checksum({"checked": [*known, mark][-_NOTES:]}), durable=False)


def note_of(manifest: Manifest, cache_root: Path) -> Path:
    """Where it is noted."""
    return cache_root / "logits" / f"{manifest.sha256[:32]}.checked"


def _known(path: Path) -> list[str]:
    try:
        return [str(mark) for mark in without_checksum(path.read_bytes())["checked"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
