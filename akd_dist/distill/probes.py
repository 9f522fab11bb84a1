"""Whether views show what the teacher saw: a few of them, compared with what its store remembers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from akd_dist.base.errors import RefusedError
from akd_dist.data.encoded import decoded_by, encoded_of
from akd_dist.data.rows import Rows
from akd_dist.data.views import shown_digests
from akd_dist.recipe import Augmentation
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.records import Probe

_UNITS = {"uint8": "on a scale of 0 to 255", "float32": "in the units of the inputs", "int32": "in ids of tokens"}
PROBES_CHECKED = 4096
"""Probe views that are compared before training, over all views of a store."""
PROBE_BYTES = 4 * 2**20
"""Inputs that are compared at a time: a resized crop of them takes some 100 MB, and is over before students are made,
which take more. So the estimate of a worker's memory has no entry for it."""


@dataclass(frozen=True, eq=False)
class SeenViews:
    """The views of some rows, as students see them."""

    rows: Rows
    augmentation: Augmentation
    seed: int
    """The recipe's `data.seed`."""
    views: int
    """How many are read."""
    device: torch.device | str
    """Where they are made."""

    def compare(self, manifest: Manifest) -> None:
        """Compare them with what a store remembers.

        Raises:
            RefusedError, CorruptCacheError: as `BatchStream.check_probes`.
        """
        views = min(self.views, manifest.identity.views)
        # A store of hundreds of views has tens of thousands of probes: a fixed number of them shows as much.
        most = max(1, PROBES_CHECKED // views)
        seen = list[tuple[int, Probe]]()
        for view in range(views):
            there = manifest.probes_of(view)
            chosen = np.unique(np.linspace(0, len(there) - 1, most).astype(int))
            seen += [(view, there[place]) for place in chosen]
        changed = [pair for pair in self._probed(seen) if pair[1].sha256 != pair[2].sha256]
        if changed:
            # It may be the prepared rows that have changed: these can be made again, and nobody needs to be refused.
            if self.rows.held:  # else their blocks were compared as they were fetched
                self.rows.content().verify()
            view, first, _ = changed[0]
            raise RefusedError(
                f"view {view} of row {first.row} does not show what the teacher saw",
                got=f"{len(changed):,} of {len(seen):,} probe views differ; {self._drift(changed)}",
                expected=f"the inputs that the store {manifest.id[:12]} was computed from, bit for bit",
                next=f"use the code and versions that the store was made with{self._decoders(manifest)}; or, if code "
                "changed that your own augmentation imports, rename its function or change an argument: that makes "
                "another store",
            )

    def _decoders(self, manifest: Manifest) -> str:
        """What decoded the pictures for the teacher, and what does here, where rows are encoded."""
        if encoded_of(self.rows.inputs) is None:
            return ""
        here, then = decoded_by(), manifest.computed.versions
        theirs = {name: then.get(name, "unknown") for name in here}
        if here == theirs:
            return ", by which pictures were decoded as they are here"
        names = [f"{name} {theirs[name]} instead of {here[name]}" for name in here if here[name] != theirs[name]]
        return f" (pictures were decoded by {', '.join(names)})"

    def _probed(self, seen: list[tuple[int, Probe]]) -> list[tuple[int, Probe, Probe]]:
        """Probes by view, each with what its row shows now, in the order of views and rows."""
        at_once = max(1, PROBE_BYTES // self.rows.input_bytes)
        found = list[tuple[int, Probe, Probe]]()
        numbers = np.unique([one.row for _, one in seen])
        # All views show the same rows, which may have to be fetched: so each row is read once for all of them.
        for first in range(0, len(numbers), at_once):
            some = numbers[first : first + at_once]
            inputs = self.rows.inputs.take(some, axis=0)
            here = [(view, one) for view, one in seen if some[0] <= one.row <= some[-1]]
            for view, probes in itertools.groupby(here, key=lambda pair: pair[0]):
                then = [one for _, one in probes]
                rows = np.array([one.row for one in then])
                now = shown_digests(
                    self.augmentation,
                    self.seed,
                    inputs[np.searchsorted(some, rows)],
                    rows,
                    view,
                    self.rows.tokens,
                    self.device,
                )
                found += [(view, *pair) for pair in zip(then, now, strict=True)]
        return sorted(found, key=lambda one: (one[0], one[1].row))

    def _drift(self, changed: list[tuple[int, Probe, Probe]]) -> str:
        """How far probes (as the teacher saw them, and as they are now) are apart, in the units of the inputs."""
        samples = [(np.array(then.sample or []), np.array(now.sample or [])) for _, then, now in changed]
        apart = [np.abs(now.astype(np.float64) - then) for then, now in samples if then.shape == now.shape]
        if not any(map(len, apart)):
            return "how far is not known, as the store keeps no sample of them"
        every = np.concatenate(apart)
        unit = _UNITS[self.rows.inputs.dtype.name]
        return f"their sampled values are apart by {every.mean():.3g} on average and {every.max():.3g} at most, {unit}"
