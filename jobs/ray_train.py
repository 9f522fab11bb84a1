"""A cohort as one Ray Train run: what the driver asks of Ray, and what each of the workers runs."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from akd_dist.base.errors import AkdError
from akd_dist.distill.job import CohortJob
from akd_dist.distill.ranks import OutOfStepError, Ranks, joined
from akd_dist.jobs import cluster, ray_internals
from akd_dist.jobs.packing import ResourceRequest
from akd_dist.jobs.shared import Needed, UnseenError, missed_here
from akd_dist.jobs.worker import work

Raised = TypeVar("Raised", bound=Exception)

OUT_OF_STEP = "its workers fell out of step: "


def fit(job: CohortJob, ask: ResourceRequest, selector: dict[str, str], needed: Needed) -> str:
    """Run a cohort as one Ray Train run.

    Args:
        ask: what its workers occupy.
        selector: the labels of the nodes that they may lie on.
        needed: what each of them looks for on its node before it begins.

    Returns:
        Why its workers died; nothing if it came to its end.

    Raises:
        AkdError: what a worker was refused for.
        UnseenError: a worker came to a node that misses something, and none has begun.
    """
    ray = cluster.ray
    from ray.train import FailureConfig, RunConfig

    storage = (Path(job.control) / "ray").absolute()
    name = f"{job.name}-{os.getpid()}-{time.time_ns()}"  # an old name would resume an old run's state
    # Not its torch trainer: that has a process group even for one worker, and listens on all interfaces for it.
    trainer = ray_internals.without_datasets()(
        run_worker,
        train_loop_config={"job": job, "needed": needed},
        scaling_config=scaling(ask, selector),
        # One restart by Ray itself is the quick way back; further deaths are for the driver, which may split it.
        run_config=RunConfig(name=name, storage_path=str(storage), failure_config=FailureConfig(max_failures=1)),
    )
    try:
        outcome = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}).values()
        if (unseen := next(_among(failures, UnseenError), None)) is not None:
            raise unseen from None
        outcome = next(_among(failures, AkdError), None)
        if outcome is None:
            told = "; ".join(str(one) for one in _among(failures, OutOfStepError))
            return OUT_OF_STEP + told if told else "Ray says: " + _cause(str(error))
    finally:
        # No other run ever has this name, so nobody reads what Ray noted of this one.
        shutil.rmtree(storage / name, ignore_errors=True)
    if isinstance(outcome, AkdError | UnseenError):
        raise outcome
    return ""


def scaling(ask: ResourceRequest, selector: dict[str, str] | None = None) -> Any:
    """What Ray Train is asked for: Ray places workers by CPUs, GPUs and memory, but does not hold them to these.

    Several cohorts have the same GPU where each asks for a fraction of it.
    """
    from ray.train import ScalingConfig

    each = {"CPU": ask.cpus, "memory": ask.memory} | ({"GPU": ask.gpus} if ask.gpus else {})
    return ScalingConfig(  # type: ignore[call-arg]  # Ray declares an older one
        num_workers=ask.workers, use_gpu=ask.gpus > 0, resources_per_worker=each, label_selector=selector
    )


def _cause(told: str) -> str:
    """The part of Ray's account of a death that says why; where there is none, the last line, which ends a trace."""
    text = " ".join(told.split())
    starts = [
        text.find(mark) for mark in ("Worker exit detail: ", "was killed due to", "ray.exceptions.") if mark in text
    ]
    said = text[starts[0] :] if starts else told.strip().rpartition("\n")[2]
    return said[:400].partition(" Some common causes include")[0].rstrip(".")  # any of them: it does not know


def _among(failures: Iterable[Exception], kind: type[Raised]) -> Iterator[Raised]:
    """What workers raised of one kind, however Ray wrapped it."""
    for failure in failures:
        cause: Any = failure
        while cause is not None and not isinstance(cause, kind):
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            yield cause


def run_worker(config: dict[str, Any]) -> dict[str, Any] | AkdError | UnseenError:
    """What a Ray Train worker runs.

    A refusal is returned, not raised: running it again would change nothing. Where there are other ranks it is raised,
    so that Ray ends them too and none waits for this one.
    """
    context = cluster.ray.train.get_context()
    job, rank, world = config["job"], context.get_world_rank(), context.get_world_size()
    if (unseen := missed_here(config["needed"])) is not None:
        if world > 1:
            raise UnseenError(unseen)
        return UnseenError(unseen)
    job = config["needed"].here(job).on_node()
    outcome = work(job, rank, joining(rank, world, job.device))
    if world > 1 and isinstance(outcome, AkdError):
        raise outcome
    return outcome


@contextlib.contextmanager
def joining(rank: int, world: int, device: str) -> Iterator[Ranks]:
    """This Ray Train worker and the others of its cohort as ranks, for the time of a block."""
    from ray.train.collective import broadcast_from_rank_zero

    if world > 1 and device == "cuda":
        import ray.train.torch

        torch.cuda.set_device(ray.train.torch.get_device())  # each sees all of its node's that the cohort has
    here = cluster.ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with joined(rank, world, device, here, broadcast_from_rank_zero) as ranks:
        yield ranks
