"""Which kind of root a path or URI is: a local folder, or s3://."""

from pathlib import Path
from urllib.parse import urlsplit

from akd_dist.base.errors import RecipeError
from akd_dist.base.files import expanded
from akd_dist.storage.objects import LocalRoot, ObjectRoot


def open_root(uri: str | Path) -> ObjectRoot:
    """The root that a path or URI names; nothing is opened or created yet.

    Raises:
        RecipeError: a scheme other than s3://, or a URI that names no place.
    """
    text = str(uri)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme == "s3" and urlsplit(text).netloc:
        from akd_dist.storage.s3 import S3Root  # here, since s3 builds on this module, and local stores need no obstore

        return S3Root(text.rstrip("/"))
    if scheme or not text or "\0" in text:
        raise RecipeError(
            f"{text!r} is no place for stores",
            got=f"{scheme}://" if scheme else repr(text),
            expected="a folder, or s3://bucket/prefix",
            next="give another --store-root",
        )
    return LocalRoot(str(expanded(text).absolute()))
