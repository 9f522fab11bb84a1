"""Checkpoints: whole or refused, the last two kept, the one before taken when the newest is damaged."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from akd_dist.base.errors import DamagedError
from akd_dist.distill.checkpoint import checkpoints, decode, encode, newest_checkpoint, read_header, save_checkpoint
from akd_dist.jobs.planning.plan import position
from tests.fleets import newest_tree


def a_tree() -> dict[str, Any]:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "loss": 0.1,
    }


def test_what_is_not_ours_is_no_checkpoint(tmp_path: Path) -> None:
    names = ["999999-00000001-0001", "1000000-00000000-0001"]
    for name in names:
        save_checkpoint(tmp_path, name, {"name": name})
    for other in ("backup.ckpt", "x-y.ckpt", "1-.ckpt", "²-1.ckpt", "000001-00000001-0001.ckpt.bak"):
        (tmp_path / other).touch()
    assert [path.stem for path in checkpoints(tmp_path)] == names  # by number: as text a million comes first
    assert newest_checkpoint(tmp_path) == (tmp_path / f"{names[-1]}.ckpt", {"name": names[-1]})
    assert position(tmp_path) == (1_000_000, 0)
    (tmp_path / "backup.ckpt").rename(tmp_path / "1.ckpt")
    assert position(tmp_path) == (1_000_000, 0)


def test_round_trip_gives_the_same_bytes() -> None:
    tree = a_tree()
    again = decode(encode(tree))
    assert encode(again) == encode(tree)
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), fused=True)
    optimizer.load_state_dict(again["optimizer"])
    assert again["loss"] == 0.1
    assert again["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    data, draw = encode(a_tree()), random.Random(0)
    for _ in range(400):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        with pytest.raises(DamagedError):
            decode(bytes(damaged))
    for length in [0, 1, 8, 72, len(data) - 1, *(draw.randrange(len(data)) for _ in range(50))]:
        with pytest.raises(DamagedError):
            decode(data[:length])


def test_the_last_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for number in range(4):
        save_checkpoint(tmp_path, f"{number:04d}", {"number": number})
    assert [path.stem for path in checkpoints(tmp_path)] == ["0002", "0003"]
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    told: list[str] = []
    assert newest_checkpoint(tmp_path, tell=told.append) == (tmp_path / "0002.ckpt", {"number": 2})
    assert [text.endswith("0003.ckpt is damaged; falling back to the one before") for text in told] == [True]
    for number in (4, 5):  # the damaged one does not count as one of the last two
        save_checkpoint(tmp_path, f"{number:04d}", {"number": number})
        assert len(checkpoints(tmp_path)) == 2
    for path in checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(DamagedError, match=r"0005\.ckpt, 0004\.ckpt|0004\.ckpt, 0005\.ckpt") as refused:
        newest_checkpoint(tmp_path)
    assert refused.value.code == 5


def test_the_head_tells_what_is_no_tensor(tmp_path: Path) -> None:
    tree = {"epoch": 3, "stage1_from": "leader", "best": None, "module": {"weight": torch.zeros(1000)}, "rng": [1]}
    path = save_checkpoint(tmp_path, "000003", tree)
    assert read_header(path) == {"epoch": 3, "stage1_from": "leader", "best": None}
    whole = path.read_bytes()
    for length in (0, 8, 72, 76, 80, 100):
        path.write_bytes(whole[:length])
        assert read_header(path) == {}
    assert read_header(tmp_path / "none.ckpt") == {}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None


def test_a_kill_while_saving_leaves_the_one_before(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from akd_dist.distill.checkpoint import save_checkpoint\n"
        "for n in range(3): save_checkpoint(Path(sys.argv[1]), f'{n:04d}', {'number': n})"
    )
    environment = os.environ | {"AKD_FAILPOINT": "checkpoint.before_save:3"}
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert newest_tree(tmp_path) == {"number": 1}
