"""A model as others run it, without akd-dist: ONNX, a program of torch.export, or a Hugging Face folder.

What is exported is the whole module on raw inputs, preprocessing included. An export is run on rows, in batches of
several sizes, and kept only if its logits are those of torch. torch.export loads its files by pickle, so one is loaded
here only fresh from our own hands, and in a process of its own.
"""

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from akd_dist import recipe
from akd_dist.base.errors import RecipeError, RefusedError
from akd_dist.base.tracebacks import whole
from akd_dist.base.trusted import Trusted
from akd_dist.data.row_cache import Progress
from akd_dist.data.text import save_tokenizer
from akd_dist.documents.use import ExportDocument
from akd_dist.models.card import ModelCard
from akd_dist.models.huggingface_config import CONFIG
from akd_dist.serve import language_exports as language
from akd_dist.serve.examples import DataRequest, known_text, open_examples
from akd_dist.serve.export_files import made_beside, publish, quiet, refuse_existing
from akd_dist.serve.runners import RUNNERS, DoesNotRunError
from akd_dist.serve.served import Served, open_model

EXPORT_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "huggingface": "-huggingface"}
"""How an export is named after its model, where nobody names it."""
TARGETS: tuple[recipe.Target, ...] = get_args(recipe.Target)
CHECK_ROWS = 256
"""The most rows that an export is compared on."""
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
"""The largest difference to torch's logits that is forgiven, as a share of the largest of them, or of 1."""
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch-export": (),
    "huggingface": ("transformers",),
}
_ONNX_BYTES = (1 << 31) - (1 << 20)  # a protocol buffer ends there
_OPSET = 20
_OF_HUGGINGFACE = ("huggingface", "huggingface_lm", "causal_lm")
"""Kinds of models that transformers has the code of; the built-in language model is a Llama."""


@dataclass(frozen=True)
class _Rows:
    """Raw inputs that an export is compared on."""

    inputs: np.ndarray
    data: str | None
    """Where they come from; None for random ones."""
    split: recipe.Split | None = None


def export(
    student: str,
    to: recipe.Target,
    out: Path,
    cache_root: Path,
    *,
    asked: DataRequest | None = None,
    tokenizer: str | None = None,
    trust: tuple[str, ...] = (),
    force: bool = False,
    on_progress: Progress | None = None,
) -> ExportDocument:
    """Write a model in another format, run that on rows, and keep it only if the logits agree.

    Args:
        student: a model folder, absolute or `s3://`.
        to: one of TARGETS.
        out: the file, or the folder of `huggingface`: whole, or absent.
        cache_root: where a recipe's rows are prepared.
        asked: the rows to compare on; None takes the test rows of the run that the student lies in, and random inputs
            of the right shape where it lies in none.
        tokenizer: of a model of text: a folder, or a name on the hub.
        trust: modules that the model's folder and its run may name, where there is no `asked` to say so.
        force: whether `out` may take the place of something else.
        on_progress: told while a recipe's rows are prepared.

    Raises:
        RecipeError: no such format, a package is missing, or `out` is there already.
        RefusedError: the model cannot be exported so, or the export does not give the same logits; nothing is left.
        DamagedError, MachineError: as `served.open_model` and `examples.open_examples`.
    """
    started = time.monotonic()
    if to not in TARGETS:
        raise RecipeError("there is no such format", got=to, expected=f"one of {', '.join(TARGETS)}")
    refuse_existing(out, force, instead_of=CONFIG if to == "huggingface" else None)
    _require(to)
    trusted = Trusted(modules=trust) if asked is None else asked.trusted()
    model = open_model(student, trusted=trusted)
    # What a run computes in half precision is exported in float32, as its weights are.
    trained_in = model.precision
    model = replace(model, precision="float64" if model.precision == "float64" else "float32")
    _refuse_kind(model, to)
    rows = _rows_of(model, asked, trust, cache_root, on_progress)
    if model.card.blocks is not None:
        model = language.on_ids(model)
    expected = _logits(model, rows.inputs)
    with made_beside(out, to) as made:
        with quiet():
            _WRITERS[to](model, made, tokenizer)
        got = _run(model, to, made, rows.inputs)
        difference, tolerance = _compared(model, to, got, expected)
        refuse_existing(out, force, instead_of=CONFIG if to == "huggingface" else None)  # it may have come meanwhile
        publish(made, out)
    return ExportDocument(
        student=student,
        model=model.card.model.label,
        fingerprint=model.card.fingerprint,
        to=to,
        out=str(out),
        bytes=sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file()),
        inputs=_inputs_in_words(model.card),
        outputs=_outputs_in_words(model),
        data=rows.data,
        split=rows.split,
        rows=len(expected),
        difference=difference,
        tolerance=tolerance,
        same_class=None if model.card.task == "regression" else int((got.argmax(1) == expected.argmax(1)).sum()),
        notes=_notes(model, trained_in, to, rows, tokenizer),
        seconds=round(time.monotonic() - started, 3),
    )


# ---- before


def _require(to: str) -> None:
    for package in _PACKAGES[to]:
        try:
            with quiet():
                importlib.import_module(package)
        except ImportError as error:
            raise RecipeError(
                f"--to {to} needs the package {package}",
                got=error,
                expected=f"akd-dist with its extra `{to}`",
                next=f"pip install 'akd-dist[{to}]'",
            ) from error


def _refuse_kind(model: Served, to: str) -> None:
    kind = model.card.model.kind
    if to == "huggingface" and kind not in _OF_HUGGINGFACE:
        raise RefusedError(
            f"the model {model.home.uri} is none of Hugging Face's",
            got=f"kind {kind}",
            expected=f"kind {' or '.join(_OF_HUGGINGFACE)}, which transformers has the code of",
            next="export it --to onnx or --to torch-export",
        )


def _rows_of(
    model: Served, asked: DataRequest | None, trust: tuple[str, ...], cache_root: Path, on_progress: Progress | None
) -> _Rows:
    """Real rows where there are any; of a language model ids."""
    if model.card.blocks is not None:
        if asked is None:
            return _Rows(language.random_ids(model.card.blocks), None)
        ids, texts = language.real_ids(model, asked, cache_root, on_progress)
        return _Rows(ids, texts.name, texts.split)
    if asked is None and model.home.run is not None:
        asked = DataRequest(str(Path(model.home.uri).parent.parent), trust=trust)
    if asked is None:
        return _Rows(_random_inputs(model.card), None)
    with open_examples(asked, model.card, model.home, cache_root, on_progress=on_progress) as examples:
        inputs, _ = next(examples.batches())
        return _Rows(np.array(inputs[:CHECK_ROWS]), examples.name, examples.split)


def _random_inputs(card: ModelCard) -> np.ndarray:
    """Inputs of the right shape and dtype; of tokens, ordinary ones, and padding at the end of half of the rows."""
    draw, shape = np.random.default_rng(0), (64, *card.input_shape)
    if card.tokens is None:
        if card.input_dtype == "uint8":
            return draw.integers(0, 256, shape, dtype=np.uint8)
        return draw.standard_normal(shape, dtype=np.float32)
    ordinary = np.setdiff1d(np.arange(card.tokens.vocabulary), [card.tokens.padding, *card.tokens.special])
    inputs = np.zeros(shape, dtype=np.int32)
    ids = inputs if inputs.ndim == 2 else inputs[:, 0]
    ids[:] = draw.choice(ordinary if len(ordinary) else [0], ids.shape)
    ids[::2, ids.shape[1] // 2 :] = card.tokens.padding
    return inputs


def _parts(inputs: np.ndarray) -> list[np.ndarray]:
    """The rows in batches of one, two, and all that is left: an export must take any number. Ids of any length, too."""
    parts = [part for part in np.split(inputs, [1, 3]) if len(part)]
    return [parts[0][:, : inputs.shape[1] // 2 + 1], *parts[1:]] if inputs.dtype == np.int64 else parts


def _logits(model: Served, inputs: np.ndarray) -> np.ndarray:
    return _joined([model.logits(part).numpy() for part in _parts(inputs)])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Logits [n, classes] of all parts; of a language model those of all positions, one behind another."""
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def _compared(model: Served, to: str, got: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest difference, and what was forgiven."""
    tolerance = TOLERANCE[_precision(model)] * max(1.0, float(np.abs(expected).max()))
    if got.shape != expected.shape:
        raise _disagrees(model, to, f"logits of shape {list(got.shape)}", f"shape {list(expected.shape)}")
    difference = float(np.abs(got.astype(np.float64) - expected).max())
    if not difference <= tolerance:  # NaN, too
        found = f"logits that differ by {difference:.2g} at most, over {len(expected)} rows"
        raise _disagrees(model, to, found, f"at most {tolerance:.2g}")
    return difference, tolerance


def _notes(model: Served, trained_in: str, to: str, rows: _Rows, tokenizer: str | None) -> list[str]:
    notes = language.notes(model, to, tokenizer, real=rows.data is not None) if model.card.blocks is not None else []
    if rows.data is None and model.card.blocks is None:
        notes.append("compared on random inputs: the model lies in no run, and --data names no rows")
    if trained_in != model.precision:
        notes.append(f"computes in float32; its run computed in {trained_in}, whose logits differ in the third digit")
    if model.card.blocks is not None:
        return notes
    if to == "huggingface" and not isinstance(known_text(tokenizer, model.card, model.home), recipe.HuggingFaceText):
        notes.append("without a tokenizer: none is known here; --tokenizer FOLDER adds one")
    return notes


def _disagrees(model: Served, to: str, got: str, expected: str) -> RefusedError:
    return RefusedError(
        f"the export of {model.home.uri} to {to} does not give the same logits, and is not kept",
        got=got,
        expected=f"{expected}, as torch has them",
        next=_instead(model, to),
    )


def _precision(model: Served) -> str:
    return "float64" if model.precision == "float64" else "float32"


def _instead(model: Served, to: str) -> str:
    others = [
        one for one in TARGETS if one != to and (one != "huggingface" or model.card.model.kind in _OF_HUGGINGFACE)
    ]
    return f"try --to {' or --to '.join(others)}"


# ---- what it says of itself


def _inputs_in_words(card: ModelCard) -> str:
    if card.blocks is not None:
        return language.inputs_in_words(card.blocks)
    shape = ", ".join(["rows", *map(str, card.input_shape)])
    if card.tokens is not None:
        types = "; the second channel are token types" if len(card.input_shape) == 2 else ""
        return f"int32 [{shape}], ids of tokens, filled up with {card.tokens.padding}{types}"
    inside = [
        *["division by 255"] * (card.input_dtype == "uint8"),
        *["normalisation"] * (card.normalize is not None),
    ]
    raw = f"{card.input_dtype} [{shape}], raw" + (f"; {' and '.join(inside)} inside" if inside else "")
    # What an export does not do: its caller brings pictures to this size, in this way.
    return raw if card.image.size is None else f"{raw}; pictures as `image` of model.json says: {card.image.said()}"


def _outputs_in_words(model: Served) -> str:
    card = model.card
    if card.blocks is not None:
        return language.outputs_in_words(model.module, _precision(model))
    meaning = "the number" if card.task == "regression" else "logits of the classes, a softmax makes probabilities"
    return f"{_precision(model)} [rows, {card.classes}], {meaning}"


def _told(model: Served) -> dict[str, str]:
    """Metadata that go with an export, as text."""
    card = model.card
    told = {
        "inputs": _inputs_in_words(card),
        "outputs": _outputs_in_words(model),
        "task": card.task,
        "fingerprint": card.fingerprint,
        "model.json": json.dumps(card.model_dump(mode="json")),
    }
    return told if card.class_names is None else told | {"class_names": json.dumps(card.class_names)}


# ---- programs


def _program(model: Served, to: str) -> Any:
    """The module as a torch.export program, of any number of rows, without the places of this machine."""
    free = {0: torch.export.Dim("rows", min=1)}
    if model.card.blocks is None:
        example = torch.from_numpy(_random_inputs(model.card)[:2])
    else:
        example, free = language.example(model.module, model.card.blocks)
    try:
        # Not strict: the model's own Python is run once; the strict way goes through torch's compiler, which takes
        # fewer models.
        program = torch.export.export(model.module, (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # whatever the code of a model leads to
        raise _not_exportable(model, to, error) from error
    for graph in program.graph_module.modules():
        for node in getattr(graph, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)
    return program


def _not_exportable(model: Served, to: str, error: Exception) -> RefusedError:
    """What torch says, in its words; an exception of the user's own code as a whole."""
    own = isinstance(model.card.model, recipe.Custom) and not type(error).__module__.startswith("torch")
    return RefusedError(
        f"the model {model.card.model.label} cannot be exported to {to}",
        got=whole(error) if own else f"{type(error).__name__}: {str(error).strip()[:1000]}",
        expected="a model without Python that depends on the values of its inputs, or on the number of rows",
        next="use it as it is, with akd_dist.load_model",
    )


def _write_torch(model: Served, path: Path, _tokenizer: str | None) -> None:
    program = _program(model, "torch-export")
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(_told(model), indent=1)})


def _write_onnx(model: Served, path: Path, _tokenizer: str | None) -> None:
    import onnx

    size = sum(tensor.nbytes for tensor in [*model.module.parameters(), *model.module.buffers()])
    if size > _ONNX_BYTES:
        raise RefusedError(
            f"the model {model.home.uri} is too large for one ONNX file",
            got=f"{size:,} bytes of weights",
            expected=f"at most {_ONNX_BYTES:,}",
            next=_instead(model, "onnx"),
        )
    program = _program(model, "onnx")
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=["inputs" if model.card.blocks is None else language.INPUT],
            output_names=["logits"],
        )
        assert made is not None
        document = made.model_proto
    except Exception as error:
        raise _not_exportable(model, "onnx", error) from error
    _name_rows(document.graph)
    document.producer_name = "akd-dist"
    for name, text in _told(model).items():
        document.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(document)
    onnx.save_model(document, str(path))


def _name_rows(graph: Any) -> None:
    """Call the free dimensions `rows` and `length`, and forget which line of which file a node comes from."""
    first = graph.input[0].type.tensor_type.shape.dim
    names = {dim.dim_param: name for dim, name in zip(first, ("rows", "length"), strict=False) if dim.dim_param}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            for invented, name in names.items() if dim.dim_param else ():  # a fixed size would be lost
                dim.dim_param = name if dim.dim_param == invented else dim.dim_param.replace(invented, name)
    for part in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""


def _write_huggingface(model: Served, folder: Path, tokenizer: str | None) -> None:
    card = model.card
    if card.blocks is not None:
        language.write_huggingface(model, folder, tokenizer)
        return
    library: Any = model.module.body.model  # type: ignore[union-attr]
    if card.class_names is not None:
        library.config.id2label = dict(enumerate(card.class_names))
        library.config.label2id = {name: number for number, name in enumerate(card.class_names)}
    library.save_pretrained(folder)
    spec = known_text(tokenizer, card, model.home)
    if isinstance(spec, recipe.HuggingFaceText):
        assert card.tokens is not None
        save_tokenizer(spec, card.tokens, folder)


def _run(model: Served, to: str, path: Path, inputs: np.ndarray) -> np.ndarray:
    """Logits [n, classes] that an export gives."""
    try:
        runner = f"{to}-lm" if to == "huggingface" and model.card.blocks is not None else to
        return _joined(RUNNERS[runner](path, _parts(inputs)))
    except DoesNotRunError as error:
        raise RefusedError(
            f"the export of {model.home.uri} to {to} does not run, and is not kept",
            got=error,
            expected=f"logits of {len(inputs)} rows in {_precision(model)}",
            next=_instead(model, to),
        ) from error


_WRITERS: dict[str, Callable[[Served, Path, str | None], None]] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch,
    "huggingface": _write_huggingface,
}
