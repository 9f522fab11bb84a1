"""Windows of the shuffle: chosen by what a node's cache may hold when a run begins, and the run's from then on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from akd_dist.base.errors import MachineError, RecipeError
from akd_dist.data.row_cache import prepare
from akd_dist.distill.orders import WINDOWS_AT_ONCE
from akd_dist.jobs.packing import Node
from akd_dist.jobs.planning.windows import Demands, Shuffle, check_window, choose, demands_of, settled, with_window
from akd_dist.jobs.run_folder import begin_run, check_same_run, run_identity
from akd_dist.recipe import Recipe
from tests.fleets import a_recipe, a_student

ROWS = {"train": 800, "validation": 100, "test": 100}
DEMANDS = Demands(ROWS, input_row=8, input_rows=0, view=1_000_000, views=3, row=10, piece_rows=100)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**10), st.integers(1, 8))
def test_two_groups_take_half_of_what_is_left_at_most(room: int, sharing: int) -> None:
    demands = replace(DEMANDS, view=10**9, sharing=sharing)
    try:
        window = demands.window(room)
    except ValueError:
        assert room < demands.least(room)
        return
    if window is None:
        assert room >= 1_000 + min(3, 2 * sharing) * 10**9
        return
    groups = 2 * WINDOWS_AT_ONCE * window * 10 * sharing
    assert groups <= (room - 1_000) / 2 < 2 * groups
    assert (window // 100).bit_count() == 1


@pytest.mark.parametrize(("room", "window"), [(2_001_000, None), (2_000_999, 6_400), (17_000, 100)])
def test_which_window_is_chosen(room: int, window: int | None) -> None:
    shuffle = choose(DEMANDS, room)
    assert shuffle.window == window
    assert ("would not fit" in shuffle.why) == (window is not None)


def test_what_fits_in_no_way_is_refused_with_need_and_budget() -> None:
    with pytest.raises(MachineError) as refused:
        choose(DEMANDS, 16_999)
    assert (refused.value.got, "17.0 kB" in str(refused.value.expected)) == ("17.0 kB that it may have", True)
    assert "AKD_DIST_CACHE_BUDGET" in str(refused.value.next)


def test_a_window_that_was_settled_needs_room_for_one_group() -> None:
    """What is chosen has room for the next one, too."""
    shuffle = choose(DEMANDS, 17_000)
    assert shuffle.window == 100
    check_window(DEMANDS, shuffle, 5_000)
    with pytest.raises(MachineError, match="no room for 4 windows of 100 rows") as refused:
        check_window(DEMANDS, shuffle, 4_999)
    assert "5.0 kB" in str(refused.value.expected)
    check_window(DEMANDS, shuffle, 9_000, workers=4)
    with pytest.raises(MachineError):
        check_window(DEMANDS, shuffle, 8_999, workers=2)
    check_window(DEMANDS, Shuffle(None, "as this run began"), 1_001_000)
    with pytest.raises(MachineError, match="no room for all rows and a view"):
        check_window(DEMANDS, Shuffle(None, "as this run began"), 1_000_999)
    odd = Shuffle(150, "as the recipe says")  # of which each touches three pieces of 100 rows at most
    check_window(DEMANDS, odd, 1_000 + 4 * 3 * 100 * 10)
    with pytest.raises(MachineError):
        check_window(DEMANDS, odd, 1_000 + 4 * 3 * 100 * 10 - 1)
    # Windows larger than the data need no more than the data.
    check_window(replace(DEMANDS, view=1_000), Shuffle(10**6, "as the recipe says"), 2_000)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 4), st.sampled_from([10, 100_000]))
def test_rows_that_leave_no_half_to_windows_are_read_by_windows(room: int, sharing: int, others: int) -> None:
    """And what two groups take, with pieces that do not end together, stays within half of what is left."""
    sizes = {"train": 10**8, "validation": others, "test": others}
    demands = replace(DEMANDS, splits=sizes, input_row=30, input_rows=64, view=10**9, sharing=sharing)
    held = demands.held(room)
    assert ("train" in held) == (10**8 + 2 * others <= room // 2)
    assert {"validation", "test"} <= held or 2 * others > room // 4
    try:
        window = demands.window(room)
    except ValueError:
        assert room < demands.least(room)
        return
    if window is None:
        assert demands.whole <= room
        return
    whole_pieces = (-(-window // 64) + (window % 64 > 0)) * 64  # of one more where windows do not end with pieces
    taken = window * 10 + (0 if "train" in held else whole_pieces * 30)
    assert 2 * WINDOWS_AT_ONCE * taken * sharing <= (room - sum(sizes[name] for name in held)) / 2


@st.composite
def any_demands(draw: st.DrawFn) -> Demands:
    """Rows that are fetched in blocks, or held; of few bytes and many, beside logits of few bytes and many."""
    sizes = st.integers(1, 20_000)
    rows, input_row, row = draw(sizes), draw(st.integers(1, 3_000)), draw(st.integers(1, 3_000))
    splits = {"train": rows * input_row, "validation": draw(sizes) * input_row, "test": draw(sizes) * input_row}
    pieces, blocks = draw(st.integers(1, 6_000)), draw(st.sampled_from([0, 64, 1_000, 4_096]))
    return Demands(splits, input_row, blocks, rows * row, draw(st.integers(1, 9)), row, pieces, draw(st.integers(1, 4)))


def named_bytes(refused: MachineError) -> int:
    """The room that a refusal asks for."""
    exact = re.search(r"\(([\d,]+) bytes\)", str(refused.expected))
    assert exact is not None
    return int(exact[1].replace(",", ""))


def check_named_room(accept: Callable[[int], object], room: int) -> None:
    """What is refused in this room is accepted in the room that the refusal names, and in none between."""
    try:
        accept(room)
    except MachineError as refused:
        named = named_bytes(refused)
    else:
        return
    assert named > room
    accept(named)
    with pytest.raises(MachineError) as short:
        accept(named - 1)
    assert named_bytes(short.value) == named


@settings(max_examples=500, deadline=None)
@given(any_demands(), st.floats(0, 1.2))
def test_the_room_that_a_choice_names_is_accepted(demands: Demands, share: float) -> None:
    check_named_room(lambda room: choose(demands, room), int(demands.whole * share))


@settings(max_examples=500, deadline=None)
@given(any_demands(), st.floats(0, 1.2), st.none() | st.integers(1, 30_000), st.integers(1, 2))
def test_the_room_that_a_settled_window_needs_is_accepted(
    demands: Demands, share: float, window: int | None, workers: int
) -> None:
    room, settled_so = int(demands.whole * share), Shuffle(window, "as the recipe's data.window says")
    check_named_room(lambda room: check_window(demands, settled_so, room, workers=workers), room)
    try:
        check_window(demands, settled_so, room, workers=workers)
    except MachineError as refused:
        advice = str(refused.next)
    else:
        return
    told = re.search(r"another data.window in the recipe, (\d+) for example", advice)
    if told is not None:
        check_window(demands, replace(settled_so, window=int(told[1])), room, workers=workers)
    elif "without data.window" in advice:
        assert choose(demands, room).window is None
    else:
        assert "no data.window would do" in advice
        for other in {1, demands.piece_rows, demands.input_rows or 1, 777, 4_096, 10**6}:
            with pytest.raises(MachineError):
                check_window(demands, replace(settled_so, window=other), room, workers=workers)


def test_a_larger_room_in_which_more_is_held_may_be_refused_and_names_a_larger_one() -> None:
    """72 MB of rows: with 10 MB less was named than a node that has as much goes on to ask for."""
    sizes = {"train": 72_000_000, "validation": 2_000_000, "test": 2_000_000}
    demands = Demands(sizes, 3_600, 4_096, view=800_000, views=3, row=40, piece_rows=1_280)
    for room in (10_000_000, 40_000_000):
        check_named_room(lambda room: choose(demands, room), room)


def test_a_window_that_would_fit_is_named() -> None:
    """Windows that do not end with blocks touch one more each: 3,000 rows two blocks of 4,096, and 4,096 rows one."""
    sizes = {"train": 10**9, "validation": 10**7, "test": 10**7}
    demands = Demands(sizes, 1_000, 4_096, view=40_000_000, views=3, row=40, piece_rows=1_024)
    given = Shuffle(3_000, "as the recipe's data.window says")
    with pytest.raises(MachineError, match="no room for 4 windows of 3,000 rows") as refused:
        check_window(demands, given, 20_000_000)
    assert "another data.window in the recipe, 4096 for example" in str(refused.value.next)
    check_window(demands, replace(given, window=4_096), 20_000_000)
    with pytest.raises(MachineError) as hopeless:
        check_window(demands, given, 1_000_000)
    assert "no data.window would do" in str(hopeless.value.next)


@pytest.fixture
def recipe() -> Recipe:
    return a_recipe([a_student("one"), a_student("two", threads=2), a_student("three")])


def test_what_students_read(recipe: Recipe, tmp_path: Path) -> None:
    splits = prepare(recipe.data, tmp_path)
    rows = len(splits.train)
    demands = demands_of(recipe, splits, recipe.students, [Node("small", 1), Node("large", 2)])
    sizes = {name: getattr(splits, name).nbytes for name in ("train", "validation", "test")}
    assert demands == Demands(sizes, splits.train.row_bytes, 0, rows * 40, 2, 40, 256, sharing=2)
    assert demands_of(recipe, splits, recipe.students, [Node("huge", 64)]).sharing == 3
    assert demands_of(recipe, splits, [], []).sharing == 1


def test_a_run_keeps_the_window_that_it_began_with(recipe: Recipe, tmp_path: Path) -> None:
    """Under any budget; a recipe that says another one is another recipe."""
    splits, run = prepare(recipe.data, tmp_path / "cache"), tmp_path / "run"
    assert settled(recipe, run, fresh=False) is None
    for window in (512, None):
        chosen = with_window(recipe, choose(DEMANDS, 2_001_000)) if window is None else windowed(recipe, window)
        begin_run(run, chosen, run_identity(chosen, splits))
        assert json.loads((run / "identity.json").read_bytes())["data"]["window"] == window
        kept = settled(recipe, run, fresh=False)
        assert kept is not None
        assert (kept.window, kept.why) == (window, "as this run began")
        check_same_run(run, recipe, run_identity(with_window(recipe, kept), splits))
        assert settled(recipe, run, fresh=True) is None
        given = windowed(recipe, 64)
        said = settled(given, run, fresh=False)
        assert said is not None
        assert said.window == 64
        with pytest.raises(RecipeError, match="was made from another recipe"):
            check_same_run(run, given, run_identity(with_window(given, said), splits))


@pytest.mark.parametrize(
    "left", ["", "{", "[]", '{"data": 3}', '{"data": {"window": "x"}}', '{"data": {"window": -1}}']
)
def test_a_damaged_identity_settles_nothing_odd(left: str, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "identity.json").write_text(left)
    found = settled(recipe, tmp_path, fresh=False)
    assert found is None or found.window is None


def windowed(recipe: Recipe, window: int) -> Recipe:
    document: dict[str, Any] = recipe.model_dump(mode="json")
    document["data"]["window"] = window
    return Recipe.model_validate(document).own()
