"""Which kind of root a path or URI is: a local folder, or s3://."""

from pathlib import Path

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import expanded
from akd_dist.base.places import check_uri
from akd_dist.storage.objects import LocalRoot, ObjectRoot


def open_root(uri: str | Path) -> ObjectRoot:
    """The root that a path or URI names; nothing is opened or created yet.

    Raises:
        RecipeError: a scheme other than s3://, or a URI that names no place.
    """
    text = str(uri)
    check_uri(text, "stores and runs")
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    query = next((mark for mark in "?#" if mark in text), None)  # of a URI, what follows these is no part of the place
    if scheme == "s3" and query is None:
        from akd_dist.storage.s3 import S3Root  # here, since s3 builds on this module, and local stores need no obstore

        return S3Root(text.rstrip("/"))
    if scheme or not text or "\0" in text:
        raise RecipeError(
            f"{text!r} is no place for stores and runs",
            got=f"the character {query!r}" if scheme == "s3" else f"{scheme}://" if scheme else repr(text),
            expected="a folder, or s3://bucket/prefix",
            next="give another place: --store-root is where stores lie, --run-root where runs do",
        )
    return LocalRoot(str(expanded(text).absolute()))
