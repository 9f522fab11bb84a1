"""Checkpoints: the whole state of one student in one file that is either intact or refused.

A file is `AKDCKPT1`, the sha256 of what follows, then safetensors bytes whose metadata holds the rest of the tree as
JSON. So every flipped bit is noticed (neither torch nor safetensors would), and nothing in it is ever executed.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from akd_dist.base.errors import DamagedError
from akd_dist.base.fence import FencedWriter
from akd_dist.base.files import MAX_DOCUMENT, failpoint, parse_json, sha256

MAGIC = b"AKDCKPT1"
# The magic is followed by the 64 hexadecimal digits of a sha256.
_HEAD = len(MAGIC) + 64
_NAME = re.compile(r"[0-9]+(-[0-9]+)*")
# The newest, and one to fall back on where that is found damaged.
_KEEP = 2
DAMAGED = ".damaged"
"""The suffix of a checkpoint that was set aside."""

log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, name: str, tree: Any, writer: FencedWriter | None = None) -> Path:
    """Write a tree of dicts, lists, tuples, numbers, strings and tensors as `<name>.ckpt`, and keep the last two.

    Names are numbers that sort by progress. The file appears whole or not at all, and not if somebody took over from
    the writer.
    """
    path, writer = folder / f"{name}.ckpt", writer or FencedWriter()
    failpoint("checkpoint.before_save")
    writer.replace(path, encode(tree))
    failpoint("checkpoint.after_save")
    for old in checkpoints(folder)[:-_KEEP]:
        writer.remove(old)
    return path


def newest_checkpoint(
    folder: Path, writer: FencedWriter | None = None, tell: Callable[[str], None] = lambda text: None
) -> tuple[Path, Any] | None:
    """The newest intact file of a folder and its tree, None where there is no checkpoint.

    A damaged file is passed over for the one before it, and set aside as `.damaged`.

    Args:
        tell: told of each that is passed over; a warning is logged besides.

    Raises:
        DamagedError: there are checkpoints and none of them is intact.
    """
    found, damaged, writer = checkpoints(folder), [], writer or FencedWriter()
    for path in reversed(found):
        try:
            tree = decode(path.read_bytes(), path)
        except DamagedError as error:
            log.warning("%s; falling back to the one before", error)
            tell(f"{error.what}; falling back to the one before")
            damaged.append(path)
            continue
        for bad in damaged:  # else it would be kept as one of the last two, and an intact one removed
            writer.rename(bad, bad.with_suffix(DAMAGED).name)
        return path, tree
    if not found:
        return None
    raise DamagedError(
        f"no checkpoint in {folder} is intact",
        got=f"{len(found)} damaged: " + ", ".join(path.name for path in found),
        expected="at least one whose sha256 matches",
        next="remove that folder to train this student from its start",
    )


def read_header(path: Path) -> dict[str, Any]:
    """What stands at the top of a checkpoint's tree besides tensors and what holds some; not checked for flipped bits.

    Only the head of the file is read. Empty where it cannot be.
    """
    try:
        with open(
            os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb"
        ) as file:  # a pipe would be waited for
            file.seek(_HEAD)
            length = int.from_bytes(file.read(8), "little")
            size = min(os.fstat(file.fileno()).st_size, MAX_DOCUMENT)
            header = parse_json(file.read(length) if length <= size else b"")
        pairs = json.loads(header["__metadata__"]["tree"])["dict"]
        return {key: value for key, value in pairs if not isinstance(value, dict | list)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, oldest first; what somebody else put there is none."""
    return sorted((path for path in folder.glob("*.ckpt") if _NAME.fullmatch(path.stem)), key=numbers_of)


def numbers_of(path: Path) -> tuple[int, ...]:
    """What the name of a checkpoint says: a student's epoch, step and attempt. It sorts by progress."""
    return tuple(map(int, path.stem.split("-")))


def drop_doubtful(folder: Path, writer: FencedWriter, known: Collection[str] = ()) -> None:
    """Remove the checkpoints of a folder that rest on bytes of which nobody knows whether they were already wrong.

    Args:
        known: marks of files that are still to be hashed, or were found right since: what rests on these very ones
            stays. Any other cache entry, made since, says nothing of the bytes behind a checkpoint.
    """
    for path in checkpoints(folder):
        if not rests_on(path) <= set(known):
            writer.remove(path)


def rests_on(path: Path) -> set[str]:
    """The marks of the files that a checkpoint rests on: not hashed between the last read of them and its writing."""
    return set(str(read_header(path).get("rests_on") or "").split())


def encode(tree: Any) -> bytes:
    """A tree as the bytes of a checkpoint file."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _strip(tree, tensors)
    payload = safetensors.torch.save(tensors, metadata={"tree": json.dumps(skeleton)})
    return MAGIC + sha256(payload).encode() + payload


def decode(data: bytes, path: Path | str = "a checkpoint") -> Any:
    """The tree of a checkpoint file's bytes.

    Raises:
        DamagedError: the bytes are not those that were written.
    """
    payload = data[_HEAD:]
    if data[: len(MAGIC)] != MAGIC or sha256(payload).encode() != data[len(MAGIC) : _HEAD]:
        raise DamagedError(
            f"the checkpoint {path} is damaged",
            got=f"{len(data):,} bytes whose sha256 does not match",
            expected="the bytes that were written",
        )
    try:
        tensors = safetensors.torch.load(payload)
        # safetensors itself hands out no metadata of bytes: they stand in its header, behind eight bytes of its length.
        header = parse_json(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        return _restore(json.loads(header["__metadata__"]["tree"]), tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"the checkpoint {path} cannot be read", got=error, expected="a checkpoint") from error


def _strip(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a tree, its tensors moved into `tensors`; dicts as pairs, since optimizer states have integer keys."""
    match node:
        case torch.Tensor():
            key = f"{len(tensors):05d}"
            # A clone, since safetensors refuses tensors that share memory, or are not contiguous.
            tensors[key] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": key}
        case dict():
            return {"dict": [[key, _strip(value, tensors)] for key, value in node.items()]}
        case tuple():
            return {"tuple": [_strip(value, tensors) for value in node]}
        case list():
            return [_strip(value, tensors) for value in node]
        case _:
            return node


def _restore(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match node:
        case {"tensor": key}:
            return tensors[key]
        case {"dict": pairs}:
            return {key: _restore(value, tensors) for key, value in pairs}
        case {"tuple": values}:
            return tuple(_restore(value, tensors) for value in values)
        case list():
            return [_restore(value, tensors) for value in node]
        case _:
            return node
