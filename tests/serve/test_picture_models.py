"""Models of pictures at work: names of files and classes, labels beside them, pictures in object storage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.documents.use import PredictionDocument
from akd_dist.storage.roots import open_root
from tests.pictures import CLASSES, jpeg, of_classes, samples, tar, write as write_files
from tests.serve.test_evaluation import a_model, some_rows


@pytest.fixture(scope="module")
def picture_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pictures of 8 x 8 pixels that knows three classes by name."""
    return a_model(
        tmp_path_factory.mktemp("pictures") / "model",
        recipe.Cnn(kind="cnn", width=8),
        some_rows((3, 8, 8), classes=3, class_names=CLASSES),
    )


def test_pictures_are_predicted_by_the_names_of_their_files(picture_model: Path, tmp_path: Path) -> None:
    ordered = sorted(range(30), key=lambda number: (number % 3, number))
    table = pa.table({"input": [jpeg(number) for number in ordered], "label": [CLASSES[n % 3] for n in ordered]})
    pq.write_table(table, tmp_path / "p.parquet")
    expected = akd_dist.evaluate(picture_model, tmp_path / "p.parquet")["student"]["metrics"]
    classes = of_classes(tmp_path / "classes", 30, **{"notes.txt": b"x"})
    flat = write_files(tmp_path / "flat", {f"2026/{number:03}.jpg": jpeg(number) for number in range(30)})
    shards = tmp_path / "shards"
    for start in (0, 20):
        tar(shards / f"{start:02}.tar", samples(range(start, min(start + 20, 30))))
    for data in (classes, shards, f"{shards}/{{00,20}}.tar", f"{shards}/*.tar"):
        assert akd_dist.evaluate(picture_model, data)["student"]["metrics"] == expected
    names = {
        classes: [f"{CLASSES[number % 3]}/{number:03}.jpg" for number in ordered],
        flat: [f"2026/{number:03}.jpg" for number in range(30)],
        shards: [f"{20 * (number // 20):02}.tar/{number:04}.jpg" for number in range(30)],
    }
    by_picture = {}
    for data, files in names.items():
        document = akd_dist.predict(picture_model, data, tmp_path / "out.parquet", force=True)
        PredictionDocument.model_validate(document)
        made = pq.read_table(tmp_path / "out.parquet")
        assert made["file"].to_pylist() == files
        assert made["class_name"].to_pylist() == [CLASSES[number] for number in made["predicted"].to_pylist()]
        assert ("label" in made.schema.names) == (data != flat)
        by_picture[data] = dict(zip([Path(file).stem[-3:] for file in files], made["logits"].to_pylist(), strict=True))
    assert by_picture[classes] == by_picture[flat] == by_picture[shards]


def test_labels_of_pictures_may_stand_beside_them(picture_model: Path, tmp_path: Path) -> None:
    flat = write_files(tmp_path / "flat", {f"{number:03}.jpg": jpeg(number) for number in range(30)})
    lines = [f"{number:03}.jpg,{CLASSES[number % 3]}" for number in range(30)]
    (flat / "metadata.csv").write_text("\n".join(["file_name,species", *lines]))
    assert akd_dist.evaluate(picture_model, flat, label="species")["rows"] == 30
    with pytest.raises(RefusedError, match=r"(?s)metadata.csv has no column label.*a metadata.csv with the columns"):
        akd_dist.evaluate(picture_model, flat)
    akd_dist.predict(picture_model, flat, tmp_path / "p.parquet", label="")
    assert "label" not in pq.read_schema(tmp_path / "p.parquet").names
    (flat / "metadata.csv").unlink()
    with pytest.raises(RefusedError, match=r"(?s)the pictures in .* have no label.*folders that are called as classes"):
        akd_dist.evaluate(picture_model, flat)
    with pytest.raises(RecipeError, match="--input names columns of Parquet"):
        akd_dist.predict(picture_model, flat, tmp_path / "q.parquet", input=["image"])
    bad = of_classes(tmp_path / "bad", 30, **{"cat/003.jpg": b"text"})
    with pytest.raises(RefusedError, match=r"cannot decode the image in row 1 of .*bad \(cat/003.jpg\)"):
        akd_dist.predict(picture_model, bad, tmp_path / "q.parquet")
    assert not (tmp_path / "q.parquet").exists()
    other = of_classes(tmp_path / "other", 30)
    (other / "dog").rename(other / "fox")
    with pytest.raises(RefusedError, match="unknown class name"):
        akd_dist.evaluate(picture_model, other)
    akd_dist.predict(picture_model, other, tmp_path / "q.parquet")  # folders that the model does not know say nothing
    assert "label" not in pq.read_schema(tmp_path / "q.parquet").names


def test_pictures_in_object_storage_are_read_where_they_are(picture_model: Path, bucket: str, tmp_path: Path) -> None:
    of_classes(tmp_path / "data" / "classes", 12)
    tar(tmp_path / "data" / "shards" / "a.tar", samples(range(12)))
    for file in sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        open_root(f"{bucket}/pictures").put(str(file.relative_to(tmp_path / "data")), file.read_bytes())
    for data in ("classes", "shards", "shards/a.tar"):
        roots = (tmp_path / "data", f"{bucket}/pictures")
        here, there = (akd_dist.evaluate(picture_model, f"{root}/{data}") for root in roots)
        assert here["student"]["metrics"] == there["student"]["metrics"]
