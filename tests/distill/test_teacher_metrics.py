"""What stored targets say of a language model's teacher, against decoded probabilities in NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest

from akd_dist.data.rows import Rows
from akd_dist.distill.teacher_metrics import agreement_of, teacher_metrics
from akd_dist.storage.decoder import probabilities
from akd_dist.storage.reader import LogitStore, open_store
from tests import target_stores

LENGTH = 96


def rows_of(classes: int) -> Rows:
    """Blocks with as many targets as the stores have."""
    counts = np.diff(target_stores.offsets())
    blocks = np.zeros((len(counts), 3, LENGTH), np.int32)
    blocks[:, 0] = np.random.default_rng(0).integers(0, classes, (len(counts), LENGTH))
    blocks[:, 2] = np.arange(LENGTH) < counts[:, None]
    return Rows(blocks, counts, classes, "", (), Path(), task="language_model")


def decoded(store: LogitStore) -> np.ndarray:
    identity = store.manifest.identity
    arrays = store.targets(0, 0, store.layout.rows)
    if identity.is_top_k:
        described = identity.top_k.unpack(arrays, identity.classes)
        return probabilities(identity.top_k, described, store.dictionary(), 1.0)
    z = arrays["logits"].astype(np.float64)
    z = np.exp(z - z.max(1, keepdims=True))
    shares: np.ndarray = z / z.sum(1, keepdims=True)
    return shares


@pytest.mark.parametrize("kind", ["dense", "top_k"])
def test_they_are_those_of_its_probabilities(kind: str) -> None:
    store = open_store(str(target_stores.golden_of(kind)))
    rows = rows_of(store.classes)
    labels = rows.inputs[:, 0, 1:][rows.inputs[:, 2, :-1] != 0]
    p = decoded(store)
    found = teacher_metrics(store, rows, np.full(store.classes, 2))
    assert found is not None
    expected = -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-30)).mean()
    assert found["cross_entropy"] == pytest.approx(expected, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["cross_entropy"]))
    assert found["bits_per_byte"] == pytest.approx(found["cross_entropy"] / math.log(2) / 2)
    assert found["accuracy"] == pytest.approx((p.argmax(1) == labels).mean(), abs=2e-3)
    assert "bits_per_byte" not in (teacher_metrics(store, rows) or {})
    assert agreement_of(store, store) == 1
