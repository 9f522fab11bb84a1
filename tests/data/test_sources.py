"""Sources: the same rows from every kind of place are the same dataset; each kind's own ways in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from akd_dist import recipe
from akd_dist.base.errors import MachineError, RefusedError
from akd_dist.data import hub
from akd_dist.data.columns import inputs_of
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import SPLITS, Splits
from akd_dist.data.sources.kinds import kind_of
from akd_dist.data.text import BEGIN, END, PADDING
from akd_dist.recipe import ByteText, CustomData, DataSpec, HuggingFaceData, HuggingFaceText, Idx, Parquet
from tests import sources
from tests.fleets import own
from tests.sources import KINDS, idx, idx_bytes, source
from tests.tokenizers import a_tokenizer

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 1, 3, 5), dtype=np.uint8)
LABELS = [0, 1, 2, 3] * 5


@pytest.fixture
def cache_root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def all_rows(train: Any, cache_root: Path, **data: Any) -> Splits:
    """Splits whose train rows are all rows of the source, in its order."""
    return prepare(DataSpec(train=train, validation=train, test=train, **data), cache_root)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_are_the_same_dataset_from_every_source(kind: str, tmp_path: Path, cache_root: Path) -> None:
    splits = all_rows(source(kind, tmp_path, IMAGES, LABELS), cache_root)
    for name in SPLITS:
        np.testing.assert_array_equal(getattr(splits, name).inputs, IMAGES)
        assert getattr(splits, name).labels.tolist() == LABELS
    assert (splits.train.inputs.dtype.name, splits.train.labels.dtype.name, splits.train.classes) == (
        "uint8",
        "int64",
        4,
    )
    assert splits.train.fingerprint == FINGERPRINT


FINGERPRINT = "b96eceab45547621873969578af4756707d0aefb6eaec46f7e9d01df221c2e99"


@pytest.mark.parametrize(("start", "stop", "most"), [(0, 20, 7), (5, 13, 3), (4, 5, 9), (11, 99, 4), (7, 7, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_of_rows_is_read_alone(kind: str, start: int, stop: int, most: int, tmp_path: Path) -> None:
    opened = kind_of(source(kind, tmp_path, IMAGES, LABELS)).open()
    for reader in filter(None, (opened.blocks, opened.label_blocks)):
        blocks = list(reader(most, start, stop))
        assert all(0 < len(block) <= most for block in blocks)
        assert [row for block in blocks for row in block.rows.tolist()] == list(range(20))[start:stop]
        assert [label for block in blocks for label in block.labels.to_pylist()] == LABELS[start:stop]
    for block in opened.blocks(most, start, stop):
        converted = inputs_of(block.inputs, block.start, opened.input_place, None, None, recipe.Image())(
            block.inputs, block.rows
        )
        np.testing.assert_array_equal(converted, IMAGES[block.rows])
    cuts = {"parquet": [0, 4, 8, 12, 16], "idx.gz": [0]}.get(kind)
    assert (None if opened.cuts is None else opened.cuts.tolist()) == cuts


# ---- IDX


@pytest.mark.parametrize(("shape", "expected"), [((4,), (4,)), ((4, 6), (1, 4, 6)), ((3, 4, 6), (3, 4, 6))])
def test_idx_images_have_a_channel(
    shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path, cache_root: Path
) -> None:
    values = RNG.integers(0, 256, (10, *shape), dtype=np.uint8)
    spec = idx(tmp_path / "data", idx_bytes(values), idx_bytes(np.arange(10, dtype=np.int32) % 3))
    splits = all_rows(spec, cache_root)
    assert splits.train.shape == expected
    np.testing.assert_array_equal(splits.train.inputs.reshape(values.shape), values)
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_idx_files_may_declare_classes_and_hold_numbers(tmp_path: Path, cache_root: Path) -> None:
    values = np.linspace(-1, 1, 20)
    spec = idx(tmp_path / "data.gz", idx_bytes(IMAGES), idx_bytes(values))
    labels = all_rows(spec, cache_root, task="regression").train.labels
    np.testing.assert_array_equal(labels, values.astype(np.float32))
    few = idx(tmp_path / "few", idx_bytes(IMAGES), idx_bytes(np.zeros(20, dtype=np.uint8)), classes=7)
    assert all_rows(few, cache_root).train.classes == 7


# ---- Hugging Face datasets


def a_dict(folder: Path) -> str:
    """A folder with two splits, class names and encoded images."""
    datasets = hub.require_extra("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat", "ant"])})
    pictures = [Image.fromarray(np.full((4, 4, 3), shade, np.uint8)) for shade in range(6)]
    whole = hub.require_extra("datasets").Dataset.from_dict(
        {"image": pictures, "label": [0, 1, 2, 0, 1, 2]}, features=features
    )
    hub.require_extra("datasets").DatasetDict({"train": whole, "test": whole.select([5, 0])}).save_to_disk(str(folder))
    return str(folder)


def test_a_saved_dataset_has_splits_images_and_class_names(tmp_path: Path, cache_root: Path) -> None:
    path = a_dict(tmp_path / "animals")
    train, test = (HuggingFaceData(path=path, split=split, input="image") for split in ("train", "test"))
    splits = prepare(DataSpec(train=train, validation=test, test=test), cache_root)
    assert splits.train.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert splits.test.inputs[:, 0, 0, 0].tolist() == [5, 0]
    assert splits.test.labels.tolist() == [2, 0]
    assert splits.train.class_names == ("dog", "cat", "ant")
    assert splits.train.classes == 3
    assert prepare(DataSpec(train=train, validation=test, test=test), cache_root).test.class_names == (
        "dog",
        "cat",
        "ant",
    )
    with pytest.raises(RefusedError, match="holds several splits") as refused:
        all_rows(HuggingFaceData(path=path, input="image"), cache_root)
    assert refused.value.expected == "one of train, test"
    with pytest.raises(RefusedError, match="has no such split"):
        all_rows(HuggingFaceData(path=path, input="image", split="dev"), cache_root)


def test_class_names_survive_in_parquet(tmp_path: Path, cache_root: Path) -> None:
    dataset = hub.require_extra("datasets").load_from_disk(a_dict(tmp_path / "animals"))["train"]
    dataset.to_parquet(str(tmp_path / "animals.parquet"))
    splits = all_rows(Parquet(path=str(tmp_path / "animals.parquet"), input="image"), cache_root)
    assert splits.train.class_names == ("dog", "cat", "ant")
    assert splits.train.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_dataset_that_was_selected_or_shuffled_keeps_its_order(tmp_path: Path, cache_root: Path) -> None:
    rows = hub.require_extra("datasets").Dataset.from_dict({"input": [[n, n] for n in range(10)], "label": [0, 1] * 5})
    rows.select([9, 3, 4, 0]).save_to_disk(str(tmp_path / "some"))
    splits = all_rows(HuggingFaceData(path=str(tmp_path / "some")), cache_root)
    assert splits.train.inputs[:, 0].tolist() == [9, 3, 4, 0]


def test_a_hub_that_cannot_be_reached_is_told_at_once(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="cannot be had from the hub"):
        all_rows(HuggingFaceData(name="some/data", split="train"), cache_root)


def test_folders_of_parquet_files_may_be_called_like_one(tmp_path: Path, cache_root: Path) -> None:
    """As others write them: a folder part.parquet of files, or several of these in a folder."""
    made = sources.parquet(tmp_path / "birds" / "part.parquet", pa.table({"input": [[1.0]] * 20, "label": LABELS}))
    Path(made.path).with_name("._part.parquet").write_bytes(b"what a system left there")
    place = Parquet(path=str(Path(made.path).parent.parent))
    assert len(all_rows(place, cache_root).train) == len(LABELS)


# ---- the user's own


ITEMS: dict[str, list[Any]] = {
    "arrays": list(IMAGES),
    "tensors": [torch.from_numpy(image) for image in IMAGES],
    "images": [Image.fromarray(image[0]) for image in IMAGES],
}


def test_numbers_of_half_precision_are_numbers(tmp_path: Path, cache_root: Path) -> None:
    """NumPy has no bfloat16."""
    half = [torch.from_numpy(image).to(torch.bfloat16) for image in IMAGES]
    train = all_rows(sources.dataset(tmp_path, half, LABELS), cache_root).train
    np.testing.assert_array_equal(train.inputs, np.stack([one.float().numpy() for one in half]))


@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("label", [int, np.int64, torch.tensor], ids=["int", "numpy", "tensor"])
def test_items_may_be_of_many_types(kind: str, label: Any, tmp_path: Path, cache_root: Path) -> None:
    splits = all_rows(sources.dataset(tmp_path, ITEMS[kind], [label(one) for one in LABELS]), cache_root)
    np.testing.assert_array_equal(splits.train.inputs, IMAGES)
    assert splits.train.fingerprint == FINGERPRINT


def test_a_torch_dataset_is_asked_for_each_item_once(tmp_path: Path, cache_root: Path) -> None:
    """And once more for its first, to see what items are like."""

    class Counting(torch.utils.data.Dataset[Any]):
        asked: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, row: int) -> tuple[torch.Tensor, float]:
            self.asked.append(row)
            return torch.full((2,), float(row)), row / 2

    splits = prepare(DataSpec(train=sources.table(tmp_path, Counting()), task="regression"), cache_root)
    sample = np.linspace(0, 999, 18).astype(int).tolist()  # read twice: whether items are the same again
    assert sorted(Counting.asked) == sorted([0, *sample, *sample, *range(1000)])
    np.testing.assert_array_equal(splits.train.inputs[:, 0] / 2, splits.train.labels)


@pytest.mark.parametrize("kind", ["table", "reader", "batch stream"])
def test_a_function_may_return_anything_that_is_an_arrow_stream(kind: str, tmp_path: Path, cache_root: Path) -> None:
    whole = pa.table({"input": pa.array(IMAGES.reshape(20, -1).tolist(), pa.list_(pa.uint8())), "label": LABELS})
    made: Any = {"table": whole, "reader": whole.to_reader(max_chunksize=7), "batch stream": RowStream(whole)}[kind]
    again = made if kind != "reader" else None
    spec = sources.table(tmp_path, made, shape=[1, 3, 5])
    splits = prepare(DataSpec(train=spec, validation=0.2, test=0.2), cache_root)
    assert splits.train.shape == (1, 3, 5)
    assert len(splits.train) == 12
    assert again is None or prepare(DataSpec(train=spec, validation=0.2, test=0.2), cache_root).train.classes == 4


class RowStream:
    """Not of pyarrow, and an Arrow stream all the same."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.table.__arrow_c_stream__(requested_schema)


def test_arguments_and_the_modules_file_belong_to_the_key(tmp_path: Path, cache_root: Path) -> None:
    code = "import numpy as np\ndef make(shade):\n    return [(np.full((2,), shade, np.uint8), 0)] * 10\n"
    name = sources.module(tmp_path, code)
    spec = CustomData(factory=f"{name}:make")
    shades = [own(spec.model_copy(update={"arguments": {"shade": shade}}), tmp_path) for shade in (1, 2)]
    data = [DataSpec(train=one) for one in shades]
    prepared = [prepare(one, cache_root).train for one in data]
    assert [rows.inputs.max() for rows in prepared] == [1, 2]
    assert prepare(data[0], cache_root).train.folder == prepared[0].folder
    (tmp_path / f"{name}.py").write_text(code + "\n")
    assert prepare(data[0], cache_root).train.folder != prepared[0].folder


# ---- text


def texts(folder: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), folder / "texts.parquet")
    return str(folder / "texts.parquet")


def test_a_column_of_text_becomes_tokens(tmp_path: Path, cache_root: Path) -> None:
    path = texts(tmp_path, input=["a", "bc"] * 5, label=[0, 1] * 5)
    rows = all_rows(Parquet(path=path), cache_root, text=ByteText(length=4)).train
    assert rows.inputs[:2].tolist() == [[BEGIN, ord("a"), END, PADDING], [BEGIN, ord("b"), ord("c"), END]]
    assert rows.inputs.dtype == np.int32
    assert rows.tokens is not None
    assert rows.tokens.vocabulary == 260
    assert all_rows(Parquet(path=path), cache_root, text=ByteText(length=4)).train.tokens == rows.tokens


def test_two_columns_are_a_pair_from_a_table_and_from_items(tmp_path: Path, cache_root: Path) -> None:
    one, other = ["ab", "c"] * 5, ["d", "ef"] * 5
    path = texts(tmp_path, one=one, other=pa.array(other).dictionary_encode(), label=[0, 1] * 5)
    items = sources.dataset(tmp_path, list(zip(one, other, strict=True)), [0, 1] * 5)
    text = ByteText(length=7)
    rows = all_rows(Parquet(path=path, input=["one", "other"]), cache_root, text=text).train
    assert rows.inputs[0].tolist() == [BEGIN, ord("a"), ord("b"), END, ord("d"), END, PADDING]
    assert all_rows(items, cache_root, text=text).train.fingerprint == rows.fingerprint


def test_text_through_a_hugging_face_tokenizer(tmp_path: Path, cache_root: Path) -> None:
    text = HuggingFaceText(path=str(a_tokenizer(tmp_path, types=True)), length=6)
    path = texts(tmp_path, a=["red", "green"] * 5, b=["blue", "red red"] * 5, label=[0, 1] * 5)
    rows = all_rows(Parquet(path=path, input=["a", "b"]), cache_root, text=text).train
    assert rows.inputs[0].tolist() == [[2, 5, 3, 7, 3, 0], [0, 0, 0, 1, 1, 0]]
    assert rows.tokens is not None
    assert rows.tokens.mask == 4


# ---- labels


def labelled(folder: Path, labels: Any, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"input": [[1.0, 2.0]] * len(labels), "label": labels}), folder / "labels.parquet")
    return Parquet(path=str(folder / "labels.parquet"), **options)


NAMES = ["dog", "cat", "ant", "cat"] * 3


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_class_names_are_sorted_and_recorded(kind: str, tmp_path: Path, cache_root: Path) -> None:
    column = pa.array(NAMES)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    rows = all_rows(labelled(tmp_path, column), cache_root).train
    assert (rows.class_names, rows.classes) == (("ant", "cat", "dog"), 3)
    assert rows.labels[:4].tolist() == [2, 1, 0, 1]


def test_validation_and_test_take_the_names_of_train(tmp_path: Path, cache_root: Path) -> None:
    train, test = labelled(tmp_path / "train", NAMES), labelled(tmp_path / "test", ["dog", "cat"])
    rows = prepare(DataSpec(train=train, validation=train, test=test), cache_root).test
    assert (rows.labels.tolist(), rows.class_names, rows.classes) == ([2, 1], ("ant", "cat", "dog"), 3)
    strange = labelled(tmp_path / "strange", ["dog", "cats", "bat"])
    with pytest.raises(RefusedError, match=r"unknown class name in row 1 of .*, column label") as refused:
        prepare(DataSpec(train=train, validation=train, test=strange), cache_root)
    assert "ant, cat, dog" in str(refused.value.expected)
    assert "correct it to cat" in str(refused.value.next)
    ids = labelled(tmp_path / "ids", [0, 1])
    with pytest.raises(RefusedError, match=r"labels of data\.test are not like those of data\.train"):
        prepare(DataSpec(train=train, validation=train, test=ids), cache_root)


def with_names(folder: Path, ids: list[int], names: list[str]) -> Parquet:
    """Class ids whose names are in the schema, as the `datasets` library leaves them there."""
    folder.mkdir()
    feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"input": [[1.0]] * len(ids), "label": ids})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), folder / "named.parquet")
    return Parquet(path=str(folder / "named.parquet"))


def test_ids_of_other_names_are_translated(tmp_path: Path, cache_root: Path) -> None:
    train = with_names(tmp_path / "train", [0, 1, 2], ["a", "b", "c"])
    test = with_names(tmp_path / "test", [0, 1], ["c", "a", "d"])
    assert prepare(DataSpec(train=train, validation=train, test=test), cache_root).test.labels.tolist() == [2, 0]
    strange = with_names(tmp_path / "strange", [0, 2], ["c", "a", "d"])
    with pytest.raises(RefusedError, match="unknown class name in row 1 of"):
        prepare(DataSpec(train=train, validation=train, test=strange), cache_root)


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.bool_()], ids=str)
def test_class_ids_are_of_any_integer_type(kind: Any, tmp_path: Path, cache_root: Path) -> None:
    rows = all_rows(labelled(tmp_path, pa.array([0, 1] * 5).cast(kind)), cache_root).train
    assert (rows.labels.tolist(), rows.labels.dtype.name, rows.classes) == ([0, 1] * 5, "int64", 2)


@pytest.mark.parametrize("kind", [pa.float64(), pa.float16(), pa.int32()], ids=str)
def test_numbers_are_the_labels_of_a_regression(kind: Any, tmp_path: Path, cache_root: Path) -> None:
    data = DataSpec(train=labelled(tmp_path, pa.array([-2, 5] * 5).cast(kind)), task="regression")
    for rows in (prepare(data, cache_root).train, prepare(data, cache_root).train):
        assert (rows.labels.dtype.name, rows.classes, rows.task, rows.class_names) == ("float32", 1, "regression", None)
        assert set(rows.labels.tolist()) == {-2.0, 5.0}


def test_a_number_of_classes_and_numbers_as_labels_contradict(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="leave `classes` out"):
        DataSpec(train=Parquet(path="x", classes=3), task="regression")
    with pytest.raises(ValidationError, match="validation says how many classes"):
        DataSpec(train=Parquet(path="x"), validation=Idx(images="i", labels="l", classes=3), task="regression")
