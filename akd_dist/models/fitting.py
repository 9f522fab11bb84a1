"""Named tensors of others -> the weights of a module: wrapping and prefixes taken off, and what does not fit named.

What libraries put around a state dict is taken off only where the names then fit: `module.` of DataParallel, `model.`
of Lightning, `_orig_mod.` of torch.compile, and whatever else all of a model's names begin with.
"""

import difflib
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from akd_dist.base.errors import RefusedError
from akd_dist.base.formatting import counted
from akd_dist.models.build import weights_of
from akd_dist.models.card import ModelCard
from akd_dist.models.checkpoint_files import Tensors

_COUNTER = "num_batches_tracked"
"""What batch norm counts and never uses: older files lack it."""
_SHOWN = 4
_NARROW = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float64, torch.float32, *_NARROW)


@dataclass(frozen=True)
class Fit:
    """The part of a checkpoint that fits a module best, and how its names were brought onto the module's."""

    part: str
    """Where it stands in the checkpoint."""
    prefix: str
    """What its names begin with and the module's do not."""
    ours: str
    """What the module's names begin with and its do not."""
    state: Tensors
    """Its tensors under the module's names."""
    beside: tuple[str, ...]
    """Names of that part that do not begin with the prefix: of a loss, of another model."""
    fitting: int
    """How many have a name and the shape of the module's."""

    @property
    def place(self) -> str:
        """The part and the prefix, for people."""
        return ".".join(one for one in (self.part, self.prefix.rstrip(".")) if one)


def best_fit(parts: Mapping[str, Tensors], wanted: Tensors) -> tuple[Fit, list[str]]:
    """The part, and the prefixes, by which most names and shapes fit; on ties the part of averaged weights comes last.

    Args:
        parts: of a checkpoint, by where they stand.
        wanted: the module's state dict.

    Returns:
        The best, and where else in the checkpoint other weights fit as well: averaged ones, those of another model.
    """
    fits = [
        (number, _fit(where, tensors, prefix, ours, wanted))
        for number, (where, tensors) in enumerate(parts.items())
        for prefix in _prefixes(tensors, len(wanted))
        for ours in _prefixes(wanted, len(wanted))
    ]

    def rank(numbered: tuple[int, Fit]) -> tuple[int, ...]:
        number, fit = numbered
        places = -int("ema" in re.split(r"[._]", fit.place)), -number, -len(fit.prefix), -len(fit.ours)
        return fit.fitting, -len(fit.state), *places

    best = max(fits, key=rank)[1]
    alike = {fit.place: fit for _, fit in fits if fit.fitting == best.fitting and fit.ours == best.ours}
    return best, [
        place for place, fit in alike.items() if fit.state.keys() == best.state.keys() and place != best.place
    ]


def load_fit(module: nn.Module, fit: Fit, card: ModelCard, source: str) -> list[str]:
    """Give a module the weights of a fit, or refuse all that does not fit in one message.

    Args:
        module: freshly built; buffers of its body stay as they are where a file may lack them.
        source: the file, for messages.

    Returns:
        What was done to the weights, a line each.

    Raises:
        RefusedError: names are missing or unknown, shapes or kinds of numbers are others, or weights are not finite.
    """
    weights = weights_of(module)
    wanted = weights.state_dict()
    check_names(fit, wanted, _lacked(wanted, fit.state), card, source)
    double = all(tensor.dtype == torch.float64 for tensor in fit.state.values() if tensor.is_floating_point())
    becoming = _NARROW if double else (*_NARROW, torch.float64)
    notes = check_values(fit.state, dict(weights.named_parameters()), source, becoming=becoming)
    for name, tensor in fit.state.items():
        if _kind(tensor.dtype) != _kind(wanted[name].dtype):
            raise _other_numbers(source, name, tensor.dtype, wanted[name].dtype)
    _check_tied(wanted, fit.state, source)
    if double:
        module.double()  # else loading would round them
    weights.load_state_dict(fit.state, strict=False)
    return notes


def described(fit: Fit, elsewhere: Sequence[str] = ()) -> list[str]:
    """What was taken off, and what was left out, a line each."""
    lines = []
    if fit.part:
        lines.append(f"taken from `{fit.part}` in the file")
    if fit.prefix:
        lines.append(f"`{fit.prefix}` was taken off the names of its weights")
    if fit.ours:
        lines.append(f"`{fit.ours}` was put before the names of its weights")
    if fit.beside:
        lines.append(f"left out, since the model has no such part: {_some(fit.beside)}")
    if elsewhere:
        lines.append(
            f"the file has weights of the same names under {_some([f'`{one}`' for one in elsewhere])}, too; to take "
            "those, save them as a file of their own"
        )
    return lines


def check_names(fit: Fit, wanted: Tensors, lacked: Iterable[str], card: ModelCard, source: str) -> None:
    """Refuse missing and unknown names and other shapes, in one message with the nearest names.

    Args:
        lacked: names that the file may lack.

    Raises:
        RefusedError: there are any.
    """
    state, free = fit.state, set(lacked)
    missing = [name for name in wanted if name not in state and name not in free]
    unknown = [name for name in state if name not in wanted]
    other = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if not missing and not unknown and not other:
        return
    total = len(wanted) - len(free)
    fitting = total - len(missing) - len(other)
    said = [f"{fitting:,} of the model's {counted(total, 'weight')} are in the file, {fitting / max(total, 1):.0%}"]
    if other:
        said.append("of another shape: " + _some([_shapes(name, state, wanted) for name in other], "; "))
    if missing:
        said.append("missing: " + _some(list(_with_nearest(missing, unknown, wanted, state, "in the file")), "; "))
    if unknown:
        near = "in the model"
        said.append("not in the model: " + _some(list(_with_nearest(unknown, missing, state, wanted, near)), "; "))
    raise RefusedError(
        f"the weights in {source} do not fit the model {card.model.label}",
        got=". ".join(said),
        expected="a weight of the same name and shape for each of the model's, and no others",
        next=_advice(fitting / max(total, 1), missing, unknown, other, fit, wanted, card),
    )


def check_values(
    state: Tensors, parameters: Container[str], source: str, *, becoming: tuple[torch.dtype, ...] = _NARROW
) -> list[str]:
    """Refuse what is no plain tensor of finite numbers; say what will become float32.

    Args:
        parameters: the names of what is trained: buffers may hold infinities.
        becoming: the dtypes of which that is said.

    Raises:
        RefusedError: names the weight.
    """
    narrow: Counter[str] = Counter()
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise _bad_weight(source, name, "a sparse or quantised tensor, or one without numbers", "plain numbers")
        if not tensor.is_floating_point():
            continue
        if tensor.dtype not in _FLOATS:
            raise _other_numbers(source, name, tensor.dtype, torch.float32)
        if tensor.dtype in becoming:
            narrow[_words(tensor.dtype)] += 1
        # A buffer may well hold an infinity, as masks of attention do.
        wrong = torch.isnan(tensor) if name not in parameters else ~torch.isfinite(tensor)
        if bool(wrong.any()):
            got = f"{int(wrong.sum()):,} of {tensor.numel():,} numbers are NaN or infinite"
            raise _bad_weight(source, name, got, "finite numbers", "take an earlier checkpoint of that training")
    return [f"{counted(count, 'weight')} of {dtype} became float32" for dtype, count in narrow.items()]


def _fit(where: str, tensors: Tensors, prefix: str, ours: str, wanted: Tensors) -> Fit:
    state = {ours + name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    beside = tuple(name for name in tensors if not name.startswith(prefix))
    fitting = sum(name in wanted and one.shape == wanted[name].shape for name, one in state.items())
    return Fit(where, prefix, ours, state, beside, fitting)


def _prefixes(tensors: Tensors, wanted: int) -> list[str]:
    """What names begin with, up to a dot: each beginning that as many have as would make up half of the module."""
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        found.update(".".join(parts[:end]) + "." for end in range(1, len(parts)))
    return ["", *(prefix for prefix, count in found.items() if 2 * count >= wanted)]


def _lacked(wanted: Tensors, state: Tensors) -> set[str]:
    """Names that a file may lack: counters, and weights that are one with another that it has."""
    there = {_memory(wanted[name]) for name in state if name in wanted}
    return {
        name
        for name, tensor in wanted.items()
        if name not in state and (name.rpartition(".")[2] == _COUNTER or _memory(tensor) in there)
    }


def _memory(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    # Tensors without numbers all lie at 0, and are told apart by themselves.
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _check_tied(wanted: Tensors, state: Tensors, source: str) -> None:
    """Refuse two weights of the file that are one in the module, and differ."""
    first: dict[object, str] = {}
    for name in state:
        other = first.setdefault(_memory(wanted[name]), name)
        if other != name and not torch.equal(state[name], state[other]):
            raise _bad_weight(source, name, f"other numbers than in {other}", "the same: in the model the two are one")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def _shapes(name: str, state: Tensors, wanted: Tensors) -> str:
    return f"{name} {list(state[name].shape)} in the file, {list(wanted[name].shape)} in the model"


def _with_nearest(
    names: Sequence[str], among: Sequence[str], theirs: Tensors, others: Tensors, where: str
) -> Iterator[str]:
    """Names, the first few with the nearest ones of the other side, of the same shape if there are such."""
    for number, name in enumerate(names):
        shape = theirs[name].shape
        alike = [one for one in among if others[one].shape == shape]
        # Where no shape is the same, names that are not nearly the same would lead astray.
        near = difflib.get_close_matches(name, alike or among, 1, 0.5 if alike else 0.8) if number < _SHOWN else []
        yield f"{name} {list(shape)}" + (f" (nearest {where}: {near[0]})" if near else "")


def _advice(
    share: float,
    missing: Sequence[str],
    unknown: Sequence[str],
    other: Sequence[str],
    fit: Fit,
    wanted: Tensors,
    card: ModelCard,
) -> str:
    heads = {fit.state[name].shape[0] for name in other if fit.state[name].dim() and wanted[name].dim()}
    last = [name for name in other if fit.state[name].shape[1:] == wanted[name].shape[1:]]
    if not missing and not unknown and last == list(other) and len(heads) == 1:
        return (
            f"it is a model of {heads.pop():,} classes, and the data have {card.classes:,}: choose a checkpoint that "
            "was trained for these, or data of its classes"
        )
    if share < 0.5:
        first = ", ".join(list(fit.state)[:3])
        return f"correct teacher.model: the file seems to be of another architecture; its names begin {first}"
    return "correct teacher.model, so that it is the architecture that the file was saved from"


def _other_numbers(source: str, name: str, got: torch.dtype, wanted: torch.dtype) -> RefusedError:
    return _bad_weight(source, name, _words(got), f"numbers of the kind of {_words(wanted)}")


def _bad_weight(source: str, name: str, got: str, expected: str, next: str | None = None) -> RefusedError:
    return RefusedError(
        f"the weight {name} in {source} cannot be taken",
        got=got,
        expected=expected,
        next=next or "save the plain state dict of the trained model",
    )


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more
