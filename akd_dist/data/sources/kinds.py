"""The kind of source that a recipe names -> the class that reads it."""

from typing import Any

from akd_dist import recipe
from akd_dist.data.sources.base import Kind, Source
from akd_dist.data.sources.custom import CustomSource
from akd_dist.data.sources.digits import DigitsSource
from akd_dist.data.sources.huggingface import HuggingFaceSource
from akd_dist.data.sources.idx import IdxSource
from akd_dist.data.sources.image_folder import ImageFolderSource
from akd_dist.data.sources.parquet import ParquetSource
from akd_dist.data.sources.text import TextSource
from akd_dist.data.sources.webdataset import WebDatasetSource


def kind_of(spec: recipe.Source) -> Kind:
    """The kind of source that a recipe names."""
    match spec:
        case recipe.Digits():
            return DigitsSource()
        case recipe.Idx():
            return IdxSource(spec)
        case recipe.Parquet():
            return ParquetSource(spec)
        case recipe.ImageFolder():
            return ImageFolderSource(spec)
        case recipe.WebDataset():
            return WebDatasetSource(spec)
        case recipe.TextData() | recipe.ChatData():
            return TextSource(spec)
        case recipe.HuggingFaceData():
            return HuggingFaceSource(spec)
        case recipe.CustomData():
            return CustomSource(spec)


def open_kind(kind: Kind, known: Any = None) -> Source:
    """A source, looked at; `known` is what the planning process says of it, as `Source.known`."""
    return kind.open(known) if isinstance(kind, WebDatasetSource | TextSource) else kind.open()
