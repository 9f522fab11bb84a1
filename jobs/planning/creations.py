"""What a store of logits is, and how it is to be computed: settled before anything is."""

from importlib.metadata import version

from akd_dist.data.encoded import decoded_by, encoded_of
from akd_dist.data.rows import Rows
from akd_dist.data.views import by_content
from akd_dist.distill.teacher import served_fingerprint
from akd_dist.models.card import ModelCard
from akd_dist.models.inference import compiled_by
from akd_dist.recipe import NoAugmentation, Recipe
from akd_dist.storage.identity import format_of
from akd_dist.storage.layout import TARGETS_FORMAT
from akd_dist.storage.manifest import Computed, Creation, Identity


def identity_of(recipe: Recipe, rows: Rows, split: str, teacher: str, store_format: int | None = None) -> Identity:
    """The identity of a split's store. Only train rows are augmented.

    Args:
        teacher: as `served_fingerprint` has it.
        store_format: an older one, where a store of before is looked for.
    """
    augmentation = recipe.data.augmentation if split == "train" else NoAugmentation()
    plain = isinstance(augmentation, NoAugmentation)
    encoding = recipe.cache.encoding.config()
    items, tokens = None, None
    if rows.task == "language_model":
        items = rows.targets
        tokens = {"tokenizer": (rows.tokens and rows.tokens.tokenizer) or "", "vocabulary": rows.classes}
    return Identity(
        format=format_of(encoding, items) if store_format is None else store_format,
        dataset=rows.fingerprint,
        rows=len(rows),
        teacher=teacher,
        augmentation=by_content(augmentation),
        # Where no view is drawn the seed changes no logit, so recipes of any seed find the same store.
        data_seed=None if plain else recipe.data.seed,
        views=recipe.data.views if split == "train" else 1,
        encoding=encoding,
        classes=rows.classes,
        items=items,
        tokens=tokens,
    )


def formats_of(recipe: Recipe, rows: Rows) -> list[int]:
    """The formats that a store of such rows may be in, the newest first."""
    newest = format_of(recipe.cache.encoding.config(), rows.targets if rows.task == "language_model" else None)
    return [newest] if newest >= TARGETS_FORMAT else list(range(newest, 0, -1))


def creation_of(
    recipe: Recipe, rows: Rows, split: str, card: ModelCard, device: str, store_format: int | None = None
) -> Creation:
    """The identity of a split's store and how it is to be computed.

    Args:
        device: as `device_name` says it, where a store is to be written; no part of its identity.
        store_format: as of `identity_of`.
    """
    fingerprint = served_fingerprint(card, recipe.cache)
    identity = identity_of(recipe, rows, split, fingerprint, store_format)
    computed = Computed(
        batch_rows=recipe.cache.batch_rows,
        threads=recipe.cache.threads,
        device=device,
        # Another version of any of these may change a last bit of a logit, or a byte of a shard.
        versions={name: version(name) for name in ("akd-dist", "numcodecs", "numpy", "torch", "zarr")}
        | ({} if encoded_of(rows.inputs) is None else decoded_by())
        | (compiled_by(recipe.device) if recipe.cache.compile else {}),
    )
    teacher = {"fingerprint": fingerprint, "spec": card.model_dump(mode="json")}
    if recipe.cache.inference:  # stores of before say nothing of it
        teacher["inference"] = recipe.cache.inference
    return Creation(identity=identity, computed=computed, dataset=rows.describe(), teacher=teacher)


def computed_on(device: str, creation: Creation) -> Creation:
    """The same store, computed on this device."""
    return creation.model_copy(update={"computed": creation.computed.model_copy(update={"device": device})})
