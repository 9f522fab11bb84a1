"""The kind of source that a recipe names -> the class that reads it."""

from akd_dist import recipe
from akd_dist.data.sources.base import Kind
from akd_dist.data.sources.custom import CustomSource
from akd_dist.data.sources.digits import DigitsSource
from akd_dist.data.sources.huggingface import HuggingFaceSource
from akd_dist.data.sources.idx import IdxSource
from akd_dist.data.sources.parquet import ParquetSource


def kind_of(spec: recipe.Source) -> Kind:
    """The kind of source that a recipe names."""
    match spec:
        case recipe.Digits():
            return DigitsSource()
        case recipe.Idx():
            return IdxSource(spec)
        case recipe.Parquet():
            return ParquetSource(spec)
        case recipe.HuggingFaceData():
            return HuggingFaceSource(spec)
        case recipe.CustomData():
            return CustomSource(spec)
