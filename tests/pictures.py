"""Small pictures as files of a folder and as members of tar files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel")


def jpeg(number: int, size: int = 8) -> bytes:
    """A picture of random pixels, and a colour for each of three classes."""
    pixels = np.random.default_rng(number).integers(0, 90, (size, size, 3), dtype=np.uint8)
    pixels[..., number % 3] += 160
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Files by their names below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def of_classes(folder: Path, count: int, **others: bytes) -> Path:
    """A folder for each of three classes, which hold so many pictures in all."""
    files = {f"{CLASSES[number % 3]}/{number:03}.jpg": jpeg(number) for number in range(count)}
    return write(folder, files | others)


def tar(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """A tar file: files by name, or members as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def samples(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    """Members of samples that have their class as an id and as a name."""
    made = []
    for number in numbers:
        told = json.dumps({"name": CLASSES[number % 3], "id": number % 3, "share": number / 2}).encode()
        made += [(f"{number:04}.cls", f"{number % 3}\n".encode()), (f"{number:04}.json", told)]
        made += [(f"{number:04}.jpg", jpeg(number)), (f"{number:04}.txt", b"a caption")]
    return made
