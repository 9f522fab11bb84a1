"""The options of the verbs, each written once: commands, functions of `akd_dist` and jobs take them from here.

A field is a keyword argument of the function, and an option of the command if it names a flag. What it says to whoever
reads `--help` stands in `help`; what it says to a programmer stands below it. Importing this package is instant.
"""

from akd_dist.options.base import (
    FillingOptions as FillingOptions,
    Options as Options,
    RecipeFileOptions as RecipeFileOptions,
    RecipeOptions as RecipeOptions,
    StoredOptions as StoredOptions,
    WritingOptions as WritingOptions,
    option as option,
)
from akd_dist.options.models import (
    DataOptions as DataOptions,
    EvaluateOptions as EvaluateOptions,
    ExportOptions as ExportOptions,
    GenerateOptions as GenerateOptions,
    ModelImportOptions as ModelImportOptions,
    ModelOptions as ModelOptions,
    PredictOptions as PredictOptions,
)
from akd_dist.options.rows import (
    BatchesOptions as BatchesOptions,
    DatasetOptions as DatasetOptions,
    RayDatasetOptions as RayDatasetOptions,
    SplitOptions as SplitOptions,
)
from akd_dist.options.runs import (
    CacheOptions as CacheOptions,
    CompareOptions as CompareOptions,
    FleetOptions as FleetOptions,
    ImportLogitsOptions as ImportLogitsOptions,
    PlanOptions as PlanOptions,
    RunOptions as RunOptions,
    TuneOptions as TuneOptions,
)
