"""The options of the verbs that use a model, or make one of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from akd_dist.options.base import Options, RecipeFileOptions, WritingOptions, option

if TYPE_CHECKING:
    from akd_dist.recipe import Device, Split, Target


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """What every verb takes that uses a finished model."""

    student: str | Path = field(kw_only=False, metadata={"argument": "STUDENT", "folder": True})
    """A folder or URI with model.safetensors and model.json, as `<run>/students/<student>`."""
    split: Split | None = option(
        None,
        "--split",
        metavar="SPLIT",
        choices=("train", "validation", "test"),
        help="Of a recipe: train, validation or test (the default).",
    )
    """Of a recipe; None takes `test`."""
    input: str | Sequence[str] | None = option(
        None, "--input", metavar="COLUMN", multiple=True, help="Column of inputs; twice for a pair of texts."
    )
    """The column of inputs, or two of a pair of texts; None takes those of the student's run, or `input`."""
    tokenizer: str | Path | None = option(
        None, "--tokenizer", metavar="FOLDER", help="Of a model of text, where nobody knows it."
    )
    """A tokenizer's folder, or its name on the hub, where it lies neither beside the model nor in its run."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(ModelOptions):
    """What every verb takes that runs a model on data that the user names."""

    data: str | Path = field(kw_only=False, metadata={"argument": "DATA"})
    """A recipe file or a run's folder; Parquet: a file, a folder, a glob or `s3://`; a folder of pictures, or tar
    files of them; or `digits`."""
    label: str | None = option(None, "--label", metavar="COLUMN", help="Column of labels.")
    """The column of labels; None takes that of the student's run, or `label`, where there is one. An empty name reads
    none."""
    device: Device = option("cpu", "--device", choices=("cpu", "cuda"), show_default=True, help="Where to compute.")
    """`cpu` or `cuda`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """What `evaluate` takes."""

    others: Sequence[str | Path] = option(
        (),
        "--with",
        metavar="MODEL",
        multiple=True,
        folder=True,
        help="Another model to compare with; repeatable.",
    )
    """Further model folders, for the same inputs and classes."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(WritingOptions, DataOptions):
    """What `predict` takes."""

    out: str | Path | None = field(
        default=None,
        kw_only=False,
        metadata={
            "flag": "--out",
            "metavar": "FILE",
            "help": "The file to write.  [default: the student's name and .parquet, here]",
        },
    )
    """The file; None takes `<student>.parquet` in the working folder. See `evaluation.predict` for its columns."""
    logits: bool = option(True, "--no-logits", help="Leave out the column of logits, the largest of many classes.")
    """Whether to write the column of logits."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """What `generate` takes."""

    student: str | Path = field(kw_only=False, metadata={"argument": "MODEL", "folder": True})
    """A folder or URI of a language model: with model.safetensors and model.json, or as transformers saves one."""
    prompt: str = field(
        kw_only=False,
        metadata={"flag": "--prompt", "metavar": "TEXT", "required": True, "help": "The text to continue."},
    )
    """The text to continue."""
    chat: bool = option(
        False, "--chat", is_flag=True, help="Ask a chat model: the tokenizer's template writes the prompt."
    )
    """Whether the prompt is what a user says in a chat, written by the tokenizer's template; the answer follows."""
    tokens: int = option(100, "--tokens", metavar="N", show_default=True, help="The most tokens to make.")
    """The most tokens to make."""
    temperature: float = option(
        0.0,
        "--temperature",
        metavar="T",
        show_default=True,
        help="What logits are divided by before a token is drawn; 0 takes the most likely.",
    )
    """What logits are divided by before a token is drawn; 0 takes the most likely."""
    top_p: float = option(
        1.0, "--top-p", metavar="P", show_default=True, help="Draw from the likeliest tokens of this probability."
    )
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int = option(0, "--seed", metavar="N", show_default=True, help="Of the draws.")
    """Of the draws."""
    tokenizer: str | Path | None = option(
        None, "--tokenizer", metavar="FOLDER", help="Where it lies neither beside the model nor in its run."
    )
    """A tokenizer's folder, or its name on the hub, where it lies neither beside the model nor in its run."""
    device: Device = option("cpu", "--device", choices=("cpu", "cuda"), show_default=True, help="Where to compute.")
    """`cpu` or `cuda`."""
    on_text: Callable[[str], None] | None = None
    """Told each piece of text as soon as it is there."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(WritingOptions, ModelOptions):
    """What `export` takes."""

    to: Target = field(
        kw_only=False,
        metadata={
            "flag": "--to",
            "choices": ("onnx", "torch-export", "huggingface"),
            "required": True,
            "help": "The format to write.",
        },
    )
    """`onnx`, `torch-export` or `huggingface`."""
    out: str | Path | None = field(
        default=None,
        kw_only=False,
        metadata={
            "flag": "--out",
            "metavar": "PATH",
            "help": "The file to write; a folder for huggingface.  [default: the student's name and .onnx, .pt2 or "
            "-huggingface, here]",
        },
    )
    """The file; a folder for `huggingface`. None takes `<student>.onnx`, `<student>.pt2` or `<student>-huggingface` in
    the working folder."""
    data: str | Path | None = option(
        None, "--data", metavar="DATA", help="Rows to compare logits on.  [default: those of the student's run]"
    )
    """Rows to compare logits on; None takes those of the student's run, and random inputs outside of one."""


@dataclass(frozen=True, kw_only=True)
class ModelImportOptions(WritingOptions, RecipeFileOptions):
    """What `import_model` takes."""

    checkpoint: str | Path | None = field(
        default=None, kw_only=False, metadata={"argument": "[CHECKPOINT]", "required": False}
    )
    """A file of safetensors or a torch state dict, a folder with one, or the `s3://` URI of a file; None takes
    `teacher.weights`. Its architecture is the recipe's `teacher.model`."""
    out: str | Path | None = field(
        default=None,
        kw_only=False,
        metadata={
            "flag": "--out",
            "metavar": "FOLDER",
            "help": "The model folder to write.  [default: the checkpoint's name without its ending, here]",
        },
    )
    """The model folder; None takes the checkpoint's name without its ending, in the working folder."""
