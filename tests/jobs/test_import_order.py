"""Logits whose rows are in another order than the data, or of other rows: noticed, and told which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from akd_dist.base.errors import RefusedError
from akd_dist.data.logit_checks import Order, look_at_order
from akd_dist.data.parquet_files import out_of_order
from akd_dist.data.source_rows import source_rows
from tests.imported_logits import CLASSES, IDS, LABELS, ROWS, Home, Z, logits, refused

pytestmark = pytest.mark.usefixtures("own_process_state")
PARTS = [f"part-{number}.parquet" for number in range(12)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("orders"))


def written(folder: Path, names: list[str], table: Any) -> Path:
    """A table cut into files of these names, in this order."""
    folder.mkdir()
    cuts = np.linspace(0, len(table), len(names) + 1).astype(int)
    for name, start, stop in zip(names, cuts[:-1], cuts[1:], strict=True):
        pq.write_table(table.slice(start, stop - start), folder / name)
    return folder


def test_another_order_is_noticed_by_the_labels(home: Home) -> None:
    assert "look shuffled" in refused(home, Z[np.random.default_rng(3).permutation(ROWS)])
    assert "one row before its place" in refused(home, np.roll(Z, 1, axis=0))
    assert "2 rows after its place" in refused(home, np.roll(Z, -2, axis=0))
    assert "reverse" in refused(home, Z[::-1])
    assert "sorted by label" in refused(home, Z[np.argsort(LABELS, kind="stable")])
    assert "column 0 is class 1" in refused(home, Z[:, [1, 0, 2, 3]])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_in_another_order_is_noticed_among_the_others(home: Home, split: str) -> None:
    rows = source_rows(home.recipe().data)[split].rows
    moved = Z.copy()
    moved[rows] = Z[np.random.default_rng(4).permutation(rows)]
    assert f"bad.npy of the {split} rows look shuffled" in refused(home, moved)
    moved[rows] = Z[rows[::-1]]
    assert f"bad.npy of the {split} rows does not fit the labels as it is" in refused(home, moved)


def test_few_rows_of_a_weak_teacher_are_no_shuffled_ones() -> None:
    together = Order(0.35, 0.25, 800, informative=True)
    assert Order(0.27, 0.25, 80, informative=True).at_chance
    assert not Order(0.27, 0.25, 80, informative=True).worse_than(together)


def test_rows_that_are_shifted_from_some_row_on_are_found() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    said = labels.copy()
    said[3000:] = np.roll(labels, 1)[3000:]
    order = look_at_order(said, labels, 10, "classification", keyed=False)
    assert order.explained is not None
    assert "from about 3,000 on" in order.explained
    by_class = np.sort(labels)  # where a shift changes hardly anything, none is seen
    assert look_at_order(by_class, by_class, 10, "classification", keyed=False).explained is None


def test_a_weak_teacher_is_no_shuffled_one() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 100, 20_000)
    said = np.where(generator.random(20_000) < 0.05, labels, generator.integers(0, 100, 20_000))
    assert not look_at_order(said, labels, 100, "classification", keyed=False).at_chance
    few = look_at_order(said[:30], labels[:30], 100, "classification", keyed=False)
    assert not few.at_chance
    assert few.explained is None


def test_numbers_in_names_are_compared_as_numbers() -> None:
    assert out_of_order(["part-10.parquet", "part-2.parquet"]) == ("part-10.parquet", "part-2.parquet")
    assert out_of_order(["a/9/b-1", "a/10/b-0"]) is None
    assert out_of_order(["a/10/b-0", "a/9/b-1"]) is not None
    assert out_of_order(sorted(["a", "a1", "a-1", "1", "01", "b/2", "part-00002-of-00010"])) is None
    assert out_of_order([]) is None


def test_parts_out_of_order_are_refused_unless_the_source_has_the_same(home: Home, tmp_path: Path) -> None:
    table = pa.table({"id": IDS, "logits": list(Z)})
    parts = written(tmp_path / "parts", PARTS, table)
    with pytest.raises(RefusedError) as caught:
        home.bring(parts)
    assert "part-1.parquet before" not in str(caught.value)
    assert "part-11.parquet before part-2.parquet" in str(caught.value)
    assert "zeros in front" in str(caught.value)
    assert "--key" in str(caught.value)
    by_key = home.bring(parts, key="id").teacher
    whole = home.bring(home.save(Z)).teacher
    assert by_key == whole
    assert home.bring(written(tmp_path / "padded", [f"part-{one:02}.parquet" for one in range(12)], table)) is not None
    # Parts of data and of logits that are called alike follow one another, in whatever order.
    data = written(tmp_path / "data", PARTS, pq.read_table(home.root / "data.parquet"))
    recipe = home.recipe(train={"kind": "parquet", "path": str(data)})
    found = home.bring(parts, recipe)
    assert found.splits["train"].agreement > 0.9
    assert any("part-11.parquet before part-2.parquet" in line for line in found.warnings)
    with pytest.raises(RefusedError, match=r"go by the names of its files, part-11\.parquet before part-2\.parquet"):
        home.bring(home.save(Z), recipe)


def test_rows_that_are_shuffled_among_the_others_are_named(home: Home) -> None:
    moved = Z.copy()
    moved[260:520] = Z[260 + np.random.default_rng(2).permutation(260)]
    told = refused(home, moved)
    assert "some of the rows in" in told
    assert "the others in 9" in told
    rows = source_rows(home.recipe().data)["train"].rows
    third = rows[: len(rows) // 3]
    moved = Z.copy()
    moved[third] = Z[np.random.default_rng(2).permutation(third)]
    assert "look shuffled" in refused(home, moved)


@pytest.mark.parametrize("rows", [300, 5_000])
@pytest.mark.parametrize("right", [0.6, 0.99])
def test_a_shuffled_block_is_found_to_about_a_part(rows: int, right: float) -> None:
    generator = np.random.default_rng(rows)
    labels = generator.integers(0, 10, rows)
    said = np.where(generator.random(rows) < right, labels, generator.integers(0, 10, rows))
    assert look_at_order(said, labels, 10, "classification", keyed=False).shuffled is None
    third = slice(rows // 3, 2 * rows // 3)
    moved = said.copy()
    moved[third] = generator.permutation(said[third])
    found = look_at_order(moved, labels, 10, "classification", keyed=False).shuffled
    assert found is not None
    start, stop = (int(word.replace(",", "")) for word in found.split(" agree")[0].removeprefix("about ").split(" to "))
    assert abs(start - third.start) <= rows // 20
    assert abs(stop - third.stop) <= rows // 20
    assert look_at_order(moved, labels, 10, "classification", keyed=True).shuffled is None


def test_what_a_teacher_does_not_know_is_no_shuffled_block() -> None:
    generator = np.random.default_rng(0)
    by_class = np.sort(generator.integers(0, 10, 5_000))
    never = np.where(by_class == 7, generator.integers(0, 7, 5_000), by_class)  # no order would make them right
    assert look_at_order(never, by_class, 10, "classification", keyed=False).shuffled is None
    mostly = (generator.random(5_000) < 0.05).astype(np.int64)  # one class is nearly all: any order agrees
    assert look_at_order(generator.permutation(mostly), mostly, 2, "classification", keyed=False).shuffled is None


def test_logits_of_another_split_of_as_many_rows_are_told(home: Home, tmp_path: Path) -> None:
    generator = np.random.default_rng(9)
    others = generator.integers(0, CLASSES, ROWS)
    numbers = generator.normal(size=(ROWS, 3)).astype(np.float32)
    pq.write_table(pa.table({"id": IDS, "input": list(numbers), "label": others}), tmp_path / "test.parquet")
    test = {"kind": "parquet", "path": str(tmp_path / "test.parquet")}
    theirs = (3 * np.eye(CLASSES)[others] + generator.normal(size=(ROWS, CLASSES))).astype(np.float32)
    recipe = home.recipe(test=test)
    with pytest.raises(RefusedError) as caught:
        home.bring(home.save(theirs), recipe, stores="none")
    assert "has the logits of the test rows, and not of the train rows" in str(caught.value)
    assert "give --split test" in str(caught.value)
    with pytest.raises(RefusedError, match="leave --split out"):
        home.bring(home.save(Z), recipe, split="test")
    found = home.bring(home.save(theirs), recipe, split="test", dry_run=True)
    assert found.joined_by == "order: all rows of data.test"
    assert found.rows == {"train": 720, "validation": 80, "test": ROWS}
    (line,) = found.warnings
    assert line.startswith(f"as many ({ROWS}) are all rows of data.train: labels alone tell")


def test_probabilities_in_percent_are_no_logits(home: Home) -> None:
    shares = np.exp(logits(4))
    shares /= shares.sum(axis=1, keepdims=True)
    for rows in (100 * shares, np.round(100 * shares)):
        told = refused(home, rows.astype(np.float32))
        assert "holds probabilities, in percent" in told
        assert "divided by 100" in told
    assert "holds probabilities\n" in refused(home, np.round(shares, 2).astype(np.float32))
