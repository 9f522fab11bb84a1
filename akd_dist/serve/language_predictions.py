"""What a finished language model says of every token, as a Parquet file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from akd_dist.data.packing import IDS, SEGMENTS
from akd_dist.data.predictions import predictions_file
from akd_dist.data.row_cache import Progress
from akd_dist.distill.output_head import chunk_targets, parts
from akd_dist.distill.sparse_losses import judged_logits
from akd_dist.documents.use import PredictionDocument
from akd_dist.serve.examples import DataRequest
from akd_dist.serve.language import chunks, targets_of
from akd_dist.serve.language_data import Texts, open_texts
from akd_dist.serve.served import Served, as_in_training


def predict_texts(
    model: Served,
    asked: DataRequest,
    out: Path,
    cache_root: Path,
    *,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PredictionDocument:
    """What a language model says of every token, as a Parquet file: whole, or absent.

    A row is a document of files, or a block of a recipe's split. Columns: `row` int64, counted from 0; `file`, where
    documents lie in several; `tokens`, int32 [length]; of blocks `segments`, int32 [length], the document of a block
    that each token is of; `log_probabilities`, float32 [length], natural logarithms: of each token given those before
    it, null where it is no target, as the first of a document; `targets` int64, how many there are; and
    `log_probability`, float64, their sum. The file's metadata say under `akd_dist` which model it was, and the
    fingerprint of the tokenizer. Memory does not grow with the rows.

    Args:
        model: opened.
        asked, out, cache_root, overwrite, on_progress, on_note: as for `evaluation.predict`.

    Raises:
        RecipeError, RefusedError, DamagedError, MachineError: as `language_data.open_texts` and `Texts.prepare`; or
            `out` cannot be written.
    """
    started = time.monotonic()
    texts = open_texts(asked, model, cache_root, on_progress=on_progress)
    texts.prepare(model)
    schema = _schema(model, texts)
    with as_in_training(model), predictions_file(out, schema, overwrite=overwrite) as write:
        rows = _Rows(texts, schema)
        for owners, blocks in texts.shown("predicting", on_progress, on_note):
            found = _log_probabilities(model, blocks, texts.blocks.vocabulary)
            if (done := rows.add(owners, blocks, found)) is not None:
                write(done)
        if (rest := rows.rest()) is not None:
            write(rest)
    return PredictionDocument(
        student=model.home.uri,
        model=model.card.model.label,
        fingerprint=model.card.fingerprint,
        data=texts.name,
        split=texts.split,
        out=str(out),
        rows=texts.rows,
        columns=schema.names,
        bytes=out.stat().st_size,
        device="cuda" if model.device.type == "cuda" else "cpu",
        seconds=round(time.monotonic() - started, 3),
    )


def _schema(model: Served, texts: Texts) -> pa.Schema:
    fields = [("row", pa.int64()), ("tokens", pa.list_(pa.int32()))]
    if texts.files is not None:
        fields.insert(1, ("file", pa.string()))
    if texts.split is not None:
        fields.append(("segments", pa.list_(pa.int32())))
    fields += [("log_probabilities", pa.list_(pa.float32())), ("targets", pa.int64())]
    fields.append(("log_probability", pa.float64()))
    told = {
        "model": model.card.model.label,
        "fingerprint": model.card.fingerprint,
        "task": "language_model",
        "tokenizer": texts.blocks.tokenizer,
    }
    return pa.schema(fields, metadata={"akd_dist": json.dumps(told)})


def _log_probabilities(model: Served, blocks: np.ndarray, vocabulary: int) -> np.ndarray:
    """Of each token given those before it, float64 [n, length]; NaN where it is no target."""
    places, labels = targets_of(blocks)
    found = np.full(len(blocks) * blocks.shape[2], np.nan)
    pieces = [
        judged_logits(logits, torch.from_numpy(labels[part]).to(logits.device)).cross_entropy.neg().double().cpu()
        for part, logits in zip(
            parts(0, len(places), chunk_targets(vocabulary)), chunks(model, blocks, places, vocabulary), strict=True
        )
    ]
    if pieces:
        found[places + 1] = torch.cat(pieces).numpy()
    return found.reshape(len(blocks), -1)


class _Rows:
    """Rows of the file, as blocks come: those of one row are joined, and rows without any are empty."""

    def __init__(self, texts: Texts, schema: pa.Schema) -> None:
        self.texts, self.schema, self.next = texts, schema, 0
        self.held: list[tuple[int, list[np.ndarray]]] = []

    def add(self, owners: np.ndarray, blocks: np.ndarray, found: np.ndarray) -> pa.Table | None:
        """Take in blocks; the rows that are whole by now, if there are any: the last one may go on."""
        for owner, block, its in zip(owners.tolist(), blocks, found, strict=True):
            columns = [block[IDS], block[SEGMENTS], its]
            if self.texts.split is None:  # what fills a block up is no part of a document
                columns = [column[: int((block[SEGMENTS] == 0).sum())] for column in columns]
            if self.held and self.held[-1][0] == owner:  # it begins with the last token of the part before
                before = self.held[-1][1]
                self.held[-1] = owner, [np.concatenate([a, b[1:]]) for a, b in zip(before, columns, strict=True)]
            else:
                self.held.append((owner, columns))
        whole, self.held = self.held[:-1], self.held[-1:]
        return self._table(whole, whole[-1][0] + 1) if whole else None

    def rest(self) -> pa.Table | None:
        """The last rows, those without tokens among them."""
        whole, self.held = self.held, []
        return self._table(whole, self.texts.rows) if self.next < self.texts.rows else None

    def _table(self, whole: list[tuple[int, list[np.ndarray]]], stop: int) -> pa.Table:
        """Rows up to `stop`, in order; those that did not come have no tokens."""
        there, nothing = dict(whole), [np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0)]
        numbers, self.next = range(self.next, stop), stop
        ids, segments, found = zip(*(there.get(number, nothing) for number in numbers), strict=True)
        known = [np.isnan(one) for one in found]
        columns = {
            "row": pa.array(numbers, pa.int64()),
            "file": None if self.texts.files is None else pa.array([self.texts.files(number) for number in numbers]),
            "tokens": _lists(ids, pa.int32()),
            "segments": _lists(segments, pa.int32()),
            "log_probabilities": _lists(found, pa.float32(), known),
            "targets": pa.array([int((~none).sum()) for none in known], pa.int64()),
            "log_probability": pa.array([float(np.nansum(one)) for one in found], pa.float64()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


def _lists(values: Sequence[np.ndarray], kind: pa.DataType, nulls: Sequence[np.ndarray] | None = None) -> pa.ListArray:
    """Arrays as one column of lists."""
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    mask = None if nulls is None else np.concatenate([np.empty(0, np.bool_), *nulls])
    together = np.concatenate([np.empty(0), *values]) if nulls is not None else np.concatenate(values)
    return pa.ListArray.from_arrays(ends, pa.array(together, kind, mask=mask))
