"""Where the rows of a recipe come from: one class a kind of source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from akd_dist.recipe.base import FACTORY, Classes, Count, Factory, Name, Share, Spec, one_or_several

SourceKind = Annotated[Name, Field(description="Which kind of source this is.")]


class Digits(Spec):
    """The 1,797 handwritten digits that come with scikit-learn: 8 x 8 grey images, 10 classes."""

    kind: SourceKind[Literal["digits"]] = "digits"


class Idx(Spec):
    """Images and labels in IDX files, as MNIST and its family come; plain or gzip-compressed."""

    kind: SourceKind[Literal["idx"]] = "idx"
    images: str
    """The file of inputs, uint8 of two dimensions or more; relative to the recipe's folder, or s3:// or gs://."""
    labels: str | None = None
    """The file of labels, counted from 0; left out for data.unlabelled, where none is read."""
    classes: Classes | None = None
    """How many classes there are; none takes the largest label plus one."""


Columns = Annotated[
    Annotated[str, Tag("one")] | Annotated[list[str], Field(min_length=1, max_length=2), Tag("several")],
    Discriminator(one_or_several),
]


class Table(Spec):
    """Named columns: one of inputs (two of text make a pair), one of labels."""

    input: Columns = "input"
    """The column of inputs: encoded images (bytes, or a struct with bytes), text, or lists of numbers. A list of two
    names is a pair of texts."""
    label: str = "label"
    """The column of labels: class ids counted from 0, class names, or numbers where data.task is regression."""
    shape: list[Count] | None = None
    """The shape of one input, for columns of flat lists; none keeps the list as a vector."""
    classes: Classes | None = None
    """How many classes there are; none takes the largest label plus one, or the names there are."""


class Parquet(Table):
    """A dataset in Parquet. Row order is the order of the files."""

    kind: SourceKind[Literal["parquet"]] = "parquet"
    path: str
    """A file, a folder or a glob; relative to the recipe's folder, or s3:// or gs://."""


class ImageFolder(Spec):
    """Pictures as files: a folder for each class, or a table that gives the label of each file."""

    kind: SourceKind[Literal["image_folder"]] = "image_folder"
    path: str
    """The folder; relative to the recipe's folder, or s3:// or gs://. Without labels, each folder in it is a class."""
    labels: str | None = None
    """A CSV, JSON Lines or Parquet file with a row for each picture; none takes metadata.csv, .jsonl or .parquet in
    the folder where there is one."""
    file: str = "file_name"
    """Its column of files, relative to the folder."""
    label: str = "label"
    """Its column of labels: class ids counted from 0, class names, or numbers where data.task is regression."""
    unlisted: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of pictures that it does not list: `leave_out` where it names a part of the folder on purpose."""
    classes: Classes | None = None
    """How many classes there are; none takes the largest label plus one, or the names there are."""


class WebDataset(Spec):
    """Pictures in tar files, as WebDataset has them: key.jpg with key.cls or key.json, one beside the other."""

    kind: SourceKind[Literal["webdataset"]] = "webdataset"
    path: str
    """A tar file, a folder, a glob, or a brace expression such as train-{000..099}.tar; relative to the recipe's
    folder, or s3:// or gs://."""
    label: str = "cls"
    """`cls` for class ids in key.cls; anything else is a name within key.json."""
    classes: Classes | None = None
    """How many classes there are; none takes the largest label plus one, or the names there are."""


class HuggingFaceData(Table):
    """A dataset of the Hugging Face `datasets` library (extra: akd-dist[huggingface])."""

    kind: SourceKind[Literal["huggingface"]] = "huggingface"
    path: str | None = None
    """A folder that `save_to_disk` wrote; relative to the recipe's folder."""
    name: str | None = None
    """A dataset on the hub, where one can be reached."""
    config: str | None = None
    """Its configuration, if it has several."""
    split: str | None = None
    """Which of its splits; needed unless the folder holds a single one."""

    @model_validator(mode="after")
    def _one_place(self) -> HuggingFaceData:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or a name")
        if self.name is not None and self.split is None:
            raise ValueError("a dataset by name needs a split, such as `split: train`")
        return self


class CustomData(Table, Factory):
    """Rows by your own function, in the recipe's folder or in a module that `code:` lists.

    It returns an Arrow table, or a map-style `torch.utils.data.Dataset` whose items are (input, label).
    """

    kind: SourceKind[Literal["custom"]] = "custom"
    factory: str = Field(pattern=FACTORY)
    """`module:function`, called as function(**arguments)."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of the function; `./x` in them is a path relative to the recipe's folder. A change of them, of
    what they name or of the module's file prepares the data anew."""


class TextData(Spec):
    """Documents for a language model: Parquet, JSON Lines, or plain text, of which each file is a document."""

    kind: SourceKind[Literal["text"]] = "text"
    path: str
    """A file, a folder or a glob; relative to the recipe's folder, or s3:// or gs://. Of a folder the files that end
    in .parquet, .jsonl or .txt, all of one of these formats."""
    input: str = "text"
    """The column of documents, or the key of JSON Lines; plain text needs none."""


class ChatData(Spec):
    """Conversations for a language model: Parquet or JSON Lines, with a list of messages in each row."""

    kind: SourceKind[Literal["chat"]] = "chat"
    path: str
    """A file, a folder or a glob; relative to the recipe's folder, or s3:// or gs://. Of a folder the files that end
    in .parquet or .jsonl, all of one of these formats."""
    input: str = "messages"
    """The column of messages, or the key of JSON Lines: lists of objects with `role` and `content`."""


Source = Annotated[
    Digits | Idx | Parquet | ImageFolder | WebDataset | HuggingFaceData | CustomData | TextData | ChatData,
    Discriminator("kind"),
]


def _share_or_source(value: object) -> str | None:
    """Tell a share from a source by its shape, so that an error speaks of the one that was meant."""
    if isinstance(value, Mapping):
        return value.get("kind")
    return getattr(value, "kind", "share")


ShareOrSource = Annotated[
    Annotated[Share, Tag("share")]
    | Annotated[Digits, Tag("digits")]
    | Annotated[Idx, Tag("idx")]
    | Annotated[Parquet, Tag("parquet")]
    | Annotated[ImageFolder, Tag("image_folder")]
    | Annotated[WebDataset, Tag("webdataset")]
    | Annotated[HuggingFaceData, Tag("huggingface")]
    | Annotated[CustomData, Tag("custom")]
    | Annotated[TextData, Tag("text")]
    | Annotated[ChatData, Tag("chat")],
    Discriminator(_share_or_source),
]


def _word_or_source(value: object) -> str | None:
    """Tell a word from a source by its shape, so that an error speaks of the one that was meant."""
    if isinstance(value, Mapping):
        return value.get("kind")
    return getattr(value, "kind", "word")


Unlabelled = Annotated[
    Annotated[Literal["rest", "missing"], Tag("word")]
    | Annotated[Digits, Tag("digits")]
    | Annotated[Idx, Tag("idx")]
    | Annotated[Parquet, Tag("parquet")]
    | Annotated[ImageFolder, Tag("image_folder")]
    | Annotated[WebDataset, Tag("webdataset")]
    | Annotated[HuggingFaceData, Tag("huggingface")]
    | Annotated[CustomData, Tag("custom")],
    Discriminator(_word_or_source),
]
