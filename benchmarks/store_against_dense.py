"""Students from stores against students from dense logits: the same first weights, the same batches, the same steps.

    python -m benchmarks.store_against_dense --model smollm2 --work work [--seeds 5]

The teacher is SmolLM2 with its vocabulary cut to 4,096 ids (`benchmarks.cut_teacher`; --model is the folder that
`benchmarks.smollm2` writes), cached by `cache_teacher` as float32 and as `top_k` of two sizes. Every arm takes the
steps of `distill.student` on the batches of `distill.stream`; arms that the product does not offer replace what a
batch says of its targets. Learning rates are chosen for each loss on the validation rows, from dense logits and with a
seed of their own; test rows are read with the teacher's dense logits. What is done lies in --work, and is not done
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import akd_dist
from akd_dist.data.row_cache import prepare
from akd_dist.data.rows import Splits
from akd_dist.distill.cohort import known_of_language, open_stream
from akd_dist.distill.job import CohortJob
from akd_dist.distill.language_metrics import Known
from akd_dist.distill.stream import BatchStream
from akd_dist.distill.student import Student
from akd_dist.documents.report import Estimate
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.models.card import ModelCard
from akd_dist.models.device import set_deterministic
from akd_dist.recipe import Recipe, StudentSpec
from akd_dist.reporting.seeds import estimate, paired
from akd_dist.storage.reader import LogitStore, open_store
from benchmarks import cut_teacher
from benchmarks.told_otherwise import TEMPERATURE, Tell, gaussian, made_of, renormalised, rounded, sampled, tail_mean

RATES, TUNING_SEED = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1000
PROBE_ROWS = 32
ENCODINGS: dict[str, Any] = {
    "dense": "float32",
    "k = r = 16": {"kind": "top_k", "k": 16, "rank": 16, "probe_rows": PROBE_ROWS},
    "k = r = 8": {"kind": "top_k", "k": 8, "rank": 8, "probe_rows": PROBE_ROWS},
}
STAGE1 = {"kind": "annealing_kd", "tau_max": 4, "stage1_epochs": 4}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "labels": {"kind": "hard_labels", "epochs": 6},
    "KD T = 2": {"kind": "kd", "epochs": 6, "temperature": TEMPERATURE, "alpha": 1.0},
    "Annealing-KD squared": STAGE1 | {"stage1_loss": "squared"},
    "Annealing-KD cross-entropy": STAGE1 | {"stage1_loss": "cross_entropy"},
    "Annealing-KD cross-entropy, lr 0.003": STAGE1 | {"stage1_loss": "cross_entropy"},
}
FIXED = {"Annealing-KD cross-entropy, lr 0.003": 3e-3}
"""Learning rates of both stages that are given, and not chosen: at larger ones even rounding targets to float16 leads
to quite other students."""
STAGE2 = ", stage II"
"""Added to an objective's name, it names the learning rate of its stage II."""


# ---- the arms


@dataclass(frozen=True)
class Arm:
    """One way to train a student."""

    objective: str
    encoding: str
    """Of the store that is read."""
    shown: str = ""
    """Its name in the table; empty takes that of the encoding."""
    tell: Callable[[LogitStore], Tell] | None = None
    """What students are taught in place of the store's targets; None teaches those."""

    @property
    def name(self) -> str:
        """Names its row of the table, and its file."""
        return self.objective if self.objective == "labels" else f"{self.objective}, {self.shown or self.encoding}"

    @property
    def baseline(self) -> str:
        """The row that it is compared with: the same objective, from dense logits."""
        return Arm(self.objective, "dense").name

    def path(self, work: Path, seed: int) -> Path:
        """The file of its test metrics."""
        return work / f"{self.name.removesuffix(' *')}, seed {seed}.json"


SMALL, LARGE = "k = r = 8", "k = r = 16"
KD, SQUARED, ENTROPY, CALM = list(OBJECTIVES)[1:]
ARMS = (
    Arm("labels", "dense"),
    Arm(KD, "dense"),
    Arm(KD, "dense", "dense, rounded to float16", made_of(rounded)),
    Arm(KD, LARGE),
    Arm(KD, SMALL),
    Arm(KD, SMALL, "k = r = 8, Gaussian *", gaussian),
    Arm(KD, "dense", "RS-KD n = 50 *", sampled),
    Arm(KD, "dense", "top-12 renormalised *", made_of(renormalised)),
    Arm(SQUARED, "dense"),
    Arm(SQUARED, LARGE),
    Arm(SQUARED, SMALL),
    Arm(SQUARED, "dense", "top-8 and the tail's mean *", made_of(tail_mean)),
    Arm(ENTROPY, "dense"),
    Arm(ENTROPY, "dense", "dense, rounded to float16", made_of(rounded)),
    Arm(ENTROPY, LARGE),
    Arm(ENTROPY, SMALL),
    Arm(ENTROPY, SMALL, "k = r = 8, Gaussian *", gaussian),
    Arm(CALM, "dense"),
    Arm(CALM, "dense", "dense, rounded to float16", made_of(rounded)),
    Arm(CALM, LARGE),
    Arm(CALM, SMALL),
    Arm(CALM, SMALL, "k = r = 8, Gaussian *", gaussian),
)


# ---- stores and students


@dataclass(frozen=True)
class Stored:
    """A teacher cached in one encoding."""

    work: Path
    encoding: str
    stores: Mapping[str, str]
    splits: Splits

    @functools.cached_property
    def store(self) -> LogitStore:
        """Of the train rows."""
        return open_store(self.stores["train"])

    def job(self, blocks: Sequence[dict[str, Any]]) -> CohortJob:
        """A cohort of students."""
        recipe = recipe_of(self.work, self.encoding, blocks)
        return fleet_job(recipe, self.splits, dict(self.stores), self.work / "run", str(self.work / "cache"))


def recipe_of(work: Path, encoding: str, blocks: Sequence[dict[str, Any]]) -> Recipe:
    """Students of two layers, some ten thousand tokens, and the teacher."""
    text = {"kind": "huggingface", "path": str(work / "teacher"), "length": 128}
    document = {
        "name": "store_against_dense",
        "data": {
            "train": {"kind": "text", "path": str(work / "corpus.jsonl"), "input": "text"},
            "task": "language_model",
            "text": text,
            "validation": 0.15,
            "test": 0.3,
        },
        "teacher": {"weights": str(work / "teacher")},
        "cache": {"encoding": ENCODINGS[encoding], "batch_rows": 4},
        "students": list(blocks) or [block_of("none", "labels", 0, 1e-3)],
        "folder": str(work),
    }
    return Recipe.model_validate(document).own()


def block_of(name: str, objective: str, seed: int, rate: float, stage2: float | None = None) -> dict[str, Any]:
    """A student; of Annealing-KD without a learning rate for stage II, stage I alone."""
    spec = OBJECTIVES[objective]
    if spec["kind"] == "annealing_kd":
        spec = spec | ({"stage2_epochs": 2, "stage2_optimizer": adamw(stage2)} if stage2 else {"stage2_epochs": 0})
    model = {"kind": "causal_lm", "width": 96, "depth": 2, "heads": 4}
    return {"name": name, "model": model, "objective": spec, "optimizer": adamw(rate), "batch": 4, "seed": seed}


def adamw(rate: float) -> dict[str, Any]:
    """As all arms take it."""
    schedule = {"kind": "linear", "warmup": 0.05}
    return {"kind": "adamw", "lr": rate, "betas": [0.9, 0.95], "eps": 1e-12, "clip": 1.0, "schedule": schedule}


def cached(work: Path, encoding: str) -> Stored:
    """The stores of an encoding; computed if they are not there."""
    recipe = recipe_of(work, encoding, ())
    document = akd_dist.cache_teacher(recipe, store_root=work / "stores", cache_root=work / "cache")
    stores = {"train": document["store"]} | {split: part["store"] for split, part in document["splits"].items()}
    return Stored(work, encoding, stores, prepare(recipe.data, work / "cache"))


@dataclass(eq=False)
class Learner:
    """A student with what it is told, and what the test rows say of it."""

    student: Student
    tell: Tell
    after_stage1: dict[str, float] | None = field(default=None, init=False)

    def end_epoch(self, splits: Splits) -> None:
        """As the product ends it; behind stage I the student has the weights of its best epoch."""
        self.student.end_epoch(splits.validation)
        if self.student.stage_index == 1 and self.student.stage_epoch == 0:
            self.after_stage1 = self.student.evaluate(splits.test)[0]

    def final(self, splits: Splits) -> dict[str, float]:
        """Of the best epoch's weights on the test rows."""
        assert self.student.best is not None
        self.student.module.load_state_dict(self.student.best)
        return self.student.evaluate(splits.test)[0]


def begin(spec: StudentSpec, stored: Stored, known: Known, tell: Tell) -> Learner:
    """A student before its first step."""
    card = ModelCard.of(spec.model, stored.splits.train, None)
    return Learner(Student(spec, card, stored.work / "run" / spec.name, metric="cross_entropy", known=known), tell)


def train(learners: Sequence[Learner], stream: BatchStream, splits: Splits) -> None:
    """All of them to their end, from one reading of the stream."""
    for epoch in range(max(one.student.epochs for one in learners)):
        here = [one for one in learners if one.student.epoch == epoch < one.student.epochs]
        for batch in stream.batches(epoch) if here else ():
            assert batch.targets is not None
            with batch.targets.shared():
                for one in here:
                    own = dataclasses.replace(batch, targets=one.tell(batch))
                    one.student.take_step(own, stream.steps_per_epoch)
        for one in here:
            one.end_epoch(splits)


# ---- learning rates


def tuned(objective: str, dense: Stored, known: Known) -> dict[str, Any]:
    """For each stage the learning rate whose best epoch has the lowest validation cross-entropy, and all of those."""

    def first(rates: Sequence[float]) -> dict[float, Learner]:
        return _trained({rate: block_of(f"{rate}", objective, TUNING_SEED, rate) for rate in rates}, dense, known)

    if (rate := FIXED.get(objective)) is not None:
        return {loss: {"chosen": rate, "validation": {}} for loss in (objective, objective + STAGE2)}
    learners = _searched(first)
    found = {objective: _chosen(learners)}
    if OBJECTIVES[objective]["kind"] != "annealing_kd":
        return found
    chosen = found[objective]["chosen"]

    def second(rates: Sequence[float]) -> dict[float, Learner]:
        blocks = {rate: block_of(f"{rate}", objective, TUNING_SEED, chosen, rate) for rate in rates}
        return _trained(blocks, dense, known, learners[chosen].student)

    return found | {objective + STAGE2: _chosen(_searched(second))}


def _searched(trained: Callable[[Sequence[float]], dict[float, Learner]]) -> dict[float, Learner]:
    """Three rates in the middle, and further ones while the best is the outermost."""
    low, high = 2, 5
    found = trained(RATES[low:high])
    while low > 0 and high < len(RATES):
        best = RATES.index(_chosen(found)["chosen"])
        if low < best < high - 1:
            break
        low, high, more = (low - 1, high, low - 1) if best == low else (low, high + 1, high)
        found |= trained((RATES[more],))
    return found


def _trained(
    blocks: Mapping[float, dict[str, Any]], dense: Stored, known: Known, leader: Student | None = None
) -> dict[float, Learner]:
    """Students of several learning rates from dense logits.

    Args:
        leader: whose stage I they go on from.
    """
    job = dense.job(list(blocks.values()))
    specs = zip(blocks, job.students, strict=True)
    learners = {rate: begin(spec, dense, known, lambda batch: batch.targets) for rate, spec in specs}
    for one in learners.values() if leader else ():
        assert leader is not None
        assert leader.best is not None
        one.student.enter_stage2(leader.spec.name, leader.history, leader.best)
    train(list(learners.values()), open_stream(job, dense.splits)[0], dense.splits)
    return learners


def _chosen(learners: Mapping[float, Learner]) -> dict[str, Any]:
    scores = {rate: one.student.best_record["validation"]["cross_entropy"] for rate, one in learners.items()}
    return {"chosen": min(scores, key=scores.__getitem__), "validation": scores}


# ---- the comparison


def run(seed: int, arms: Sequence[Arm], stored: Stored, rates: Mapping[str, Any], known: Known) -> list[dict[str, Any]]:
    """Test metrics of arms that read the same store, after stage I and at the end."""
    blocks = [
        block_of(f"{number}", arm.objective, seed, *(_rate(rates, arm.objective + end) for end in ("", STAGE2)))
        for number, arm in enumerate(arms)
    ]
    job = stored.job(blocks)
    tells = [arm.tell(stored.store) if arm.tell else (lambda batch: batch.targets) for arm in arms]
    learners = [begin(spec, stored, known, tell) for spec, tell in zip(job.students, tells, strict=True)]
    train(learners, open_stream(job, stored.splits)[0], stored.splits)
    return [{"stage1": one.after_stage1, "final": one.final(stored.splits)} for one in learners]


def _rate(rates: Mapping[str, Any], loss: str) -> Any:
    return rates[loss]["chosen"] if loss in rates else None


def table(seeds: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown: means over seeds, and differences to dense logits as mean and half of the 95 % interval."""
    heads = "CE after stage I|final CE|perplexity|KL to teacher|accuracy %|agreement %"
    heads += "|CE after stage I, to dense|final CE, to dense|final KL, to dense"
    lines = [f"| arm | {heads.replace('|', ' | ')} |", "|---" + "|--:" * (heads.count("|") + 1) + "|"]
    for arm in ARMS:

        def at(where: str, metric: str, name: str = arm.name) -> dict[int, float]:
            return {seed: found[name][where][metric] for seed, found in seeds.items() if found[name][where]}

        def mean(where: str, metric: str, factor: float = 1.0) -> float:
            return factor * statistics.fmean(at(where, metric).values())

        entropy = mean("final", "cross_entropy")
        cells = [f"{mean('stage1', 'cross_entropy'):.3f}" if at("stage1", "cross_entropy") else ""]
        cells += [f"{entropy:.3f}", f"{math.exp(entropy):.0f}", f"{mean('final', 'divergence'):.3f}"]
        cells += [f"{mean('final', name, 100):.1f}" for name in ("accuracy", "agreement")]
        for where, metric in (("stage1", "cross_entropy"), ("final", "cross_entropy"), ("final", "divergence")):
            apart = paired(at(where, metric), at(where, metric, arm.baseline)) if arm.name != arm.baseline else None
            cells.append(_shown(apart))
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_seed(seeds: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown: final cross-entropies less those from dense logits, seed by seed; and of stores their mean over all
    objectives of a seed, whose interval is narrower than that of any one of them."""
    lines = ["| final CE, to dense | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |"]
    lines.append("|---" + "|--:" * (len(seeds) + 1) + "|")

    def row(name: str, apart: Mapping[int, float]) -> None:
        each = " | ".join(f"{one:+.3f}" for one in apart.values())
        lines.append(f"| {name} | {each} | {_shown(estimate(apart))} |")

    def apart(arm: Arm) -> dict[int, float]:
        return {
            seed: found[arm.name]["final"]["cross_entropy"] - found[arm.baseline]["final"]["cross_entropy"]
            for seed, found in seeds.items()
        }

    for arm in ARMS:
        if arm.name != arm.baseline:
            row(arm.name, apart(arm))
    for encoding in (LARGE, SMALL):
        own = [apart(arm) for arm in ARMS if arm.encoding == encoding and not arm.tell]
        row(
            f"{encoding}, mean over {len(own)} objectives",
            {seed: statistics.fmean(one[seed] for one in own) for seed in seeds},
        )
    return "\n".join(lines)


def _shown(apart: Estimate | None) -> str:
    if apart is None:
        return ""
    return f"{apart.mean:+.3f}" + ("" if apart.high is None else f" ± {apart.high - apart.mean:.3f}")


def main() -> None:
    """Cache, choose learning rates, train every arm with every seed, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    work = given.work.absolute()
    cut_teacher.make(given.model, work)
    set_deterministic("cpu", 1)
    stores = {encoding: cached(work, encoding) for encoding in ENCODINGS}
    found: dict[int, dict[str, Any]] = {seed: {} for seed in range(given.seeds)}
    for objective in OBJECTIVES:
        for seed, arms in compared(objective, stores, found, work).items():
            found[seed] |= arms
    print(f"\n{table(found)}\n\n{by_seed(found)}")


def compared(
    objective: str, stores: Mapping[str, Stored], seeds: Iterable[int], work: Path
) -> dict[int, dict[str, Any]]:
    """Test metrics of all arms of an objective, with learning rates that are chosen first, by seed and arm."""
    dense = stores["dense"]
    known = known_of_language(dense.job(()), dense.splits)
    known = Known({dense.splits.test.fingerprint: known.stored[dense.splits.test.fingerprint]})
    rates = _kept(work / f"rates of {objective}.json", lambda: tuned(objective, dense, known))
    for loss, told in rates.items():
        scores = ", ".join(f"{rate}: {score:.3f}" for rate, score in told["validation"].items())
        print(f"{loss}: {told['chosen']} of {scores or 'no others'}", flush=True)
    found: dict[int, dict[str, Any]] = {seed: {} for seed in seeds}
    own = [arm for arm in ARMS if arm.objective == objective]
    for seed, (encoding, stored) in itertools.product(found, stores.items()):
        missing = [arm for arm in own if arm.encoding == encoding and not arm.path(work, seed).exists()]
        for arm, told in zip(missing, run(seed, missing, stored, rates, known) if missing else (), strict=True):
            arm.path(work, seed).write_text(json.dumps(told, indent=1))
            print(f"{arm.name}, seed {seed}: done", flush=True)
    return {seed: {arm.name: json.loads(arm.path(work, seed).read_text()) for arm in own} for seed in found}


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file has, or what is made and then lies there."""
    if not path.exists():
        path.write_text(json.dumps(make(), indent=1))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    main()
