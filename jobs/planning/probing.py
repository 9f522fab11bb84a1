"""What a fleet's students take: each distinct model is probed once, in a process that may die of it.

A model that takes all memory, or crashes below Python, ends that process and not the command; then its cost is unknown,
and its worker says why, as it would have anyway.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from akd_dist.base.errors import AkdError, MachineError
from akd_dist.base.trusted import Trusted
from akd_dist.data.row_cache import prepare
from akd_dist.data.row_fetch import alike_rows
from akd_dist.data.rows import Splits
from akd_dist.distill.probe import Measured, largest_optimizer, moments, probe
from akd_dist.distill.ranks import reason_of
from akd_dist.jobs.idle import IdleWorkers, Worker, begin_process
from akd_dist.models.device import gpus_of
from akd_dist.models.uncompiled import use_deterministic_algorithms
from akd_dist.recipe import (
    CausalLm,
    Cnn,
    DataSpec,
    HardLabels,
    Mlp,
    PlainCnn,
    Recipe,
    ResNet,
    Stacked,
    StudentSpec,
    TextTransformer,
    trust,
)
from akd_dist.storage.rows import SealedRows

if TYPE_CHECKING:
    from akd_dist.jobs.working_dir import WorkingDir

ALL_SECONDS = 30.0
"""How long the probes of a fleet take at most; further models are estimated from the nearest by size."""

BUILT_IN = (Mlp, Cnn, ResNet, PlainCnn, TextTransformer, CausalLm)
"""Models whose code is ours."""
_SIZES = ("weights", "gradients", "optimizer", "step_memory", "evaluation_memory")

log = logging.getLogger(__name__)


def measure_there(
    recipe: Recipe,
    students: Sequence[StudentSpec],
    parameters: dict[str, int],
    cache_root: str,
    tell: Callable[[str], None],
    folder: WorkingDir | None = None,
    sealed: SealedRows | None = None,
) -> dict[str, Measured | None]:
    """`measure_all` on a node of the cluster that has what the students take; where that fails, all are unknown.

    Args:
        tell: told if it fails. It does not wait for others to end.
        folder: the recipe's folder, as far as it travels.
        sealed: as of `measure_all`.
    """
    from akd_dist.jobs.cluster import free_nodes
    from akd_dist.jobs.packing import ResourceRequest, fits
    from akd_dist.jobs.shared import Shared
    from akd_dist.jobs.stopping import StopFlag
    from akd_dist.jobs.tasks import run_one

    threads, gpus = max(spec.threads for spec in students), gpus_of(recipe.device)
    try:
        if not fits(free_nodes(), ResourceRequest(1, threads, gpus)):
            raise MachineError("no GPU is free to probe the students on")
        with Shared({}, cache_root, tell, folder=folder) as shared:
            found: dict[str, Measured | None] = run_one(
                measure_all,
                *(recipe, students, parameters, cache_root, sealed),
                threads=threads,
                gpus=gpus,
                shared=shared,
                stop=StopFlag(),
                on_poll=lambda: None,
                name="probing the students",
            )
        return found
    except AkdError as error:
        tell(f"how long the students take is not known: {error}")
        return dict.fromkeys(spec.name for spec in students)


def measure_all(
    recipe: Recipe,
    students: Sequence[StudentSpec],
    parameters: dict[str, int],
    cache_root: str,
    sealed: SealedRows | None = None,
    idle: IdleWorkers | None = None,
) -> dict[str, Measured | None]:
    """What each student takes, from one probe of each distinct model, batch and optimizer on this machine.

    Once the probes have taken ALL_SECONDS, models that are still unknown are estimated from the one nearest in
    parameters, in proportion.

    Args:
        parameters: of each student, by name.
        cache_root: this node's own folder, where the rows are prepared.
        sealed: where they lie for every node; None where each prepares them.
        idle: workers of this machine, which may be asked.

    Returns:
        By the name of the student; None where the probe failed.
    """
    distinct: dict[str, StudentSpec] = {}
    for spec in students:
        distinct.setdefault(probe_key(spec), spec)
    found: dict[str, Measured | None] = {}
    started = time.monotonic()
    with Prober(recipe, cache_root, sealed, idle) as prober, contextlib.ExitStack() as leaving:
        # On all CPUs at once, as they will train: what a student takes beside others is what counts then.
        at_once = min(len(os.sched_getaffinity(0)), len(prober.workers.waiting) + 1)
        pool = leaving.enter_context(ThreadPoolExecutor(at_once, "probes"))
        leaving.callback(pool.shutdown, wait=False, cancel_futures=True)

        def measure(key: str, spec: StudentSpec) -> None:
            if time.monotonic() - started < ALL_SECONDS:
                found[key] = prober.probe(spec)

        for one in [pool.submit(measure, *one) for one in distinct.items()]:
            one.result()
    known = {key: one for key, one in found.items() if one is not None}
    sizes = {key: parameters[spec.name] for key, spec in distinct.items()}
    for key in distinct.keys() - found.keys():
        nearest = min(known, key=lambda other: abs(sizes[other] - sizes[key]), default=None)
        found[key] = None if nearest is None else scaled(known[nearest], sizes[key] / max(sizes[nearest], 1))
    return {spec.name: found[probe_key(spec)] for spec in students}


def probe_key(spec: StudentSpec) -> str:
    """What the cost of a student's step depends on. Neither its seed nor its learning rate nor its temperature do."""
    optimizer = largest_optimizer(spec)
    # Keys of the recipe that came later are added only for the models that have them: earlier runs have their way of
    # taking steps noted under the key as it was.
    later = f" {spec.micro_batch} {spec.gradient_checkpointing}" if spec.is_language_model else ""
    return "\n".join(
        [
            spec.model.model_dump_json(),
            f"{spec.batch} {spec.last_batch} {spec.workers} {spec.threads} {spec.precision} {spec.labelled}{later}",
            f"{optimizer.kind} {moments(optimizer)} {optimizer.clip is None}",
        ]
    )


def scaled(known: Measured, ratio: float) -> Measured:
    """The measurement of a model that is so many times as large; the stream stays as it is."""
    seconds = {name: getattr(known, name) * ratio for name in ("step", "evaluation", "start", "keeping")}
    sizes = {name: round(getattr(known, name) * ratio) for name in _SIZES}
    # Whether it could be stacked is not known of one that was not tried.
    return replace(
        known, **seconds, **sizes, stacked=False, why="the time for trials was over", stack=0.0, together=0.0
    )


class Prober:
    """Probes students in workers that wait, as many at a time as there are, or one after the other in a process of its
    own: it starts another when a model has killed it.
    """

    def __init__(
        self, recipe: Recipe, cache_root: str, sealed: SealedRows | None = None, idle: IdleWorkers | None = None
    ) -> None:
        self.workers = idle or IdleWorkers()
        self.job = {
            "data": recipe.data.model_dump(mode="json"),
            "device": recipe.device,
            "trusted": recipe.trusted.model_dump(mode="json"),
            "cache_root": cache_root,
            "stacked": recipe.stacked,
            "encoding": recipe.cache.encoding.config(),
            "sealed": None if sealed is None else asdict(sealed),
        }
        self.alone = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # what the process says besides its answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *leaving: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.words.close()

    def probe(self, spec: StudentSpec) -> Measured | None:
        """What a student takes; None, and a warning, if its probe fails or kills its process.

        Built-in models on a processor are looked at in a worker that waits, or in this process: their size was compared
        with the memory before, and they crash nothing, so a process of their own would only cost its start. A GPU would
        stay taken.
        """
        if spec.objective.epochs == 0:  # it takes no step, but its fleet may be measured; no recipe can say so
            spec = spec.model_copy(update={"objective": HardLabels(epochs=1)})
        with tempfile.TemporaryDirectory(prefix="akd-dist-probe-") as scratch:
            request = {"student": spec.model_dump(mode="json"), "scratch": scratch}
            here = isinstance(spec.model, BUILT_IN) and self.job["device"] == "cpu"
            answer = self._ask_nearby(request | self.job) if here else self._ask(request)
        if "failed" in answer:
            log.warning("the probe of %s failed: %s", spec.name, answer["failed"])
            return None
        return Measured(**answer)

    def _ask_nearby(self, request: dict[str, Any]) -> dict[str, Any]:
        # A worker that was killed says nothing of the student; one that is not looked at would step alone, and come to
        # other bits than in a run that nobody disturbed.
        while worker := self._worker():
            if (answer := worker.ask("probe", request)) is not None:
                self.workers.give_back(worker)
                return dict(answer)
            worker.end()
        with self.alone:
            return answer_here(request)

    def _worker(self) -> Worker | None:
        """One that waits, taken from the others."""
        with contextlib.suppress(IndexError):
            return self.workers.waiting.popleft()
        return None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.alone:
            return self._ask_process(request)

    def _ask_process(self, request: dict[str, Any]) -> dict[str, Any]:
        self.process = process = self.process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        # A process that is gone gives no answer, and its last words are told below.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request | self.job) + "\n")
            process.stdin.flush()
        if line := process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.process = None
        process.communicate()
        self.words.seek(0)
        last = "".join(line.strip() for line in deque(self.words, maxlen=1))
        return {"failed": f"its process ended with code {process.returncode}" + (last and f": {last}")}

    def _start(self) -> subprocess.Popen[str]:
        self.words.seek(0)
        self.words.truncate()
        return begin_process(
            "akd_dist.jobs.planning.probing",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A file and not a pipe: a pipe that nobody reads fills up, and a model that says much would wait for ever.
            stderr=self.words,
            text=True,
        )


def answer_here(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request in this process, whose settings of torch stay as they are."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        return asdict(_answer(**request))
    except (Exception, SystemExit) as error:
        return {"failed": reason_of(error)}
    finally:
        torch.set_num_threads(threads)
        use_deterministic_algorithms(deterministic)


def answer_probes() -> None:
    """The process of a `Prober`: answers each student that stands in a line of its input with a line of its output."""
    with os.fdopen(os.dup(1), "w") as answers, contextlib.suppress(KeyboardInterrupt):
        os.dup2(2, 1)  # what a model prints is no answer
        # Whatever a model forks may outlive this process: the driver waits for the end of these answers.
        os.register_at_fork(after_in_child=lambda: os.close(answers.fileno()))
        with contextlib.suppress(OSError):  # not on Linux
            Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this process that goes
        for line in sys.stdin:
            try:
                answer = asdict(_answer(**json.loads(line)))
            except (Exception, SystemExit) as error:
                answer = {"failed": reason_of(error)}
            print(json.dumps(answer), file=answers, flush=True)


def _answer(
    student: dict[str, Any],
    data: dict[str, Any],
    device: str,
    trusted: dict[str, Any],
    cache_root: str,
    scratch: str,
    stacked: Stacked,
    encoding: dict[str, Any],
    sealed: dict[str, str] | None = None,
) -> Measured:
    told = Trusted.model_validate(trusted)
    rows, splits = _prepared(json.dumps(data), told, cache_root, None if sealed is None else SealedRows(**sealed))
    try:
        spec = trust(StudentSpec.model_validate(student), told)
        return probe(rows, device, spec, splits, Path(scratch), stacked, encoding)
    finally:
        torch.cuda.empty_cache()  # else it would count as taken in the next probe


@functools.cache
def _prepared(data: str, trusted: Trusted, cache_root: str, sealed: SealedRows | None) -> tuple[DataSpec, Splits]:
    rows = trust(DataSpec.model_validate_json(data), trusted)
    if sealed is not None:  # what a step takes does not depend on what the rows show: none have to be here
        return rows, alike_rows(sealed)
    return rows, prepare(rows, Path(cache_root), expected={})  # what is trained on is looked at elsewhere


if __name__ == "__main__":
    answer_probes()
