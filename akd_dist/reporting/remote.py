"""Reports of runs that lie in object storage: what they are made of is copied here, and the pages are put there."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from akd_dist.base.errors import AkdError
from akd_dist.base.files import expanded
from akd_dist.base.places import check_uri, named_in_errors
from akd_dist.documents.report import ReportDocument
from akd_dist.reporting.page import PAGE, write_reports
from akd_dist.storage.roots import open_root
from akd_dist.storage.run_copy import REPORTED
from akd_dist.tracking.remote import copy_to_read


@dataclass
class AtHand:
    """Runs, each in a folder of this machine."""

    folders: list[Path] = field(default_factory=list)
    """In the order in which they were named."""
    names: dict[str, str] = field(default_factory=dict)
    """The URI of each folder that is a copy."""

    def named(self, document: Any) -> Any:
        """A document with runs called as they were named, wherever it names them."""
        return json.loads(self.in_words(json.dumps(document)))

    def in_words(self, text: str) -> str:
        """A text that names runs, as they were named."""
        for folder, uri in self.names.items():
            text = text.replace(folder, uri)
        return text


@contextlib.contextmanager
def at_hand(runs: Sequence[str | Path]) -> Iterator[AtHand]:
    """Runs in folders of this machine, those in object storage as copies; refusals call these by their URIs.

    Raises:
        RecipeError: a URI names no place.
        MachineError: object storage cannot be read.
    """
    found, copies = AtHand(), []
    for run in runs:
        check_uri(str(run))
        if "://" in str(run):
            copies.append(copy_to_read(str(run)))
            found.folders.append(copies[-1].folder)
            found.names[str(copies[-1].folder)] = copies[-1].uri
        else:
            found.folders.append(expanded(run))
    with named_in_errors(found.names):
        for copy in copies:
            copy.refresh(REPORTED)
        yield found


def write_reports_of(runs: AtHand, out: Path | None = None, *, refused: list[AkdError] | None = None) -> ReportDocument:
    """As `page.write_reports`; the pages of copies are put where the runs are, and the one of several beside the first.

    Returns:
        The document, with the places of the copies.
    """
    document = write_reports(runs.folders, out, refused=refused)
    for folder, uri in runs.names.items():
        page = Path(folder) / PAGE
        if any(one.report == str(page) for one in document.runs):
            open_root(uri).put(PAGE, page.read_bytes())
    first = runs.names.get(str(runs.folders[0]))
    if first is not None and out is None and document.comparison is not None:
        page, place = Path(document.comparison.report), open_root(first).parent
        place.put(PAGE, page.read_bytes())
        runs.names[str(page.parent)] = place.uri
    return document
