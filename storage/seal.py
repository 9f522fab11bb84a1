"""The manifest of a store as it is read: without one a store is not sealed; one that contradicts itself is damaged."""

from akd_dist.base.errors import AkdError, DamagedError, RefusedError
from akd_dist.base.files import sha256
from akd_dist.storage.arrays import metadata
from akd_dist.storage.layout import CREATION_KEY, MANIFEST_KEY
from akd_dist.storage.manifest import Manifest
from akd_dist.storage.objects import ObjectMissing, ObjectRoot
from akd_dist.storage.roots import open_root


def read_manifest(uri: str) -> Manifest:
    """The manifest of a sealed store, checked in itself; refusals as in `open_store`."""
    root = open_root(uri)
    try:
        data = root.document(MANIFEST_KEY)
    except ObjectMissing:
        raise _not_sealed(root) from None
    try:
        manifest = Manifest.from_bytes(data, root.path_of(MANIFEST_KEY))
        for key, content in metadata(manifest.identity).items():
            # The metadata follow from the identity: a manifest that says otherwise contradicts itself, whatever lies on
            # the disk.
            if manifest.zarr_json[key] != sha256(content):
                told = f"zarr_json.{key}: {manifest.zarr_json[key]}"
                raise DamagedError(f"{root.path_of(MANIFEST_KEY)} is damaged", got=told, expected=sha256(content))
    except DamagedError as error:
        error.next = f"akd-dist stores repair {root.name} --store-root {root.parent.uri}"
        raise
    return manifest


def _not_sealed(root: ObjectRoot) -> AkdError:
    begun = root.exists(CREATION_KEY)
    return RefusedError(
        f"{root.uri} is not sealed: its shards are not all there" if begun else f"there is no store at {root.uri}",
        got=f"no {MANIFEST_KEY}",
        expected=f"a sealed store, with {MANIFEST_KEY}",
        next="akd-dist cache-teacher RECIPE: it computes what is missing"
        if begun
        else "give its whole folder, as `akd-dist stores show ID` tells it; akd-dist cache-teacher RECIPE makes one",
    )
