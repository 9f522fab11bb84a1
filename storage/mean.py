"""Several stores of the same rows read as one: the logits of an ensemble, averaged as they are read.

Each member keeps its own store, so that one more member computes one store more. An average of logits is exact in
float64 and rounded once to float32: the same bits on every machine. One of probabilities, log(sum of share x softmax),
goes through exp and log, whose last bit a machine's NumPy decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from akd_dist.base.errors import RefusedError
from akd_dist.base.files import canonical_json, sha256
from akd_dist.storage.layout import LOGITS, TARGETS_FORMAT, Shard, StoreLayout
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.reader import LogitStore, open_store

Average = Literal["logits", "probabilities"]
"""What is averaged: raw logits, or the probabilities that they stand for, of which the logarithm is kept."""


@dataclass(frozen=True)
class Mixture:
    """The stores of an ensemble by their URIs: small, and travels to workers."""

    stores: tuple[str, ...]
    """Of each member."""
    shares: tuple[float, ...]
    """How much each counts; together 1."""
    average: Average
    """What is averaged."""


StoreRef = str | Mixture
"""Where logits lie: in a store, by its URI, or in several that are averaged."""
Stores = Mapping[str, StoreRef]
"""The stores of a teacher's logits by split."""


@dataclass(frozen=True, eq=False)
class MeanStore:
    """Stores of the same rows, classes and encoding, read as their mean; made by `open_logits`."""

    members: tuple[LogitStore, ...]
    shares: tuple[float, ...]
    average: Average

    def __repr__(self) -> str:
        said = f"{self.views} views of {self.num_rows:,} rows, {self.classes} logits each"
        return f"MeanStore({len(self.members)} stores, by {self.average}: {said})"

    @property
    def ref(self) -> Mixture:
        """Where it lies."""
        return Mixture(tuple(store.uri for store in self.members), self.shares, self.average)

    @property
    def uri(self) -> str:
        """That of its first member."""
        return self.members[0].uri

    @functools.cached_property
    def teacher(self) -> str:
        """The fingerprint of the ensemble."""
        return mean_fingerprint([store.teacher for store in self.members], self.shares, self.average)

    @property
    def layout(self) -> StoreLayout:
        """How the members' stores are cut into shards."""
        one = self.members[0].layout
        return StoreLayout(self.views, one.rows, one.classes, one.dtype)

    @property
    def dtype(self) -> str:
        """The dtype of what is read."""
        return "float32"

    @property
    def views(self) -> int:
        """How many views all members have."""
        return min(store.views for store in self.members)

    @property
    def num_rows(self) -> int:
        """How many rows the dataset has."""
        return self.members[0].num_rows

    @property
    def classes(self) -> int:
        """How many logits a row has."""
        return self.members[0].classes

    @functools.cached_property
    def name(self) -> str:
        """What is decoded of it is known by: the seals of its members, and how they are averaged."""
        seals = [store.manifest.sha256 for store in self.members]
        return sha256(canonical_json({"seals": seals, "shares": list(self.shares), "average": self.average}))

    @property
    def manifests(self) -> list[Manifest]:
        """The seals of its members."""
        return [store.manifest for store in self.members]

    def content(self, shard: Shard) -> None:
        """The sha256 of a shard as it is read is not known before it is."""

    def tokens(self) -> dict[str, str]:
        """What names each shard as it is now, by key; as `LogitStore.tokens`."""
        each = [store.tokens() for store in self.members]
        shards = self.layout.shards()
        return {shard.key: sha256(canonical_json([one[shard.key] for one in each])) for shard in shards}

    def shards(self, shards: Sequence[Shard]) -> Iterator[npt.NDArray[np.float32]]:
        """Several whole shards, float32 [shard.rows, classes], in the order asked for; as `LogitStore.shards`."""
        for parts in zip(*(store.shards(shards) for store in self.members), strict=True):
            yield self._mean(parts)

    def rows(self, view: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Logits of consecutive rows of a view, float32 [stop - start, classes]; as `LogitStore.rows`."""
        return self._mean([store.rows(view, start, stop) for store in self.members])

    def _mean(self, parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        pairs = zip(self.members, parts, strict=True)
        logits = [store.manifest.identity.codec.decode({LOGITS: part}) for store, part in pairs]
        return mean_logits(logits, self.shares, self.average)


AnyStore = LogitStore | MeanStore


def mean_logits(
    logits: Sequence[npt.NDArray[np.float32]], shares: Sequence[float], average: Average
) -> npt.NDArray[np.float32]:
    """The mean of several models' logits, float32 [n, classes]: added in float64, in the order of the models.

    Args:
        logits: of each model, float32 [n, classes].
        shares: how much each counts; together 1.
        average: `probabilities` gives the logarithm of the mean probability, which is finite wherever one of them is.
    """
    if average == "logits":
        total = np.zeros(logits[0].shape, np.float64)
        for one, share in zip(logits, shares, strict=True):
            total += share * one.astype(np.float64)
        return total.astype(np.float32)
    pairs = zip(logits, shares, strict=True)
    weighted = [np.log(share) + _log_softmax(one.astype(np.float64)) for one, share in pairs]
    mean: npt.NDArray[np.float64] = functools.reduce(np.logaddexp, weighted)
    return mean.astype(np.float32)


def _log_softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = z - z.max(axis=1, keepdims=True)
    total: npt.NDArray[np.float64] = np.exp(shifted).sum(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(total)
    return result


def mean_fingerprint(teachers: Sequence[str], shares: Sequence[float], average: Average) -> str:
    """The fingerprint of an ensemble of teachers, in their order."""
    members = [list(pair) for pair in zip(teachers, shares, strict=True)]
    return sha256(canonical_json({"average": average, "members": members}))


def open_logits(ref: StoreRef, store_of: Callable[[str], LogitStore] = open_store) -> AnyStore:
    """What lies there, opened for reading.

    Args:
        store_of: gives the store at a URI; whoever has it open already gives that.

    Raises:
        AkdError: as `open_store`.
        RefusedError: one of several describes logits, or has several targets a row.
    """
    if isinstance(ref, str):
        return store_of(ref)
    members = tuple(map(store_of, ref.stores))
    for store in members:
        _check_logits(store)
    return MeanStore(members, ref.shares, ref.average)


def _check_logits(store: LogitStore) -> None:
    """Refuse a store that has no logits to average, a row of each."""
    identity = store.manifest.identity
    if identity.format >= TARGETS_FORMAT:
        why = "what describes logits cannot be averaged: the mean of several has other largest logits, and another tail"
        raise RefusedError(
            f"{store.uri} cannot be one of several stores that are averaged",
            got=f"{identity.encoded}" + (f", {identity.items:,} targets" if identity.items is not None else ""),
            expected=f"stores of logits, a target a row ({why})" if identity.is_top_k else "stores of a target a row",
            next="cache each teacher with encoding float16, or distil from one of them",
        )


def placeless(ref: StoreRef) -> Any:
    """What lies there by its content, as JSON, wherever that is: the id of a store, or those of an ensemble."""
    if isinstance(ref, str):
        return ref.rstrip("/").rpartition("/")[2]
    ids = [placeless(uri) for uri in ref.stores]
    return {"stores": ids, "shares": list(ref.shares), "average": ref.average}


def members_of(store: AnyStore) -> tuple[LogitStore, ...]:
    """The stores that are read: one, or those of an ensemble."""
    return store.members if isinstance(store, MeanStore) else (store,)


def uris_of(*stores: Stores) -> list[str]:
    """The URIs of all stores that are named, each once."""
    refs = [ref for one in stores for ref in one.values()]
    return list(dict.fromkeys(uri for ref in refs for uri in ([ref] if isinstance(ref, str) else ref.stores)))
