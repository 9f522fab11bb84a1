"""Checkpoints of others -> named tensors: safetensors, whole or in shards, and torch state dicts; nothing is unpickled.

    parts = read_parts(find_files("resnet18.pth"))      {"state_dict": {"module.conv1.weight": tensor, ...}}

A pickle is a program. torch's own loader can be told to take tensors and plain containers and to refuse all else before
it is called (`weights_only=True`); what it refuses stays unread, and the message says how to write the weights again.
"""

import hashlib
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from akd_dist.base.errors import MachineError, RefusedError, unreadable
from akd_dist.base.files import parse_json, read_small
from akd_dist.models.device import free_memory

Tensors = dict[str, torch.Tensor]
INDEX = ".index.json"
"""How the file ends that says which shard has which weight."""
IN_A_FOLDER = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What is looked for in a folder, in this order."""
EXPECTED = "safetensors, or a state dict that torch.save wrote"
_DEPTH = 3  # containers in containers, as {"state_dict": {"model": ...}}
_BLOCKED = re.compile(r"GLOBAL ([\w.]+)")
_OPTIMIZER = {"state", "param_groups"}
# How files begin that people take for checkpoints.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "HDF5, as Keras writes it"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS, and not the file itself: fetch it with `git lfs pull`"),
    (b"GGUF", "GGUF, which holds quantised weights"),
    (b"ARROW1", "an Arrow file"),
    (b"PAR1", "Parquet"),
)
_OTHER_FILE = "name another file, or save the weights so: safetensors.torch.save_file(model.state_dict(), FILE)"
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def find_files(place: str | Path) -> list[Path]:
    """The files of a checkpoint: itself; of a folder the one that weights usually lie in; of an index all its shards.

    Returns:
        Regular files, the index first where there is one. Links are followed, as folders of downloads are full of them.

    Raises:
        RefusedError: there is none, or it is something else than a file.
        MachineError: it may not be read.
    """
    path = Path(place)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return find_files(_in_folder(path))
        if not stat.S_ISREG(mode):
            raise RefusedError(f"{path} is no file", got="a device or a pipe", expected=f"a file of {EXPECTED}")
        if path.name.endswith(INDEX):
            return [path, *_shards(path)]
        with open(path, "rb"):
            return [path]
    except (FileNotFoundError, NotADirectoryError) as error:
        link = "a link that leads nowhere" if path.is_symlink() else "nothing there"
        raise RefusedError(
            f"there is no checkpoint {path}",
            got=link,
            expected=f"a file of {EXPECTED}",
            next="correct teacher.weights; one that is not absolute starts from the recipe's folder",
        ) from error
    except OSError as error:
        raise unreadable(
            MachineError,
            f"the checkpoint {path}",
            error,
            expected="a file that this user may read",
            next="mend its permissions, or the link",
        ) from error


def digest_of(files: Sequence[Path]) -> str:
    """sha256 over the content of a checkpoint's files; each is read once."""
    digests = []
    for path in files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(digests)).hexdigest()


def read_parts(files: Sequence[Path]) -> dict[str, Tensors]:
    """Every dictionary of tensors in a checkpoint, by where it stands: `` for the whole, `state_dict`, `ema.module`.

    Bytes of tensors are mapped and not read until somebody asks for them, where the format allows it.

    Args:
        files: as `find_files` gives them.

    Raises:
        RefusedError: a file is none of the known formats, cut off, or would have to be unpickled; there are no tensors.
    """
    shards = [path for path in files if not path.name.endswith(INDEX)]
    if len(shards) == 1:
        return _parts_of(shards[0])
    joined: Tensors = {}
    for path in shards:
        for tensors in _parts_of(path).values():
            joined |= tensors
    return {"": joined}


def _in_folder(folder: Path) -> Path:
    if (folder / "model.json").exists():
        raise RefusedError(
            f"{folder} is a model folder, which says itself what its weights are of",
            got="model.json beside them",
            expected="a checkpoint without a card",
            next="leave teacher.model out",
        )
    there = [folder / name for name in IN_A_FOLDER if (folder / name).is_file()]
    if there:
        return there[0]
    found = sorted(path.name for path in folder.iterdir())[:4]
    raise RefusedError(
        f"{folder} is a folder without a checkpoint of a usual name",
        got=", ".join(found) or "an empty folder",
        expected=f"a file of {EXPECTED}, or a folder with one of {', '.join(IN_A_FOLDER)}",
        next="name the file itself",
    )


def _shards(index: Path) -> list[Path]:
    """The shards that an index names, beside it."""
    try:
        names = set(parse_json(read_small(index))["weight_map"].values())
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("its weight_map names other things than files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(
            f"{index} is no index of shards",
            got=f"{type(error).__name__}: {error}",
            expected="JSON with a `weight_map` from weights to files beside it",
        ) from error
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise RefusedError(
            f"the checkpoint {index} is not whole",
            got=f"no {', '.join(missing[:3])}",
            expected=f"{len(names)} shards beside it",
            next="fetch the missing files",
        )
    return [index.parent / name for name in sorted(names)]


def _parts_of(path: Path) -> dict[str, Tensors]:
    with open(path, "rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and b"\0" in head[:8]:  # eight bytes of length, then JSON
        return {"": _safetensors(path)}
    if head.startswith(b"PK"):
        _check_archive(path)
        return _tensors_in(path, _load(path, mmap=True))
    if head[:1] == b"\x80":
        _check_memory(path)
        return _tensors_in(path, _load(path, mmap=False))
    raise _refused(path, _kind_of(head, path))


def _kind_of(head: bytes, path: Path) -> str:
    """What a file is, by how it begins."""
    if not head:
        return "an empty file"
    for mark, words in _OTHERS:
        if head.startswith(mark):
            return words
    if head.lstrip().lower().startswith(_PAGES):
        return "a web page: the download went wrong"
    if path.suffix == ".onnx" or (head[0] == 8 and b"onnx" in head.lower()) or b"\x12\x07pytorch" in head:
        return "ONNX, which holds a program and no state dict"
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"text, which begins {head[:40].decode()!r}"
    return f"a file of an unknown kind, which begins {head[:8].hex(' ')}"


def _refused(path: Path, got: object, next: str | None = None) -> RefusedError:
    return RefusedError(
        f"{path} is not a checkpoint that can be read", got=got, expected=EXPECTED, next=next or _OTHER_FILE
    )


def _safetensors(path: Path) -> Tensors:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise _refused(path, f"safetensors that are damaged or cut off: {error}", "fetch the file again") from error


def _check_archive(path: Path) -> None:
    """Refuse zip archives that torch.save did not write before they are opened as one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _refused(path, f"an archive that is damaged or cut off: {error}", "fetch the file again") from error
    names = [entry.filename.partition("/")[2] for entry in entries]
    if any(name.startswith("code/") for name in names) or "constants.pkl" in names:
        advice = f"where you trust it, write its weights again:\n{_written_again(f'torch.jit.load({str(path)!r})')}"
        raise _refused(path, "a TorchScript archive, which holds a program", advice)
    if "data.pkl" not in names:
        kind = "an archive of NumPy" if all(entry.filename.endswith(".npy") for entry in entries) else "a zip archive"
        raise _refused(path, f"{kind} without what torch.save writes")
    if any(entry.compress_size != entry.file_size for entry in entries):
        raise _refused(path, "an archive with compressed entries, which torch.save does not write")


def _check_memory(path: Path) -> None:
    """Refuse a file that memory cannot hold, where it has to be read whole."""
    free, size = free_memory(torch.device("cpu")), path.stat().st_size
    if size > free:
        raise _refused(
            path, f"{size / 1e9:,.1f} GB of a format that cannot be mapped, and {free / 1e9:,.1f} GB are free"
        )


def _load(path: Path, *, mmap: bool) -> Any:
    """What torch.save wrote, as far as it is tensors and plain containers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols, and of storages of before
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of torch, of whatever stands in the archive
        said = str(error).splitlines()[0] if str(error) else ""
        if type(error).__name__ != "UnpicklingError":
            got = f"what torch cannot read: {type(error).__name__}: {said}"
            raise _refused(path, got, "fetch the file again") from error
        blocked = _BLOCKED.search(str(error))
        raise RefusedError(
            f"{path} holds more than tensors, and nothing is unpickled: loading it runs whatever code is in it",
            got=f"a pickle that needs {blocked[1]}"
            if blocked
            else "a pickle of more than tensors and plain containers",
            expected=EXPECTED,
            next="where you trust it, write its weights again:\n"
            + _written_again(f"torch.load({str(path)!r}, weights_only=False)"),
        ) from error


def _written_again(found: str) -> str:
    """How the weights in a file are written so that they can be read here.

    Args:
        found: an expression that loads the file: a module, or a dictionary.
    """
    return (
        f"    import torch; from safetensors.torch import save_file; found = {found}\n"
        "    state = found if isinstance(found, dict) else found.state_dict()\n"
        "    for key in ('state_dict', 'model', 'net'): "
        "state = state[key] if isinstance(state.get(key), dict) else state\n"
        "    save_file({name: one.contiguous().clone() for name, one in state.items() if hasattr(one, 'contiguous')}, "
        "'weights.safetensors')"
    )


def _tensors_in(path: Path, document: Any) -> dict[str, Tensors]:
    """The dictionaries of tensors in what torch loaded.

    Raises:
        RefusedError: there are none.
    """
    found = dict(_walk(document, "", _DEPTH, set()))
    if found:
        return found
    if not isinstance(document, Mapping):
        got = f"a {type(document).__name__}"
    elif not document:
        got = "an empty state dict"
    elif any(isinstance(node, Mapping) and node.keys() >= _OPTIMIZER for node in (document, *document.values())):
        got = f"the state of an optimizer and no weights, under {_keys(document)}"
    else:
        got = f"no tensors by name, under {_keys(document)}"
    raise RefusedError(
        f"{path} holds no weights of a model",
        got=got,
        expected="a state dict: the names of weights, and tensors",
        next="save model.state_dict()",
    )


def _walk(node: Any, where: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensors]]:
    """Dictionaries with tensors by name, each once, from the outside in; the state of optimizers is none."""
    if not isinstance(node, Mapping) or depth < 0 or id(node) in seen or node.keys() >= _OPTIMIZER:
        return
    seen.add(id(node))
    tensors = {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield where, tensors
    for key, value in node.items():
        if isinstance(key, str):
            yield from _walk(value, f"{where}.{key}" if where else key, depth - 1, seen)


def _keys(document: Mapping[Any, Any]) -> str:
    return ", ".join(str(key) for key in list(document)[:5])
