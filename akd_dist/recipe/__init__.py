"""A recipe: one YAML file that says everything a run depends on, as typed, frozen objects.

How it is read, checked and explained lies here as well; nothing of what it leads to.
"""

from akd_dist.recipe.base import (
    LOWEST_IS_BEST as LOWEST_IS_BEST,
    METRICS as METRICS,
    Classes as Classes,
    Device as Device,
    Factory as Factory,
    LogitKind as LogitKind,
    Metric as Metric,
    Spec as Spec,
    Split as Split,
    Target as Target,
    Task as Task,
)
from akd_dist.recipe.cache import CacheSpec as CacheSpec, EncodingSpec as EncodingSpec
from akd_dist.recipe.data import (
    Augmentation as Augmentation,
    ByteText as ByteText,
    CustomAugmentation as CustomAugmentation,
    CustomMetric as CustomMetric,
    DataSpec as DataSpec,
    HuggingFaceText as HuggingFaceText,
    Image as Image,
    NoAugmentation as NoAugmentation,
    Normalize as Normalize,
    PadCropFlip as PadCropFlip,
    RandomResizedCropFlip as RandomResizedCropFlip,
    Shift as Shift,
    Text as Text,
    TokenMask as TokenMask,
)
from akd_dist.recipe.json_schema import recipe_schema as recipe_schema
from akd_dist.recipe.language import Attention as Attention, Packing as Packing, Scored as Scored
from akd_dist.recipe.load import load_recipe as load_recipe
from akd_dist.recipe.models import (
    CausalLm as CausalLm,
    Cnn as Cnn,
    Custom as Custom,
    HuggingFaceLm as HuggingFaceLm,
    HuggingFaceModel as HuggingFaceModel,
    LanguageModel as LanguageModel,
    Mlp as Mlp,
    Model as Model,
    PlainCnn as PlainCnn,
    ResNet as ResNet,
    TextTransformer as TextTransformer,
    Timm as Timm,
)
from akd_dist.recipe.recipe import (
    NAME as NAME,
    Callback as Callback,
    Recipe as Recipe,
    StudentSpec as StudentSpec,
    differences as differences,
    forget_later_keys as forget_later_keys,
    trust as trust,
)
from akd_dist.recipe.search import (
    Range as Range,
    Search as Search,
    rung_count as rung_count,
    rung_epochs as rung_epochs,
)
from akd_dist.recipe.sources import (
    ChatData as ChatData,
    CustomData as CustomData,
    Digits as Digits,
    HuggingFaceData as HuggingFaceData,
    Idx as Idx,
    ImageFolder as ImageFolder,
    Parquet as Parquet,
    Source as Source,
    Table as Table,
    TextData as TextData,
    WebDataset as WebDataset,
)
from akd_dist.recipe.teacher import (
    AssistantSpec as AssistantSpec,
    StoredTeacher as StoredTeacher,
    TeacherMember as TeacherMember,
    TeacherSpec as TeacherSpec,
    TeacherTraining as TeacherTraining,
)
from akd_dist.recipe.training import (
    AdamW as AdamW,
    AnnealingKD as AnnealingKD,
    Constant as Constant,
    ContinuationKD as ContinuationKD,
    Cosine as Cosine,
    CustomObjective as CustomObjective,
    Distilled as Distilled,
    HardLabels as HardLabels,
    Kd as Kd,
    LastBatch as LastBatch,
    Learning as Learning,
    Linear as Linear,
    Objective as Objective,
    Optimizer as Optimizer,
    Precision as Precision,
    Schedule as Schedule,
    Sgd as Sgd,
    Stacked as Stacked,
    Steps as Steps,
    Takd as Takd,
    Training as Training,
)
from akd_dist.recipe.trials import (
    SearchRecipe as SearchRecipe,
    Trial as Trial,
    Tuning as Tuning,
    load_search as load_search,
)
