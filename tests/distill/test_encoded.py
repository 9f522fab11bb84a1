"""Teacher and students read pictures that stay encoded: the same stores and weights, whole and window by window."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from akd_dist import recipe as recipes
from akd_dist.base.errors import RefusedError
from akd_dist.data import encoded, row_entry, row_store, rows
from akd_dist.data.encoded import encoded_of
from akd_dist.data.row_cache import prepare
from akd_dist.distill import probes, teacher
from akd_dist.distill.stream import BatchStream
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.planning import windows
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import save_model
from akd_dist.storage import layout
from akd_dist.storage.layout import StoreLayout
from akd_dist.storage.reader import open_store
from tests.distill.test_windows import sizes_noted
from tests.fleets import ADAMW, KD, a_recipe, a_student, weights

SIDE, WINDOW, BLOCK, ROWS = 12, 16, 8, 150
STUDENTS = [a_student("kd", batch=16, objective=KD | {"epochs": 2}, optimizer=ADAMW)]


def pictures(folder: Path) -> str:
    draw = np.random.default_rng(2)
    encoded, labels = [], []
    for row in range(ROWS):
        pixels = draw.integers(0, 120, (*draw.integers(14, 40, 2), 3), dtype=np.uint8)
        pixels[..., row % 3] += 100
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG")
        encoded.append(buffer.getvalue())
        labels.append(row % 3)
    pq.write_table(pa.table({"x": encoded, "y": labels}), folder / "rows.parquet", row_group_size=20)
    return str(folder / "rows.parquet")


class Home:
    """A recipe, and what its student comes to where there is room for everything."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, str(root / "teacher")
        data: dict[str, Any] = {
            "train": {"kind": "parquet", "path": pictures(root), "input": "x", "label": "y"},
            "image": {"size": SIDE},
            "augmentation": {"kind": "random_resized_crop_flip", "scale": (0.3, 1.0)},
            "views": 2,
            "window": WINDOW,
        }
        self.recipe = a_recipe(STUDENTS, teacher={"weights": self.model}, data=data)
        self.splits = prepare(self.recipe.data, root / "whole")
        card = ModelCard.of(recipes.Cnn(width=4, depth=1), self.splits.train, None, self.recipe.data.image)
        save_model(root / "teacher", build(card, seed=7), card)
        self.stores = self.cache("whole")
        self.expected = self.train("whole")

    def cache(self, name: str) -> dict[str, str]:
        teacher.forget()
        roots = {"store_root": str(self.root / f"{name}-stores"), "cache_root": str(self.root / name)}
        document = cache_in_process(self.recipe, self.model, **roots)
        teacher.forget()
        return {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}

    def train(self, name: str) -> dict[str, str]:
        run = self.root / f"{name}-run"
        shutil.rmtree(run, ignore_errors=True)
        stores = {split: uri.replace("whole-stores", f"{name}-stores") for split, uri in self.stores.items()}
        train_in_process(self.recipe, stores, run=run, cache_root=str(self.root / name))
        return weights(run)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreLayout, "chunk_rows", 8)
        patch.setattr(layout, "_SHARDS_OF_A_SMALL_VIEW", 64)
        for module in (rows, row_entry, row_store, windows):
            patch.setattr(module, "BLOCK_ROWS", BLOCK)
        yield Home(tmp_path_factory.mktemp("pictures"))


def test_the_same_within_a_small_cache(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as blocks under the store root, read window by window."""
    assert encoded_of(home.splits.train.inputs) is not None
    budget = home.splits.nbytes * 2 // 3
    monkeypatch.setenv("AKD_DIST_CACHE_BUDGET", str(budget))
    peak = sizes_noted(monkeypatch)
    stores = home.cache("small")
    assert [Path(uri).name for uri in stores.values()] == [Path(uri).name for uri in home.stores.values()]
    for split, uri in stores.items():
        ours, theirs = open_store(uri), open_store(home.stores[split])
        assert ours.manifest.to_bytes() == theirs.manifest.to_bytes()
    assert home.train("small") == home.expected
    assert 0 < max(peak) <= budget
    assert list((home.root / "small-stores" / "rows").iterdir())


def test_the_same_however_many_threads_decode(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = encoded.ThreadPoolExecutor(5)  # type: ignore[attr-defined]
    monkeypatch.setattr(encoded, "_pool", lambda: pool)
    monkeypatch.setattr(encoded, "_TOGETHER", 1)
    monkeypatch.setattr(encoded, "_BATCHES_AHEAD", 5)
    assert home.train("whole") == home.expected
    pool.shutdown()


def test_a_store_says_what_decoded_its_pictures(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version is no matter as long as it makes the same pixels; if it does not, both are named."""
    manifest = open_store(home.stores["train"]).manifest
    assert manifest.computed.versions.items() >= encoded.decoded_by().items()
    stream = BatchStream(home.splits.train, None, home.recipe.data.augmentation, seed=0, views=2, batch=16)
    monkeypatch.setattr(probes, "decoded_by", lambda: {**encoded.decoded_by(), "pillow": "99"})
    stream.check_probes(manifest)
    decode = encoded.EncodedPictures._decoded
    monkeypatch.setattr(encoded.EncodedPictures, "_decoded", lambda *given: [one ^ 1 for one in decode(*given)])
    with pytest.raises(RefusedError, match="does not show what the teacher saw") as refused:
        stream.check_probes(manifest)
    assert f"pictures were decoded by pillow {manifest.computed.versions['pillow']} instead of 99" in str(refused.value)


def test_a_finished_model_says_nothing_of_how_rows_were_kept(home: Home) -> None:
    image = home.recipe.data.image
    cards = [
        ModelCard.of(recipes.Mlp(hidden=4), home.splits.train, None, image.model_copy(update={"keep": keep}))
        for keep in ("auto", "encoded", "pixels")
    ]
    assert len({card.fingerprint for card in cards}) == 1
