"""Pictures of all sizes come to the size of the recipe: for rows, for a cluster's rows, and for finished models."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.columns import Place, inputs_of
from akd_dist.data.row_blocks import write_run
from akd_dist.data.row_cache import key_of, prepare
from akd_dist.data.row_fetch import fetch_rows
from akd_dist.data.row_store import ensure_rows
from akd_dist.data.rows import Rows, Splits
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.recipe import DataSpec, Parquet
from akd_dist.serve import exports
from akd_dist.serve.served import open_model

PLACE = Place(lambda row: f"row {row}")
RED = [200, 10, 20]
SIZES = [(40, 30), (30, 40), (7, 9), (33, 33), (20, 64), (1, 500), (500, 1), (1, 1)]
DRAW = np.random.default_rng(3)
PICTURES = {size: DRAW.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES}


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def pixels_of(picture: bytes, **image: Any) -> np.ndarray:
    """uint8 [height, width, channels], or [height, width] of one channel."""
    column = pa.array([picture])
    inputs = inputs_of([column], 0, PLACE, None, None, recipe.Image(**image))
    found: np.ndarray = inputs([column], np.arange(1))[0].transpose(1, 2, 0)
    assert found.shape == (*inputs.shape[1:], inputs.shape[0])
    return found if found.shape[2] == 3 else found[..., 0]


def source(folder: Path, pictures: list[bytes]) -> Parquet:
    folder.mkdir(exist_ok=True, parents=True)
    table = pa.table({"x": pictures, "y": [row % 2 for row in range(len(pictures))]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=4)
    return Parquet(path=str(folder / "rows.parquet"), input="x", label="y")


def of_all_sizes(folder: Path) -> Parquet:
    return source(folder, [encoded(PICTURES[size]) for size in SIZES] * 2)


# ---- what becomes of a picture


def torchvision(picture: Image.Image, side: int) -> np.ndarray:
    """Resize(side) and CenterCrop(side), as torchvision has them for images of Pillow."""
    width, height = picture.size
    short, long = sorted((width, height))
    new_long = int(side * long / short)
    new_width, new_height = (side, new_long) if width <= height else (new_long, side)
    resized = picture.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - side) / 2.0), round((new_width - side) / 2.0)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 16, 33, 50])
def test_shorter_is_resize_and_center_crop(size: tuple[int, int], side: int) -> None:
    found = pixels_of(encoded(PICTURES[size]), size=side)
    np.testing.assert_array_equal(found, torchvision(Image.fromarray(PICTURES[size]), side))


def test_shorter_covers_what_is_no_square() -> None:
    picture = Image.fromarray(PICTURES[40, 30])
    wide = picture.resize((48, 64), Image.Resampling.BILINEAR).crop((0, 20, 48, 44))
    np.testing.assert_array_equal(pixels_of(encoded(PICTURES[40, 30]), size=[24, 48]), np.asarray(wide))
    tall = picture.resize((36, 48), Image.Resampling.BILINEAR).crop((6, 0, 30, 48))
    np.testing.assert_array_equal(pixels_of(encoded(PICTURES[40, 30]), size=[48, 24]), np.asarray(tall))


def test_longer_lies_on_the_background() -> None:
    found = pixels_of(encoded(PICTURES[40, 30]), size=[20, 24], resize="longer", background=RED)
    within = Image.fromarray(PICTURES[40, 30]).resize((15, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found[:, 4:19], np.asarray(within))
    assert (found[:, :4] == RED).all()
    assert (found[:, 19:] == RED).all()
    thin = pixels_of(encoded(PICTURES[1, 500]), size=10, resize="longer", background=RED)
    assert (np.delete(thin, 4, axis=0) == RED).all()
    assert not (thin[4] == RED).all()


def test_stretch_takes_all_of_it() -> None:
    expected = Image.fromarray(PICTURES[20, 64]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels_of(encoded(PICTURES[20, 64]), size=16, resize="stretch"), np.asarray(expected))


def test_none_crops_and_pads() -> None:
    found = pixels_of(encoded(PICTURES[20, 64]), size=[30, 32], resize="none", background=RED)
    np.testing.assert_array_equal(found[5:25], PICTURES[20, 64][:, 16:48])
    assert (found[:5] == RED).all()
    assert (found[25:] == RED).all()


def test_a_long_picture_takes_no_more_memory_than_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resized as a whole, 1 x 60,000 pixels would have 3 billion beside a side of 224."""
    resized, resize = list[tuple[int, int]](), Image.Image.resize

    def noted(picture: Image.Image, size: tuple[int, int], *more: Any) -> Image.Image:
        resized.append(size)
        return resize(picture, size, *more)

    monkeypatch.setattr(Image.Image, "resize", noted)
    found = pixels_of(encoded(np.full((1, 60_000, 3), 9, np.uint8)), size=224)
    assert set(resized) == {(224, 224)}
    assert (found == 9).all()


def test_orientation_and_background_come_before() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    turned = encoded(PICTURES[40, 30], exif=tags)
    expected = torchvision(Image.fromarray(np.rot90(PICTURES[40, 30], -1)), 16)
    np.testing.assert_array_equal(pixels_of(turned, size=16), expected)
    clear = np.dstack([PICTURES[40, 30], np.zeros((40, 30), np.uint8)])
    assert (pixels_of(encoded(clear), size=16, background=RED) == RED).all()


def test_channels() -> None:
    grey = PICTURES[33, 33][..., 0]
    assert pixels_of(encoded(grey), size=8).shape == (8, 8)
    np.testing.assert_array_equal(pixels_of(encoded(grey), channels=3), np.dstack([grey] * 3))
    luma = np.asarray(Image.fromarray(PICTURES[33, 33]).convert("L"))
    np.testing.assert_array_equal(pixels_of(encoded(PICTURES[33, 33]), channels=1), luma)
    clear = encoded(np.dstack([PICTURES[33, 33], np.zeros((33, 33), np.uint8)]))
    of_red = int(Image.new("RGB", (1, 1), tuple(RED)).convert("L").getpixel((0, 0)))  # type: ignore[arg-type]
    assert (pixels_of(clear, channels=1, background=RED) == of_red).all()
    # What is seen beside grey pictures has a colour, so they have as well.
    beside = pixels_of(encoded(grey[:8]), size=33, resize="longer", background=RED)
    assert beside.shape == (33, 33, 3)
    assert (beside[0] == RED).all()
    beside = pixels_of(encoded(grey[:8]), size=33, resize="longer", background=RED, channels=1)
    assert beside.shape == (33, 33)
    assert (beside[0] == of_red).all()


def test_grey_and_coloured_of_all_sizes(tmp_path: Path) -> None:
    pictures = [encoded(PICTURES[size][..., 0]) for size in SIZES]
    data = DataSpec(train=source(tmp_path / "grey", pictures), image=recipe.Image(size=16))
    assert prepare(data, tmp_path / "cache").train.shape == (1, 16, 16)
    mixed = DataSpec(train=source(tmp_path / "mixed", [*pictures, encoded(PICTURES[40, 30])]), image=data.image)
    assert prepare(mixed, tmp_path / "cache").train.shape == (3, 16, 16)
    one = mixed.model_copy(update={"image": recipe.Image(size=16, channels=1)})
    assert prepare(one, tmp_path / "cache").train.shape == (1, 16, 16)


# ---- in a recipe


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"size": 0}, "greater than or equal to 1"),
        ({"size": 9000}, "less than or equal to 8192"),
        ({"size": [224]}, "at least 2 items"),
        ({"size": "224"}, "valid integer"),
        ({"channels": 2}, "Input should be 1 or 3"),
        ({"resize": "stretch"}, "give `size` as well"),
        ({"size": 224, "crop": "none"}, "keep sizes of their own: leave out `crop`, or take `resize: longer`"),
        ({"size": 224, "crop": "none", "resize": "none"}, "keep sizes of their own: leave out one of them"),
        ({"size": 224, "resize": "bicubic"}, "'shorter', 'longer', 'stretch' or 'none'"),
    ],
)
def test_what_gives_no_one_size_is_refused(image: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe.Image(**image)


@pytest.mark.parametrize("image", [{"size": 224}, {"channels": 1}])
def test_a_shape_that_says_something_else_is_refused(image: dict[str, Any]) -> None:
    source = Parquet(path="rows.parquet", shape=[3, 32, 32])
    with pytest.raises(ValidationError, match=re.escape("train.shape is [3, 32, 32], and image says something else")):
        DataSpec(train=source, image=recipe.Image(**image))
    assert DataSpec(train=source, image=recipe.Image(size=[32, 32], channels=3)).train == source


def test_recipes_and_keys_of_before_are_the_same() -> None:
    """And two spellings of a size are one."""
    path = Path(__file__).parents[2] / "jobs" / "digits.yaml"

    def image_of(*overrides: str) -> Any:
        return recipe.load_recipe(path, overrides).identity()["data"].get("image")

    assert image_of() is None
    assert image_of("data.image.background=[1, 2, 3]") == {"background": [1, 2, 3]}
    assert image_of("data.image.size=8") == image_of("data.image.size=[8, 8]") == {"size": [8, 8]}
    data = DataSpec(train=Parquet(path="rows.parquet"))
    assert key_of(data, {"train": {}})["image"] == {"rules": 2, "background": [255, 255, 255]}


def test_a_size_for_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"data\.image is given, and the inputs are not images"):
        prepare(DataSpec(train=recipe.Digits(), image=recipe.Image(size=8)), tmp_path)
    with pytest.raises(ValidationError, match="image is for encoded images"):
        DataSpec(train=recipe.Digits(), text=recipe.ByteText(), image=recipe.Image(size=8))


# ---- rows


def advised(error: RefusedError) -> dict[str, Any]:
    """What the line of YAML in an error, to be put under `data:`, says of images."""
    from ruamel.yaml import YAML

    assert error.next is not None
    said, line = error.next.split("\n")
    assert said.endswith("this line under `data:`")
    found: dict[str, Any] = YAML(typ="safe").load(line)["image"]
    return found


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([(40, 30), (30, 50), (20, 60), (300, 300)], 30),
        ([(640, 480), (500, 375), (224, 224)], 224),
    ],
)
def test_mixed_sizes_are_refused_with_the_lines_that_help(
    sizes: list[tuple[int, int]], said: int, tmp_path: Path
) -> None:
    pictures = [encoded(np.full((*size, 3), 7, np.uint8)) for size in sizes] * 3
    data = DataSpec(train=source(tmp_path / "data", pictures))
    with pytest.raises(RefusedError, match="an input of another shape in row 1 of") as refused:
        prepare(data, tmp_path / "cache")
    assert advised(refused.value) == {"size": said, "resize": "shorter"}
    with pytest.raises(RefusedError, match="an input of another shape in row") as other:
        in_blocks(data, tmp_path)
    assert advised(other.value) == advised(refused.value)
    splits = prepare(data.model_copy(update={"image": recipe.Image(**advised(refused.value))}), tmp_path / "cache")
    assert splits.train.shape == (3, said, said)


def test_sources_of_other_sizes_are_told_what_helps(tmp_path: Path) -> None:
    train, test = (source(tmp_path / name, [encoded(PICTURES[size])] * 6) for name, size in
                   (("train", (40, 30)), ("test", (33, 33))))  # fmt: skip
    with pytest.raises(RefusedError, match=r"^pictures are of several sizes") as refused:
        prepare(DataSpec(train=train, test=test), tmp_path / "cache")
    assert refused.value.got == f"data.train ({train.path}): 40 x 30; data.test ({test.path}): 33 x 33"
    assert advised(refused.value) == {"size": 31, "resize": "shorter"}
    with pytest.raises(RefusedError, match=r"the inputs of data\.test are not like") as refused:
        prepare(DataSpec(train=recipe.Digits(), test=test), tmp_path / "cache")
    assert advised(refused.value)["size"] == 8


def test_one_refusal_names_the_sizes_in_all_folders_and_what_suits_them_at_once(tmp_path: Path) -> None:
    def folder(name: str, sizes: list[tuple[int, int]]) -> recipe.ImageFolder:
        for number, size in enumerate(sizes):
            place = tmp_path / name / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(encoded(np.full((*size, 3), number, np.uint8)))
        return recipe.ImageFolder(path=str(tmp_path / name))

    train = folder("train", [(30, 40), (50, 40), (35, 35), (60, 80), (30, 40), (41, 40), (30, 40), (35, 38)])
    every: dict[str, Any] = {name: folder(name, [(20 + at, 21)] * 4) for at, name in enumerate(("validation", "test"))}
    told = f"data.train ({train.path}): 6 sizes from 30 x 40 to 60 x 80"
    told += "".join(f"; data.{name} ({every[name].path}): 2{at} x 21" for at, name in enumerate(every))
    said = set()
    # Whether the first pictures of two folders differ, or those within the first folder.
    alike: dict[str, Any] = {"test": folder("alike", [(30, 40)] * 4)}
    for others in (every, {**every, **alike}, alike):
        data = DataSpec(train=train, **others)
        with pytest.raises(RefusedError) as refused:
            prepare(data, tmp_path / "cache")
        assert refused.value.got is not None
        assert told.partition(";")[0] in refused.value.got
        assert others is alike or refused.value.what == "pictures are of several sizes"
        with pytest.raises(RefusedError) as again:
            in_blocks(data, tmp_path)
        assert (again.value.what, again.value.next) == (refused.value.what, refused.value.next)
        image = recipe.Image(**advised(refused.value))
        assert image.frame is not None
        splits = prepare(data.model_copy(update={"image": image}), tmp_path / "cache")
        assert {rows.shape for rows in (splits.train, splits.validation, splits.test)} == {(3, *image.frame)}
        said.add(refused.value.got)
    assert told in said
    assert any("alike): 30 x 40" in one for one in said)


def in_blocks(data: DataSpec, folder: Path) -> Splits:
    """The same rows by way of blocks under a store root."""

    def compute(plan: Any, take: Any) -> None:
        for run in plan.runs:
            take(write_run(plan.job, run))

    return fetch_rows(ensure_rows(data, str(folder / "stores"), compute).sealed, folder / "other")


def test_rows_of_all_sizes_here_and_in_a_cluster(tmp_path: Path) -> None:
    data = DataSpec(train=of_all_sizes(tmp_path / "data"), image=recipe.Image(size=24), seed=1)
    here, there = prepare(data, tmp_path / "cache"), in_blocks(data, tmp_path)
    assert here.fingerprints == there.fingerprints
    assert here.train.shape == (3, 24, 24)
    # 40 x 30, 30 x 40 and 33 x 33 are larger; the others are not, in one side at least.
    assert "data.train: 10 images are smaller than 24 x 24, and enlarged" in here.findings
    assert here.findings == there.findings


def test_a_size_that_all_have_changes_no_fingerprint(tmp_path: Path) -> None:
    train = source(tmp_path / "data", [encoded(PICTURES[33, 33])] * 8)
    one, other = (
        prepare(DataSpec(train=train, image=image), tmp_path / "cache")
        for image in (recipe.Image(), recipe.Image(size=33))
    )
    assert one.fingerprints == other.fingerprints


def test_bad_pictures_are_refused_as_without_a_size(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 60_000, np.uint16))
    deep.save(buffer := io.BytesIO(), "PNG")
    good = encoded(PICTURES[40, 30], "JPEG")
    for bad, words in ((buffer.getvalue(), "16 bits a channel"), (good[:300], "Truncated"), (b"", "0 bytes")):
        data = DataSpec(train=source(tmp_path / "data", [good, good, bad, *[good] * 9]), image=recipe.Image(size=16))
        with pytest.raises(RefusedError, match=f"(?s)cannot decode the image in row 2.*{words}"):
            prepare(data, tmp_path / "cache")


# ---- finished models


def a_model(folder: Path, image: recipe.Image, size: tuple[int, int]) -> Path:
    rows = Rows(np.zeros((2, 3, *size), np.uint8), np.zeros(2, np.int64), 2, "", (), Path())
    card = ModelCard.of(recipe.Mlp(hidden=4), rows, None, image)
    save_model(folder, build(card, seed=3), card)
    return folder


def test_a_model_brings_pictures_to_its_size(tmp_path: Path) -> None:
    image = recipe.Image(size=[12, 20], resize="longer", background=RED)
    student, data = a_model(tmp_path / "model", image, (12, 20)), of_all_sizes(tmp_path / "data")
    assert json.loads((student / "model.json").read_text())["image"] == {
        "background": RED, "size": [12, 20], "resize": "longer",
    }  # fmt: skip
    akd_dist.predict(student, data.path, tmp_path / "p.parquet", input="x", label="")
    said = pq.read_table(tmp_path / "p.parquet")["logits"].to_pylist()
    shown = np.stack([pixels_of(encoded(PICTURES[size]), **image.said()) for size in SIZES])
    expected = akd_dist.load_model(student)(torch.from_numpy(shown.transpose(0, 3, 1, 2).copy())).tolist()
    np.testing.assert_allclose(said, expected * 2, rtol=1e-4, atol=1e-5)


def asked_of(
    model: Path, folder: Path, image: recipe.Image, train: Any = None, test: Any = 0.2, **options: Any
) -> dict[str, Any]:
    """What a model is measured on: the recipe of pictures, or of something else."""
    whole = recipe.load_recipe(Path(__file__).parents[2] / "jobs" / "digits.yaml")
    data = DataSpec(train=train or of_all_sizes(folder / "data"), validation=0.2, test=test, image=image)
    (folder / "recipe.yaml").write_text(whole.model_copy(update={"data": data}).to_yaml())
    return akd_dist.evaluate(model, folder / "recipe.yaml", cache_root=folder / "cache", **options)


def test_of_small_pictures_those_are_told_of_that_are_read(tmp_path: Path) -> None:
    image, said = recipe.Image(size=24), io.StringIO()
    model, own = a_model(tmp_path / "model", image, (24, 24)), of_all_sizes(tmp_path / "own")
    asked_of(model, tmp_path, image, test=own, console=Console(file=said, width=200))
    assert [line.partition(":")[0] for line in said.getvalue().splitlines() if "enlarged" in line] == ["data.test"]


def test_a_recipe_that_shows_pictures_otherwise_than_the_model_is_refused(tmp_path: Path) -> None:
    image = recipe.Image(size=[12, 20], resize="longer", background=RED)
    model = a_model(tmp_path / "model", image, (12, 20))
    assert asked_of(model, tmp_path, image)["rows"] == 3
    others: list[dict[str, Any]] = [{"background": [0, 0, 0]}, {"resize": "stretch"}, {"size": [20, 12]}]
    for other in others:
        with pytest.raises(RefusedError, match="was made for pictures that become inputs in another way") as refused:
            asked_of(model, tmp_path, image.model_copy(update=other))
        assert all(f"{key}: {value}" in str(refused.value.got) for key, value in other.items())
        assert (
            refused.value.expected == f"{{background: {RED}, size: [12, 20], resize: longer}}, as its model.json says"
        )
        advice = str(refused.value.next)
        assert advised(RefusedError("", next=advice[: advice.rindex("\n")])) == image.said()
    # How prepared rows are kept is no matter of the model.
    assert asked_of(model, tmp_path, image.model_copy(update={"keep": "encoded"}))["rows"] == 3


def test_where_one_of_both_says_no_size_pictures_have_it(tmp_path: Path) -> None:
    black = recipe.Image(background=[0, 0, 0])
    model = a_model(tmp_path / "model", black, (33, 33))
    same = source(tmp_path / "same", [encoded(PICTURES[33, 33])] * 16)
    assert asked_of(model, tmp_path, black, same)["rows"] == 3
    assert asked_of(model, tmp_path, recipe.Image(size=33, background=[0, 0, 0]))["rows"] == 3
    with pytest.raises(RefusedError, match="in another way"):
        asked_of(model, tmp_path, recipe.Image(), same)
    # Numbers are no pictures, whose background the recipe could say.
    numbers = pa.table({"x": list(np.zeros((16, 3 * 33 * 33), np.uint8)), "y": [0, 1] * 8})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    train = Parquet(path=str(tmp_path / "numbers.parquet"), input="x", label="y", shape=[3, 33, 33])
    assert asked_of(model, tmp_path, recipe.Image(), train)["rows"] == 3


def test_models_that_are_compared_see_pictures_alike(tmp_path: Path) -> None:
    image = recipe.Image(size=[12, 20], resize="longer", background=RED)
    model, other = (
        a_model(tmp_path / name, one, (12, 20))
        for name, one in (("model", image), ("other", image.model_copy(update={"resize": "stretch"})))
    )
    data = of_all_sizes(tmp_path / "data").path
    with pytest.raises(RefusedError, match="other was made for pictures that become inputs in another way"):
        akd_dist.evaluate(model, data, others=[other], input="x", label="y", cache_root=tmp_path)


def test_a_model_that_says_nothing_of_pictures_is_told_of(tmp_path: Path) -> None:
    from rich.console import Console

    model, told = a_model(tmp_path / "model", recipe.Image(), (12, 20)), io.StringIO()
    asked_of(model, tmp_path, recipe.Image(size=[12, 20], background=RED))
    akd_dist.predict(
        model,
        tmp_path / "recipe.yaml",
        tmp_path / "p.parquet",
        cache_root=tmp_path / "cache",
        console=Console(file=told, width=400),
    )
    assert f"as the recipe says, data.image: {{background: {RED}, size: [12, 20]}}; the model says" in told.getvalue()


def test_an_export_carries_how_pictures_come_to_its_size(tmp_path: Path) -> None:
    student = a_model(tmp_path / "model", recipe.Image(size=12, resize="longer"), (12, 12))
    told = exports._told(open_model(str(student)))
    assert json.loads(told["model.json"])["image"]["size"] == [12, 12]
    assert told["inputs"].endswith("image` of model.json says: {'size': [12, 12], 'resize': 'longer'}")


def test_a_model_without_a_size_says_how_pictures_come_to_it(tmp_path: Path) -> None:
    student = a_model(tmp_path / "model", recipe.Image(), (33, 33))
    mixed = source(tmp_path / "mixed", [encoded(PICTURES[size]) for size in ((33, 33), (40, 30), (33, 33), (30, 40))])
    other = source(tmp_path / "other", [encoded(PICTURES[40, 30])] * 4)
    for data, words in ((mixed, "another shape in row 1"), (other, "made for other data")):
        for act in (akd_dist.predict, akd_dist.evaluate):
            out = [tmp_path / "p.parquet"] if act is akd_dist.predict else []
            with pytest.raises(RefusedError, match=words) as refused:
                act(student, data.path, *out, input="x", label="y")
            assert advised(refused.value) == {"size": 33, "resize": "shorter"}
