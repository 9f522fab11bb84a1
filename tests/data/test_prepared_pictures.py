"""Pictures as prepared rows: their fingerprints, several sources together, and what finished models see of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

import akd_dist
from akd_dist import recipe
from akd_dist.base.errors import RefusedError
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Rows
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import read_model, save_model
from akd_dist.recipe import DataSpec
from tests.data.test_pictures import (
    ALPHA,
    COLOURS,
    DEEP,
    GREYS,
    RED,
    SEVERAL,
    chw,
    encoded,
    exif,
    over,
    parquet,
    prints,
    source,
)
from tests.sources import dataset


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        ("grey", "1fae5d8e70618e02"),
        ("RGB", "5323c7a7d936d43c"),
        ("solid", "5323c7a7d936d43c"),
    ],
)
def test_fingerprints_of_before(kind: str, before: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    pixels = draw.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    solid = np.full((4, 4, 1), 255, np.uint8)
    pictures = {
        "grey": [encoded(one[..., 0]) for one in pixels],
        "RGB": [encoded(one) for one in pixels],
        "solid": [encoded(np.dstack([one, solid])) for one in pixels],
    }[kind]
    splits = prepare(parquet(tmp_path / "data", pictures), tmp_path / "cache")
    assert splits.train.fingerprint[:16] == before


def test_a_background_counts_where_it_is_seen(tmp_path: Path) -> None:
    clear, solid = encoded(np.dstack([COLOURS, ALPHA])), encoded(COLOURS)
    red = recipe.Image(background=RED)
    for picture, same in ((clear, False), (solid, True)):
        usual, other = (
            prints(prepare(parquet(tmp_path / "data", [picture] * 10, image=image), tmp_path / "cache"))
            for image in (recipe.Image(), red)
        )
        assert (usual == other) == same


def test_what_was_prepared_by_other_rules_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are prepared anew, and digits are not."""
    pictures = parquet(tmp_path / "data", [encoded(COLOURS)] * 10)
    digits = DataSpec(train=recipe.Digits())
    before = [prepare(data, tmp_path / "cache").train.folder for data in (pictures, digits)]
    monkeypatch.setattr("akd_dist.data.pictures.RULES", 1000)
    after = [prepare(data, tmp_path / "cache").train.folder for data in (pictures, digits)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_identities_of_before_know_no_image(tmp_path: Path) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        path = Path(__file__).parents[2] / "jobs" / "digits.yaml"
        found: dict[str, Any] = recipe.load_recipe(path, overrides).identity()["data"]
        return found

    assert "image" not in identity()
    assert identity("data.image.background=[255, 255, 255]") == identity()
    assert identity("data.image.background=[1, 2, 3]")["image"] == {"background": [1, 2, 3]}


def test_a_background_for_what_is_no_image_is_refused(tmp_path: Path) -> None:
    image = recipe.Image(background=RED)
    with pytest.raises(RefusedError, match=r"data\.image is given, and the inputs are not images"):
        prepare(DataSpec(train=recipe.Digits(), image=image), tmp_path / "cache")
    with pytest.raises(ValueError, match="image is for encoded images"):
        DataSpec(train=recipe.Digits(), text=recipe.ByteText(), image=image)


# ---- sources together


def test_colour_in_a_later_source_counts(tmp_path: Path) -> None:
    grey, colour = encoded(GREYS), encoded(COLOURS)
    train = parquet(tmp_path / "train", [grey] * 10)
    for last in ([grey] * 5 + [colour], [colour] + [grey] * 5):
        test = source(tmp_path / "test", last)
        splits = prepare(train.model_copy(update={"test": test}), tmp_path / "cache")
        assert {one.shape for one in (splits.train, splits.validation, splits.test)} == {(3, 4, 6)}
        assert (splits.train.inputs == GREYS).all()
        reverse = prepare(DataSpec(train=test, test=train.sources["train"], validation=0.2), tmp_path / "cache")
        assert reverse.train.shape == (3, 4, 6)


def test_grey_beside_grey_that_is_no_picture_stays_grey(tmp_path: Path) -> None:
    """IDX files have the channels that they have."""
    train = recipe.Digits()
    eight = [encoded(np.full((8, 8), 9, np.uint8))] * 5
    test = source(tmp_path / "test", eight)
    assert prepare(DataSpec(train=train, test=test), tmp_path / "cache").test.shape == (1, 8, 8)
    coloured = source(tmp_path / "test", [*eight, encoded(np.full((8, 8, 3), 9, np.uint8))])
    with pytest.raises(RefusedError, match=r"another shape in row 5"):
        prepare(DataSpec(train=train, test=coloured), tmp_path / "cache")


def test_the_users_own_images_are_treated_alike(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    pixels = draw.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    images[0] = Image.fromarray(pixels[0, ..., 0])  # grey, and the first
    images[1] = Image.open(io.BytesIO(encoded(pixels[1], exif=exif(3))))
    images[2] = Image.fromarray(np.dstack([pixels[2], np.full((4, 4), 100, np.uint8)]))
    spec = dataset(tmp_path, images, [0, 1] * 5)
    files = [encoded(image, exif=exif(3) if number == 1 else None) for number, image in enumerate(images)]
    assert prints(prepare(DataSpec(train=spec), tmp_path / "cache")) == prints(
        prepare(parquet(tmp_path / "data", files), tmp_path / "cache")
    )
    assert images[1].getexif()[0x0112] == 3  # as the user has it
    before = prints(prepare(DataSpec(train=spec), tmp_path / "cache"))
    images[0] = Image.fromarray(255 - pixels[0, ..., 0])
    assert prints(prepare(DataSpec(train=spec), tmp_path / "cache")) != before  # another image is noticed
    deep = [Image.open(io.BytesIO(DEEP["RGB PNG"])), *images[1:]]
    spec = dataset(tmp_path, deep, [0, 1] * 5)
    with pytest.raises(RefusedError, match=r"(?s)of the input in row 0.*16 bits a channel"):
        prepare(DataSpec(train=spec), tmp_path / "cache")


# ---- finished models


def a_model(folder: Path, shape: tuple[int, ...], image: recipe.Image) -> Path:
    rows = Rows(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int64), 2, "", (), Path())
    card = ModelCard.of(recipe.Mlp(hidden=4), rows, None, image)
    save_model(folder, build(card, seed=3), card)
    return folder


def test_a_model_sees_what_it_was_trained_on(tmp_path: Path) -> None:
    """Its background, and its channels: grey pictures become coloured ones, and coloured ones are not made grey."""
    red = recipe.Image(background=RED)
    clear = source(tmp_path / "clear", [encoded(np.dstack([COLOURS, ALPHA]))] * 4)
    grey = source(tmp_path / "grey", [encoded(GREYS)] * 4)
    late = source(tmp_path / "late", [encoded(GREYS)] * 3 + [encoded(COLOURS)])
    coloured = a_model(tmp_path / "coloured", (3, 4, 6), red)
    module = akd_dist.load_model(coloured)
    for data, pixels in ((clear, chw(over(COLOURS, ALPHA, RED))), (grey, np.stack([GREYS] * 3))):
        akd_dist.predict(coloured, data.path, tmp_path / "p.parquet", input="x", label="", force=True)
        said = pq.read_table(tmp_path / "p.parquet")["logits"].to_pylist()
        expected = module(torch.from_numpy(pixels[None].copy())).tolist()
        np.testing.assert_allclose(said, expected * 4, rtol=1e-5)
    only_grey = a_model(tmp_path / "only_grey", (1, 4, 6), recipe.Image())
    akd_dist.predict(only_grey, grey.path, tmp_path / "p.parquet", input="x", label="", force=True)
    for data, words in (
        (clear, r"(?s)made for other data.*\[1, 4, 6\].*\[3, 4, 6\]"),
        (late, "another shape in row 3"),
    ):
        with pytest.raises(RefusedError, match=words):
            akd_dist.predict(only_grey, data.path, tmp_path / "p.parquet", input="x", label="", force=True)


def test_frames_are_told_where_a_model_is_asked(tmp_path: Path) -> None:
    data = source(tmp_path / "data", [encoded(COLOURS), SEVERAL["APNG"]])
    console = Console(file=io.StringIO(), width=300)
    akd_dist.predict(
        a_model(tmp_path / "m", (3, 4, 6), recipe.Image()),
        data.path,
        tmp_path / "p.parquet",
        input="x",
        label="",
        console=console,
    )
    line = "rows.parquet: 1 image has several frames or pages, of which the first one is taken"
    assert line in console.file.getvalue()  # type: ignore[attr-defined]


def test_cards_keep_their_bytes(tmp_path: Path) -> None:
    usual, other = (a_model(tmp_path / str(number), (3, 4, 6), image) for number, image in enumerate(
        (recipe.Image(), recipe.Image(background=RED))
    ))  # fmt: skip
    assert "image" not in json.loads((usual / "model.json").read_text())
    assert json.loads((other / "model.json").read_text())["image"] == {"background": RED}
    cards = [read_model(str(folder))[1] for folder in (usual, other)]
    assert cards[1].image.background == RED
    assert cards[0].fingerprint != cards[1].fingerprint
    assert "image" not in cards[0].model_dump(mode="json")
