"""akd-dist: one teacher, run once; fleets of students trained from its stored logits.

    recipe = "jobs/digits.yaml"
    akd_dist.cache_teacher(recipe)                       a sealed store of logits
    akd_dist.plan(recipe, budget="40GB")                 what encodings of the logits take, and how well they describe
    akd_dist.import_logits(recipe, "logits.npy")         or that of logits that others computed
    akd_dist.train_students(recipe)                      runs/digits/, and the content of its fleet.json
    akd_dist.compare(recipe)                             runs/digits-compare/, every objective over several seeds
    akd_dist.tune(recipe)                                runs/digits-tune/, the best of what its `search:` tries
    akd_dist.open_store(uri).rows(view, start, stop)     float32 [n, classes]
    akd_dist.distillation_dataset(recipe)                rows and logits for a trainer of your own
    akd_dist.load_model("runs/digits/students/...")      a torch.nn.Module
    akd_dist.report("runs/digits")                       report.html, written afresh; of several runs, one more
    akd_dist.evaluate(student, "runs/digits")            a student's metrics on data, and its agreement with others
    akd_dist.predict(student, "new.parquet", out)        what it says of every row, as Parquet
    akd_dist.generate(student, "def main")               text that a language model continues
    akd_dist.export(student, "onnx", out)                the student for those without akd-dist, checked
    akd_dist.import_model(recipe, "teacher.pth", out)    a checkpoint from elsewhere as a model folder

Importing this package is instant: each verb imports what it needs when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from akd_dist.api import (
    cache_teacher,
    compare,
    distillation_batches,
    distillation_dataset,
    evaluate,
    export,
    generate,
    import_logits,
    import_model,
    load_model,
    open_store,
    plan,
    predict,
    ray_dataset,
    report,
    source_rows,
    train_students,
    tune,
)

if TYPE_CHECKING:
    __version__: str

__all__ = [
    "cache_teacher",
    "compare",
    "distillation_batches",
    "distillation_dataset",
    "evaluate",
    "export",
    "generate",
    "import_logits",
    "import_model",
    "load_model",
    "open_store",
    "plan",
    "predict",
    "ray_dataset",
    "report",
    "source_rows",
    "train_students",
    "tune",
]


if not TYPE_CHECKING:  # to type checkers, names that do not exist stay mistakes

    def __getattr__(name: str) -> str:
        """`__version__` of the package that is installed; looked up when asked for, so that the import is instant."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version("akd-dist")
