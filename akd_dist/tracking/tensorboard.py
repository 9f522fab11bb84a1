"""An event file in each student's folder, for TensorBoard.

tensorboardX frames the records. Its SummaryWriter is not used: for each student it would hold a queue between
processes, two threads and three open files; and where the disk is full its thread dies without a word.
"""

import contextlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

from akd_dist.tracking.trackers import Log, Record, Tracked, end_of, final_scalars, scalars


class TensorBoard:
    """An event file in each student's folder; written by tensorboardX, which needs neither torch nor TensorFlow."""

    name = "TensorBoard"

    def open(self, student: Tracked) -> Log:
        """What its event file holds."""
        return EventFile(student)

    def close(self) -> None:
        """Nothing is left open."""


class EventFile:
    """One student's event file. An epoch is one record of it, so that it holds an epoch or does not."""

    def __init__(self, student: Tracked) -> None:
        # One name for all attempts: a TensorBoard that is open goes on reading where it was.
        self.path = student.folder / "tensorboard" / "events.out.tfevents.akd-dist"
        self.epochs = 0
        self.ended: str | None = None
        if not self._take_stock():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self._write_head(student)

    def epoch(self, record: Record) -> None:
        """One event with all its numbers."""
        self._append(record["epoch"], [_scalar_summary(scalars(record))])
        self.epochs += 1

    def end(self, result: Record) -> None:
        """One event with the test metrics, where there are any, and the end as text."""
        from tensorboardX import summary

        told = _scalar_summary(final_scalars(result))
        told.MergeFrom(summary.text("end", end_of(result)))
        self._append(result["epochs"], [told])
        self.ended = end_of(result)

    def _write_head(self, student: Tracked) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        # What TensorBoard compares students by, and the recipe to read.
        compared = {f"{split}/{student.metric}": 0.0 for split in ("validation", "test")}
        self._append(0, [*summary.hparams(student.params, compared)])
        self._append(0, [summary.text("recipe", "    " + student.recipe.replace("\n", "\n    "))])

    def _append(self, step: int, summaries: Sequence[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._write([Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries])

    def _write(self, events: Sequence[Any]) -> None:
        """Add events in one write. The file is opened for it alone: a fleet of thousands runs out of nothing."""
        import io

        from tensorboardX.record_writer import RecordWriter

        class InMemory(RecordWriter):  # type: ignore[misc]  # tensorboardX ships no types
            def __init__(self) -> None:
                self._writer = io.BytesIO()

        frames = InMemory()
        for event in events:
            frames.write(event.SerializeToString())
        with open(self.path, "ab") as file:
            file.write(frames._writer.getvalue())

    def _take_stock(self) -> bool:
        """See what is there and cut off what was written in part; False where the beginning is missing."""
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboardX.proto.event_pb2 import Event

        data = self.path.read_bytes() if self.path.exists() else b""
        events, whole = [], 0
        with contextlib.suppress(DecodeError):  # what follows a flipped byte is written again
            for content, end in _frames(data):
                events.append(Event.FromString(content))
                whole = end
        values = [value for event in events for value in event.summary.value]
        if not any(value.tag == "recipe/text_summary" for value in values):
            return False
        if whole < len(data):
            os.truncate(self.path, whole)
        self.epochs = sum(value.tag == "train/loss" for value in values)
        ends = [value.tensor.string_val[0].decode() for value in values if value.tag == "end/text_summary"]
        self.ended = ends[-1] if ends else None
        return True


def _frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of an event file with their ends: length (8 bytes), checksum (4), content, checksum (4)."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return
        yield data[start + 12 : end - 4], end
        start = end


def _scalar_summary(numbers: dict[str, float]) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])
