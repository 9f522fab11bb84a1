"""Rows to run a finished model on: a split of a recipe, Parquet or picture files, or the digits; in batches, in order.

A recipe's rows are the memory maps that training used. All others are read and decoded batch by batch, so that neither
memory nor disk grows with them, and they may lack labels.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.base.files import expanded
from akd_dist.base.formatting import some_of
from akd_dist.base.trusted import Trusted
from akd_dist.data.blocks import Block, default_threads, map_blocks
from akd_dist.data.columns import Images, inputs_of, notes_of
from akd_dist.data.framing import line_for
from akd_dist.data.labels import Classes, Labels, labels_of
from akd_dist.data.noted import MixedSizesError, read_from
from akd_dist.data.prepare import READ_BYTES, OpenedSource, kinds_of
from akd_dist.data.row_cache import Progress, prepare
from akd_dist.data.rows import SPLITS, Rows
from akd_dist.data.schemas import input_kind, label_kind
from akd_dist.data.sources.base import Source
from akd_dist.data.sources.kinds import kind_of
from akd_dist.data.splitting import source_of_split
from akd_dist.data.text import ByteTokenizer, Tokenizer, tokenizer_of
from akd_dist.distill.metrics import evaluation_rows
from akd_dist.models.card import ModelCard, flow
from akd_dist.serve.named_data import NamedData, named_data
from akd_dist.storage.node_cache import NoRoomError

DIGITS = "digits"
RECIPES = (".yaml", ".yml")
Batch = tuple[np.ndarray, np.ndarray | None]
"""Inputs [n, *shape], and labels [n] where there are any."""


@dataclass(frozen=True)
class DataRequest:
    """Which data a user means, and what the data themselves do not tell."""

    data: str
    """A recipe file or a run's folder; Parquet: a file, a folder, a glob or `s3://`; a folder of pictures, or tar files
    of them; or `digits`."""
    split: recipe.Split | None = None
    """Of a recipe: `train`, `validation` or `test`, the one by default."""
    input: tuple[str, ...] = ()
    """The column of inputs, or two of a pair of texts; none takes those of the student's run, or `input`. None of
    pictures."""
    label: str | None = None
    """The column of labels; none takes that of the student's run, or `label`. An empty name means no labels."""
    tokenizer: str | None = None
    """Where text becomes ids as for the model: a folder, or a name on the hub."""
    trust: tuple[str, ...] = ()
    """Modules that model folders and runs may name."""

    def trusted(self) -> Trusted:
        """Whose code may run: what a recipe file says, where the user names one, and the modules that they trust.

        The recipe in a run's folder is not the user's word, named as a file or not: the run may come from anywhere.
        """
        own, path = Trusted(), Path(self.data)
        of_run = (path.parent / "identity.json").exists()
        if "://" not in self.data and path.suffix in RECIPES and not of_run:
            own = recipe.load_recipe(self.data).own().trusted
        return own.model_copy(update={"modules": (*own.modules, *self.trust)})


@dataclass(frozen=True)
class Home:
    """What the surroundings of a model tell of its data, beyond its card."""

    uri: str
    """The model's folder."""
    run: recipe.Recipe | None
    """The recipe of the run that the folder lies in."""


@dataclass(frozen=True)
class Examples:
    """Rows to run models on."""

    name: str
    """For messages and documents."""
    split: recipe.Split | None
    """Of a recipe."""
    like: Rows
    """Rows of the same meaning, shape and dtype; not all of them where they are streamed."""
    rows: int
    """How many."""
    labelled: bool
    """Whether they have labels."""
    batches: Callable[[], Iterator[Batch]]
    """All rows, `evaluation_rows` at a time, whatever the files are cut into."""
    notes: Callable[[], Sequence[str]]
    """What of the data is left out without being wrong, a line each; known once all batches are read."""
    check_image: Callable[[ModelCard, str], None]
    """Refuses a model, called by its name, for which pictures become inputs in another way."""
    names: Callable[[int, int], Sequence[str]] | None = None
    """The files that rows start..stop - 1 come from, where each is one of its own."""

    def check(self, card: ModelCard, uri: str) -> None:
        """Refuse a model that was not made for these rows.

        Raises:
            RefusedError: as `ModelCard.check_rows` and `ModelCard.check_image`.
        """
        card.check_rows(self.like, f"the model {uri}")
        self.check_image(card, f"the model {uri}")


@contextlib.contextmanager
def open_examples(
    asked: DataRequest,
    card: ModelCard,
    home: Home,
    cache_root: Path,
    *,
    need_labels: bool = False,
    on_progress: Progress | None = None,
) -> Iterator[Examples]:
    """The rows that a user names, checked against the model they are for before any long reading.

    Args:
        need_labels: refuse rows without labels; otherwise labels are read where the default column is there.
        on_progress: told while a recipe's rows are prepared.

    Raises:
        RecipeError: options that do not go together.
        RefusedError: there are no such data, they are not for this model (names both sides), or nobody knows which
            tokenizer made the model's ids.
        MachineError: object storage, the hub or the disk does not do what it should.
    """
    if need_labels and asked.label == "":
        raise RecipeError(
            "rows without labels cannot be evaluated",
            got="an empty --label",
            expected="a column of labels",
            next="name it with --label, or use `akd-dist predict`",
        )
    path = recipe_path(asked.data)
    if path is not None:
        refuse_options(asked, "input", "label", "tokenizer")
        examples = _of_recipe(path, asked, card, home, cache_root, need_labels, on_progress)
        examples.check(card, home.uri)
        yield examples
        return
    refuse_options(asked, "split", *(("input", "label", "tokenizer") if asked.data == DIGITS else ()))
    with named_data(asked.data, cache_root) as named:
        yield _of_source(_source(asked, named, card, home, need_labels), asked, card, home)


def recipe_path(data: str) -> Path | None:
    """The recipe that data are named by: a file, or that of a run's folder; None of other data."""
    if "://" in data:
        return None
    path = Path(data)
    if path.suffix in RECIPES:
        return path
    return path / "recipe.yaml" if (path / "recipe.yaml").is_file() else None


def refuse_options(asked: DataRequest, *names: str) -> None:
    """Refuse options that say what the data say themselves.

    Raises:
        RecipeError: names the option.
    """
    for name in names:
        if (value := getattr(asked, name)) not in (None, (), ""):
            what = "a recipe, which says so itself" if name != "split" else "data other than a recipe"
            if asked.data == DIGITS and name != "split":
                what = "the digits"
            raise RecipeError(
                f"--{name} is not for {what}",
                got=f"--{name} {value if isinstance(value, str) else ' '.join(value)} with {asked.data}",
                next=f"leave out --{name}",
            )


# ---- a recipe


def _of_recipe(
    path: Path,
    asked: DataRequest,
    card: ModelCard,
    home: Home,
    cache_root: Path,
    need_labels: bool,
    on_progress: Progress | None,
) -> Examples:
    split: recipe.Split = asked.split or "test"
    if split not in SPLITS:
        raise RecipeError("there is no such split", got=split, expected=f"one of {', '.join(SPLITS)}")
    loaded = recipe.load_recipe(path)
    recipe.trust(loaded, asked.trusted().seen_from(f"the recipe {path}", loaded.folder))
    check_image = functools.partial(_check_image, loaded.data, split)
    check_image(card, f"the model {home.uri}")  # before pictures are decoded
    try:
        splits = prepare(loaded.data, cache_root, on_progress=on_progress)
    except NoRoomError as error:
        error.next = f"{error.next}; or name the file with the rows instead of a recipe: it is read from end to end"
        raise
    rows: Rows = getattr(splits, split)
    read = {source_of_split(loaded.data, split), *["unlabelled"] * (split == "train")}
    # Of train rows that have no labels all are predicted, without any; only those that have some are evaluated.
    labelled = asked.label != "" and (need_labels or not rows.unlabelled)
    count = rows.labelled if labelled else len(rows)
    if not count:
        raise RefusedError(
            f"no {split} row of {asked.data} has a label",
            got=f"{rows.unlabelled:,} rows without",
            expected="rows with labels",
            next="choose another --split, or use `akd-dist predict`",
        )

    size = evaluation_rows(rows.classes)

    def batches() -> Iterator[Batch]:
        splits.sources.begin()
        for start in range(0, count, size):
            inputs, labels = rows.read(start, min(start + size, count))
            yield np.asarray(inputs), labels if labelled else None
        # At the end, when all rows were read: `evaluate` and `predict` report nothing before they come by here.
        rows.content().verify()
        splits.sources.finish()

    return Examples(
        asked.data,
        split,
        rows,
        count,
        labelled,
        batches,
        lambda: [*read_from(splits.findings, read), *_by_recipe(loaded.data.image, card)],
        check_image,
    )


def _by_recipe(image: recipe.Image, card: ModelCard) -> list[str]:
    """A line on pictures that become inputs by a recipe's definition, where a model has none of its own."""
    if card.image != recipe.Image() or image.written() == card.image.written():
        return []
    return [f"pictures become inputs as the recipe says, data.image: {flow(image.written())}; the model says nothing"]


def _check_image(data: recipe.DataSpec, split: str, card: ModelCard, what: str) -> None:
    """Refuse a model for which the pictures of a recipe would become inputs in another way.

    Raises:
        RefusedError: as `ModelCard.check_image`.
    """
    try:
        card.check_image(data.image, what)
    except RefusedError:
        # Rows that are no pictures do not become inputs by it, and their recipe cannot say otherwise.
        if data.image != recipe.Image() or (data.text is None and _holds_pictures(data, split)):
            raise


def _holds_pictures(data: recipe.DataSpec, split: str) -> bool:
    name = source_of_split(data, split)
    source, shape = kinds_of(data)[name].open(), getattr(getattr(data, name), "shape", None)
    return isinstance(inputs_of(next(source.blocks(1)).inputs, 0, source.input_place, shape, None, data.image), Images)


# ---- everything else, streamed


def _source(asked: DataRequest, named: NamedData, card: ModelCard, home: Home, need_labels: bool) -> Source:
    if asked.data == DIGITS:
        return kind_of(recipe.Digits()).open()
    try:
        return kind_of(named.spec(home.run, card.class_names, asked.input, asked.label, need_labels)).open()
    except RefusedError as error:
        if error.next is None or not any(word in error.next for word in ("recipe", "set `", "`labels", "`path`")):
            raise
        raise RefusedError(error.what, got=error.got, expected=error.expected, next=named.advice) from error


def _of_source(source: Source, asked: DataRequest, card: ModelCard, home: Home) -> Examples:
    first = next(source.blocks(1))
    _check_kind(source, first, card, home)
    tokenizer = _tokenizer(asked, card, home, pair=len(first.inputs) == 2)
    inputs = inputs_of(first.inputs, 0, source.input_place, None, tokenizer, card.image)
    if isinstance(inputs, Images):  # grey or in colour as the model's own, which grey images fit as well
        inputs = inputs.in_colour() if card.input_shape[:1] == (3,) else inputs.as_first()
    elif len(inputs.shape) == 1 and math.prod(inputs.shape) == math.prod(card.input_shape) and tokenizer is None:
        inputs = inputs_of(first.inputs, 0, source.input_place, card.input_shape, tokenizer, card.image)
    names = source.class_names if card.class_names is not None else None
    like = Rows(
        np.empty((0, *inputs.shape), inputs.dtype),
        np.empty(0),
        classes=card.classes if names is not None else source.classes or len(source.class_names or ()) or card.classes,
        fingerprint="",
        blocks=(),
        folder=Path(),
        task=card.task,
        class_names=card.class_names,
        tokens=inputs.tokens,
    )
    card.check_rows(like, f"the model {home.uri}")
    labelled = asked.label != "" and not pa.types.is_null(first.labels.type)
    convert = None
    if labelled:
        _check_names(source, first, card, home)
        classes = Classes(card.classes, card.class_names, complete=True)
        convert = labels_of(first.labels, 0, source.label_place, card.task, classes, names)

    def read(block: Block) -> Batch:
        with _advising(card):
            pixels = inputs(block.inputs, block.rows)
        return pixels, None if convert is None else _labels(convert, block, card)

    size = evaluation_rows(card.classes)
    most = max(1, min(size, READ_BYTES // OpenedSource(source, first, inputs).row_bytes))
    return Examples(
        asked.data,
        None,
        like,
        source.rows,
        labelled,
        lambda: _regrouped(map_blocks(source.blocks(most), read, default_threads()), size),
        lambda: [*source.notes, *notes_of(inputs, source.name)],
        lambda other, what: other.check_image(card.image, what) if isinstance(inputs, Images) else None,
        source.names,
    )


@contextlib.contextmanager
def _advising(card: ModelCard) -> Iterator[None]:
    """Where pictures are of several sizes, say how they come to that of the model."""
    try:
        yield
    except MixedSizesError as error:
        line = line_for(card.input_shape[1:])
        error.next = f"save them in one size, or give as data a recipe of them that has {line}"
        raise


def _labels(convert: Labels, block: Block, card: ModelCard) -> np.ndarray:
    try:
        return convert(block.labels, block.rows)
    except RefusedError as error:  # which speaks of a recipe
        known = some_of(card.class_names or ()) or f"classes 0 to {card.classes - 1}"
        expected = f"what the model knows: {known}" if card.task == "classification" else error.expected
        advice = "correct the row, or remove it"
        raise RefusedError(error.what, got=error.got, expected=expected, next=advice) from error


def _regrouped(blocks: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same rows in batches of one size: kernels choose their order of summation by the batch's shape."""
    waiting: list[Batch] = []
    count = 0
    for block in blocks:
        while count + len(block[0]) >= size:
            cut = size - count
            yield _joined([*waiting, _part(block, slice(cut))])
            block, waiting, count = _part(block, slice(cut, None)), [], 0
        waiting.append(block)
        count += len(block[0])
    if count:
        yield _joined(waiting)


def _part(batch: Batch, rows: slice) -> Batch:
    inputs, labels = batch
    return inputs[rows], None if labels is None else labels[rows]


def _joined(batches: list[Batch]) -> Batch:
    inputs = np.concatenate([inputs for inputs, _ in batches])
    labels = [labels for _, labels in batches if labels is not None]
    return inputs, np.concatenate(labels) if labels else None


def _check_kind(source: Source, first: Block, card: ModelCard, home: Home) -> None:
    """Text for a model of text, and only there: told before a tokenizer is looked for."""
    kind = input_kind(first.inputs[0].type) if hasattr(first.inputs[0], "type") else "numbers"
    if (kind == "text") != (card.tokens is not None):
        raise RefusedError(
            f"the model {home.uri} was made for other data",
            got="a model of text" if card.tokens else f"a model of {card.input_dtype} {list(card.input_shape)}",
            expected=f"a model of {kind}, as in {source.input_place(0)}",
            next="choose a model of such inputs, or another column with --input",
        )


def _check_names(source: Source, first: Block, card: ModelCard, home: Home) -> None:
    named = label_kind(first.labels.type) == "names" and card.task == "classification"
    if named and card.class_names is None:
        raise RefusedError(
            f"the model {home.uri} knows its classes by number, and the labels are names",
            got=f"{first.labels[0]} in {source.label_place(0)}",
            expected=f"class ids 0 to {card.classes - 1}",
            next="write the labels as numbers, in the model's order",
        )


def _tokenizer(asked: DataRequest, card: ModelCard, home: Home, *, pair: bool) -> Tokenizer | None:
    """What makes ids of text as the model knows them. Its card says what ids mean, and not how they are made."""
    if card.tokens is None:
        if asked.tokenizer is not None:
            raise RecipeError(
                "--tokenizer is for models of text", got=f"a model of {card.input_dtype}", next="leave out --tokenizer"
            )
        return None
    text = known_text(asked.tokenizer, card, home)
    if text is None:
        raise RefusedError(
            f"nobody knows which tokenizer made the ids that {home.uri} was trained on",
            got=f"{card.tokens.vocabulary} tokens, in a folder outside of its run",
            expected="the tokenizer: beside the model, in the recipe of its run, or named",
            next="add --tokenizer FOLDER",
        )
    return tokenizer_of(text, pair)


def known_text(tokenizer: str | None, card: ModelCard, home: Home) -> recipe.Text | None:
    """How text becomes the ids of a model; None where nobody knows.

    Args:
        tokenizer: a folder, or a name on the hub, if one was given.
    """
    assert card.tokens is not None
    length = card.input_shape[-1]
    if tokenizer is not None:
        folder = expanded(tokenizer)
        local = folder.is_dir()
        return recipe.HuggingFaceText(
            path=str(folder) if local else None, name=None if local else tokenizer, length=length
        )
    if card.tokens == ByteTokenizer.tokens and len(card.input_shape) == 1:
        return recipe.ByteText(length=length)
    if home.run is not None:
        return home.run.data.text
    if (Path(home.uri) / "tokenizer_config.json").is_file():
        return recipe.HuggingFaceText(path=home.uri, length=length)
    return None
