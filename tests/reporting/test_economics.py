"""What a store saves, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from akd_dist.recipe import AnnealingKD, HardLabels, Kd, Mlp, StudentSpec
from akd_dist.reporting.economics import StudentUsage, economics, reading
from akd_dist.reporting.page import render
from akd_dist.storage.reader import LogitStore, open_store
from akd_dist.storage.writer import create_store, seal_store, write_shard
from tests import stores
from tests.made_runs import TRAINED, fleet_of, run_of, student


def test_what_a_student_read_of_its_teacher() -> None:
    annealed = StudentSpec(
        model=Mlp(hidden=8), objective=AnnealingKD(tau_max=4, stage1_epochs=12, stage2_epochs=8), **TRAINED
    )
    assert reading(annealed, 20, None) == StudentUsage(12, 0)
    assert reading(annealed, 5, None) == StudentUsage(5, 0)  # one that diverged
    assert reading(annealed, 20, "leader") == StudentUsage(0, 12)
    plain = StudentSpec(model=Mlp(hidden=8), objective=HardLabels(epochs=20), **TRAINED)
    assert reading(plain, 20, None) == StudentUsage(0, 0)
    kd = StudentSpec(model=Mlp(hidden=8), objective=Kd(epochs=3), **TRAINED)
    assert reading(kd, 3, None) == StudentUsage(3, 0)


def store_of(root: Path, rows: int, views: int, times: list[float]) -> LogitStore:
    """A sealed store whose shards took these seconds."""
    creation = stores.creation(rows=rows, views=views)
    writer = create_store(str(root), creation)
    for shard, time in zip(writer.layout.shards(), times, strict=True):
        logits = np.zeros((shard.rows, creation.identity.classes), np.float32)
        write_shard(writer, shard, logits, label_agreement=0.5, probes=[], seconds=time)
    seal_store(writer)
    return open_store(writer.uri)


def test_economics_by_hand(tmp_path: Path) -> None:
    """Shards of 4, 1 and 1 s: the first one loaded the teacher, which a pass in the loop does not do."""
    train = store_of(tmp_path / "train", 100, 3, [4.0, 1.0, 1.0])
    test = store_of(tmp_path / "test", 50, 1, [0.5])
    readings = [StudentUsage(12, 0), StudentUsage(8, 0), StudentUsage(0, 12), StudentUsage(0, 0)]
    balance = economics("teacher", "cnn-8", {"train": train, "test": test}, readings, 7.0)
    assert (balance.passes_run, balance.epochs, balance.passes_saved) == (3, 20, 17)
    assert (balance.students, balance.shared_epochs) == (2, 12)
    assert (balance.seconds_per_pass, balance.cache_seconds) == (1.0, 6.5)
    assert (balance.in_the_loop_seconds, balance.seconds_saved) == (20.0, 13.5)
    assert balance.break_even_students == 0.65  # 6.5 s, at 10 s a student
    assert balance.break_even_epochs == 6.5
    one, whole = balance.by_views
    assert (one.cache_seconds, one.break_even_students) == (2.5, 0.25)
    assert whole.cache_seconds == balance.cache_seconds
    text = render(run_of(dict(fleet_of(student("mlp-8", "kd", 0, None)), economics=[balance.plain()])))
    assert "<strong>0.65 students</strong>" in text
    assert "<strong>14 s</strong>" in text
    assert "with one view stored instead of 3" in text


def test_a_store_that_nobody_read_or_timed(tmp_path: Path) -> None:
    unread = economics("teacher", "cnn", {"train": store_of(tmp_path, 100, 1, [1.0])}, [StudentUsage(0, 0)])
    assert (unread.break_even_students, unread.seconds_saved) == (None, -1.0)
    untimed = economics("teacher", "cnn", {"train": store_of(tmp_path / "b", 100, 2, [0.0, 0.0])}, [StudentUsage(3, 0)])
    assert (untimed.seconds_per_pass, untimed.cache_seconds, untimed.by_views) == (None, None, [])
    assert untimed.passes_saved == 1
    quick = economics(
        "teacher", "cnn", {"train": store_of(tmp_path / "c", 100, 2, [0.0003, 0.002])}, [StudentUsage(3, 0)]
    )
    assert quick.timed_rows == 200, "a shard of less than a millisecond was timed, too"
    text = render(run_of(dict(fleet_of(student("mlp-8", "kd", 0, None)), economics=[unread.plain(), untimed.plain()])))
    assert text.count("never: nobody read it") == 1
    assert text.count("No shard of this store was timed") == 1
