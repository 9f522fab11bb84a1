"""Shards dealt out to tasks: each once, one at first, then as many as take some seconds, few at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from akd_dist.jobs.shard_tasks import TASK_SECONDS, ShardTasks
from akd_dist.storage.layout import StoreLayout

LAYOUT = StoreLayout(views=4, rows=100_000, classes=10, dtype="float32")


def took(seconds: float) -> list[Any]:
    return [SimpleNamespace(seconds=seconds)]


@pytest.mark.parametrize("seconds", [0.01, 1.0, 60.0])
def test_every_shard_is_dealt_once_and_the_last_ones_singly(seconds: float) -> None:
    tasks = ShardTasks(lambda: 2)
    tasks.add("train rows", "train", LAYOUT.shards())
    tasks.add("test rows", "test", LAYOUT.shards()[:1])
    assert (tasks.count, tasks.rows) == (LAYOUT.shard_count + 1, 400_000 + LAYOUT.shard_rows)
    dealt = []
    for task in tasks:
        dealt.append(task)
        tasks.took(took(seconds))
    shards = [(task.job, shard) for task in dealt for shard in task.item]
    assert len(set(shards)) == len(shards) == LAYOUT.shard_count + 1
    assert tasks.count == 0
    assert dealt[0].size == dealt[-1].size == 1
    assert all(task.size * seconds <= max(seconds, TASK_SECONDS) for task in dealt)
    assert (max(task.size for task in dealt) > 1) == (seconds < TASK_SECONDS)
    assert str(dealt[0].item[0]) in dealt[0].name


def test_rows_are_not_cut_between_tasks_where_a_task_holds_them() -> None:
    tasks = ShardTasks(lambda: 1)
    tasks.took(took(TASK_SECONDS / 7))
    tasks.add("train rows", "train", LAYOUT.shards())
    first = next(iter(tasks))
    assert [(shard.index, shard.view) for shard in first.item] == [(0, view) for view in range(4)]


def test_what_was_found_and_not_computed_says_nothing_of_time() -> None:
    tasks = ShardTasks(lambda: 1)
    tasks.add("train rows", "train", LAYOUT.shards())
    tasks.took(took(0.0))
    assert next(iter(tasks)).size == 1
