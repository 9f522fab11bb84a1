"""What every document is made of: fields that are known, types with bounds."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from akd_dist.base.errors import encodable

Share = Annotated[float, Field(ge=0, le=1)]
Correlation = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Moment = Annotated[float, Field(ge=0, le=253_370_764_800)]
"""Seconds since 1970, until the last day of 9999 or so: what a calendar can show."""


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode(errors="surrogatepass")) > 255:
        raise ValueError("no name of a folder")
    return name


def _path(place: str) -> str:
    if "\0" in place:
        raise ValueError("no path")
    return place


FolderName = Annotated[str, AfterValidator(_folder_name)]
"""The name of a folder within another, which no document leads out of, and every file system takes."""
Place = Annotated[str, AfterValidator(_path)]
"""A path or URI, relative to the document's folder or not."""
Told = Annotated[str, AfterValidator(encodable)]
"""Text for people, such as an error of any library: pages, trackers and logs can write it, whatever it names."""


class Document(BaseModel):
    """A JSON document of a fixed shape."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def plain(self) -> dict[str, Any]:
        """As it is printed and written: what was said of it, in the order of its fields.

        A field that nobody set is left out: a document of an older version comes back as it was read, and metrics are
        those of their task alone.
        """
        return self.model_dump(mode="json", exclude_unset=True)

    def spelled(self) -> bytes:
        """As JSON for a file, every field of it.

        By `json` and not by pydantic, whose writer refuses a path that is no UTF-8: here it stands as escapes.
        """
        return json.dumps(self.model_dump(mode="json")).encode()


class StoredSplit(Document):
    """The store of one split, as the commands that make stores tell of it."""

    store: str
    """Path or URI of the store's `<id>` folder."""
    id: str
    """The sha256 of the store's identity."""
    hit: bool
    """Whether it was there already."""
    rows: Count
    """Rows of the split."""
    views: Count
    """Augmented views of each row."""
    classes: Count
    """Logits a row."""
    encoding: str
    """Precision of the stored logits."""
    bytes: Count
    """Size of all shards."""
    shards: Count
    """Number of shards."""
