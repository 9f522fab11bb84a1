"""Under Ray: the bytes of the plain loop, through killed workers, killed drivers, Ctrl-C and second comers.

Workers are killed for real, on one cluster for all tests; drivers are commands with a cluster of their own.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import akd_dist
from akd_dist.base.errors import InterruptedByUser, MachineError, RecipeError, RefusedError, TerminatedError
from akd_dist.data.row_cache import prepare
from akd_dist.jobs import cluster
from akd_dist.jobs.cache_teacher import cache_in_process
from akd_dist.jobs.cluster import ray
from akd_dist.jobs.fleet import Fleet, RunningCohort
from akd_dist.jobs.packing import Node, ResourceRequest
from akd_dist.jobs.planning.costs import CostModel
from akd_dist.jobs.planning.plan import fleet_job
from akd_dist.jobs.ray_train import _cause
from akd_dist.jobs.shared import Shared
from akd_dist.jobs.stopping import StopFlag, stop_on_signals
from akd_dist.jobs.tasks import run_one
from akd_dist.jobs.train_students import train_in_process
from akd_dist.models.build import build
from akd_dist.models.card import ModelCard
from akd_dist.models.folder import load_model, save_model
from akd_dist.recipe import Custom, Recipe
from akd_dist.reporting.results import read_fleet
from akd_dist.storage.catalog import list_stores
from akd_dist.storage.claim import claim_store
from akd_dist.storage.reader import open_store
from akd_dist.storage.removal import disused
from tests.data.test_verification import flip
from tests.fleets import ANNEALING, HARD, a_recipe, a_student, a_teacher, own, store_bytes, weights
from tests.survivors import HELD_MODELS, a_held_model, forked_cohorts, marked, plant_snapshot, standing_still, until

pytestmark = pytest.mark.ray

FLEET = [
    *(a_student(f"annealing-{seed}", seed=seed) for seed in range(3)),
    *(a_student(f"hard-{seed}", seed=seed, objective=HARD) for seed in range(2)),
    a_student("held", model=a_held_model(at=30)),
    a_student("cnn", model={"kind": "cnn", "width": 4}),
    a_student("long", objective=ANNEALING | {"stage1_epochs": 3, "stage2_epochs": 2}),
]
# Enough of them where a run is disturbed: what becomes of a student does not depend on the others.
FEW = [student for student in FLEET if student["name"] in ("annealing-0", "hard-0", "held", "long")]
# Where workers stand still in the second epoch of these students, or of the teacher: one has 20 batches.
SECOND_EPOCH = "cohort.after_batch:25:STOP"


class Home:
    """One folder with a teacher, the recipe file, and what the plain loop makes of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache_root = root, str(root / "cache")
        (root / "held_models.py").write_text(HELD_MODELS)
        self.hold = root / "hold"
        self.recipe = self.recipe_for(a_teacher(a_recipe([a_student("any")]), root / "teacher", root / "cache"))
        self.few = a_recipe(FEW, teacher={"weights": str(root / "teacher")}, folder=str(root))
        document = cache_in_process(
            self.recipe, str(root / "teacher"), store_root=str(root / "plain"), cache_root=self.cache_root
        )
        self.stores = {"train": document["store"]} | {name: part["store"] for name, part in document["splits"].items()}
        train_in_process(self.recipe, self.stores, run=root / "plain-run", cache_root=self.cache_root)
        self.store_bytes, self.weights = store_bytes(root / "plain"), weights(root / "plain-run")

    def recipe_for(self, teacher: str, **changes: Any) -> Recipe:
        return a_recipe(FLEET, teacher={"weights": teacher}, folder=str(self.root), **changes)

    def places(self, root: Path) -> dict[str, Any]:
        return {"store_root": str(root / "stores"), "cache_root": self.cache_root}

    def train(self, root: Path, recipe: Recipe | None = None, **options: Any) -> dict[str, Any]:
        return akd_dist.train_students(
            recipe or self.recipe,
            run_root=str(root / "runs"),
            console=Console(quiet=True),
            **self.places(root),
            **options,
        )

    def has_weights(self, run: Path) -> bool:
        """Whether the few students have the weights that the plain loop gave them."""
        return weights(run) == {student["name"]: self.weights[student["name"]] for student in FEW}

    def command(
        self, root: Path, *arguments: str, recipe: Recipe | None = None, program: str = "akd_dist.cli"
    ) -> list[str]:
        file = root / "recipe.yaml"
        file.write_text((recipe or self.few).to_yaml())
        places = ["--store-root", str(root / "stores"), "--cache-root", self.cache_root]
        if arguments[0] == "train-students":
            places += ["--run-root", str(root / "runs")]
        return [sys.executable, "-m", program, arguments[0], str(file), *places, *arguments[1:]]


def said(run: Path) -> dict[str, bytes]:
    """What each student and the teacher say of the test rows."""
    return {path.parent.name: path.read_bytes() for path in run.glob("students/*/test.parquet")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def trained(home: Home, ray_cluster: None) -> tuple[Path, dict[str, Any]]:
    """The fleet, cached and trained on the session's cluster, with nothing killed."""
    root = home.root / "undisturbed"
    return root, home.train(root)


def test_a_fleet_on_ray_has_the_bytes_of_the_plain_loop(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, fleet = trained
    assert store_bytes(root / "stores") == home.store_bytes
    assert weights(root / "runs" / "fleet") == home.weights
    assert len(home.weights) == 8
    assert said(root / "runs" / "fleet") == said(home.root / "plain-run") != {}
    assert fleet["cohorts"] == 1
    assert {student["state"] for student in fleet["students"]} == {"done"}
    assert not list((root / "stores").rglob("*.claim"))
    assert not list(root.rglob("*.partial"))


def test_what_a_run_leaves(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, fleet = trained
    run = root / "runs" / "fleet"
    assert read_fleet(run).plain() == fleet
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "Who is right" in page  # from every student's test.parquet
    (balance,) = fleet["economics"]
    assert (balance["passes_run"], balance["epochs"], balance["students"]) == (2, 13, 6)
    assert balance["hosts"]
    assert balance["training_seconds"] is None  # the recipe names weights
    assert "views: 2" in (run / "recipe.yaml").read_text()
    student = fleet["students"][0]
    assert student["parameters"] == sum(p.numel() for p in load_model(student["path"]).parameters())
    assert (run / "logs" / "annealing-0.log").exists()


def test_a_run_is_recorded_with_every_store_it_used(trained: tuple[Path, dict[str, Any]]) -> None:
    root, fleet = trained
    for store in list_stores(str(root / "stores")):
        (use,) = store.uses
        assert (use.run, use.lock) == (fleet["run"], str(root / "runs" / "fleet" / "lock"))
        assert not use.is_going_on(time.time()), "its lock was let go"
    assert disused(str(root / "stores"), Path(root / "no-cache"), unused_for=86_400) == []


def test_a_student_serves_as_a_teacher(home: Home, trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    chained = home.recipe_for(trained[1]["students"][0]["path"])
    document = cache_in_process(chained, chained.teacher.weights or "", **home.places(tmp_path))
    assert not document["hit"]
    assert document["id"] != Path(home.stores["train"]).name


def test_the_same_command_again_touches_nothing(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    root, fleet = trained
    before = {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*.safetensors")}
    assert home.train(root) == fleet
    assert {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*.safetensors")} == before


def test_another_recipe_under_the_same_name_is_refused(home: Home, trained: tuple[Path, dict[str, Any]]) -> None:
    other = home.recipe_for(home.recipe.teacher.weights or "", data=home.recipe.data.model_copy(update={"views": 1}))
    with pytest.raises(RecipeError, match=r"(?s)data\.views: 2 -> 1.*--set name=") as refused:
        home.train(trained[0], other)
    assert refused.value.code == 2


def test_another_teacher_under_the_same_name_is_refused(home: Home, trained: Any) -> None:
    student = trained[1]["students"][0]["path"]
    with pytest.raises(RecipeError, match=r"(?s)teacher\.fingerprint: \w+ -> \w+"):
        home.train(trained[0], home.recipe_for(student))


def test_lagging_results_are_collected_again(home: Home, trained: Any) -> None:
    root, fleet = trained
    (root / "runs" / "fleet" / "report.html").unlink()  # as if killed just before it was written
    again = home.train(root)
    assert again["students"] == fleet["students"]
    assert (root / "runs" / "fleet" / "report.html").exists()


def test_fresh_asks_before_it_forgets(home: Home, trained: Any) -> None:
    before = weights(trained[0] / "runs" / "fleet")
    with pytest.raises(RefusedError):
        home.train(trained[0], home.recipe_for(str(home.root / "nowhere")), fresh=True)
    assert weights(trained[0] / "runs" / "fleet") == before


class Killer:
    """Kills the first `count` of our processes whose title contains `title`, each once `when()` says so.

    As long as `hold` lies there, held models do not go on: it is put there at once, and taken away after the last kill.
    """

    def __init__(self, title: str, count: int, hold: Path, when: Callable[[], bool] = lambda: True) -> None:
        self.title, self.count, self.hold, self.when = title, count, hold, when
        self.killed: set[int] = set()
        self.over = threading.Event()

    def __enter__(self) -> "Killer":
        self.hold.touch()
        self.thread = threading.Thread(target=self._hunt, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.hold.unlink(missing_ok=True)

    def _hunt(self) -> None:
        while not self.over.wait(0.05) and len(self.killed) < self.count:
            for process in psutil.Process().children(recursive=True):  # others may run these tests as well
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if self.title in title and process.pid not in self.killed and self.when():
                    process.kill()
                    self.killed.add(process.pid)
                    break
        self.hold.unlink(missing_ok=True)


def test_a_killed_cache_worker_changes_no_byte(home: Home, ray_cluster: None, tmp_path: Path) -> None:
    teacher = a_held_teacher(home, home.root / "held-teacher")
    held = home.recipe_for(str(teacher), code=["held_models"])
    with Killer("ray::cache_shard", 2, home.hold) as killer:
        akd_dist.cache_teacher(held, console=Console(quiet=True), **home.places(tmp_path))
    assert len(killer.killed) == 2
    cache_in_process(held, str(teacher), store_root=str(tmp_path / "plain"), cache_root=home.cache_root)
    assert store_bytes(tmp_path / "stores") == store_bytes(tmp_path / "plain")
    assert not [path for path in (tmp_path / "stores").rglob("*") if path.suffix in (".claim", ".partial")]


def a_held_teacher(home: Home, folder: Path) -> Path:
    rows = prepare(home.recipe.data, Path(home.cache_root)).train
    card = ModelCard.of(own(Custom(**a_held_model(at=1)), home.root), rows, None)
    save_model(folder, build(card, seed=1), card)
    return folder


def test_killed_train_workers_resume_also_before_a_step(
    home: Home, trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_snapshot(tmp_path / "runs" / "fleet", b'{"ray_version": "2.')
    checkpointed = lambda: len(list(tmp_path.rglob("*.ckpt"))) >= len(FEW)  # noqa: E731
    with (
        Killer("ray::RayTrainWorker", 1, tmp_path / "nobody-waits") as early,
        Killer("ray::RayTrainWorker", 1, home.hold, checkpointed) as late,
    ):
        fleet = home.train(tmp_path, home.few)
    assert len(early.killed) == len(late.killed) == 1
    assert {student["state"] for student in fleet["students"]} == {"done"}
    assert home.has_weights(tmp_path / "runs" / "fleet")
    assert "raylet" not in "".join(capsys.readouterr())  # Ray's own words


def interrupt(
    command: list[str], marker: Path, failpoint: str, number: int, *, group: bool = False
) -> subprocess.CompletedProcess[str]:
    """Send a command a signal while a process of its stands still at a failpoint, and give what came of it.

    Such a process goes on as soon as the command has told its workers to stop.
    """
    errors, environment = marker / "stderr", os.environ | {"AKD_FAILPOINT": failpoint}
    with open(errors, "w") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True, env=environment
        )
    until(lambda: standing_still(process), process, errors)
    stops = set(marker.rglob("stop-*"))
    if group:  # as a terminal or a service manager does: to everybody
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    if number != signal.SIGKILL:
        until(lambda: set(marker.rglob("stop-*")) - stops, process, errors)
        while process.poll() is None:
            for one in standing_still(process):
                one.resume()
            time.sleep(0.2)
    out, _ = process.communicate(timeout=900)
    return subprocess.CompletedProcess(command, process.returncode, out, errors.read_text())


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("AKD_TEST_MARKER", str(tmp_path))
    yield tmp_path
    for process in marked(tmp_path):
        process.kill()


def leave_no_process(marker: Path) -> bool:
    """Whether all that a command has started is gone; Ray's own helpers may take a moment."""
    return not psutil.wait_procs(marked(marker), timeout=60)[1]


def test_a_killed_caching_driver_leaves_shards_to_go_on_from(home: Home, trained: Any, marker: Path) -> None:
    # All shards are done within milliseconds: its workers stand still at their third ones.
    killed = interrupt(home.command(marker, "cache-teacher"), marker, "shard.before_receipt:3:STOP", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    document = akd_dist.cache_teacher(home.recipe, console=Console(quiet=True), wait=True, **home.places(marker))
    stores = [document, *document["splits"].values()]  # the driver may have died in any of them
    assert 0 < sum(store["shards_computed"] for store in stores) < sum(store["shards"] for store in stores)
    assert store_bytes(marker / "stores") == home.store_bytes
    assert not list((marker / "stores").rglob("*.claim"))


def test_an_interrupted_driver_leaves_students_to_go_on_from(home: Home, marker: Path) -> None:
    two = home.few.model_copy(update={"students": home.few.students[:2]})
    command = home.command(marker, "train-students", "--json", recipe=two)
    shutil.copytree(home.root / "plain", marker / "stores")
    interrupted = interrupt(command, marker, SECOND_EPOCH, signal.SIGINT, group=True)
    is_interrupted(interrupted)
    assert leave_no_process(marker)
    assert list((marker / "runs").rglob("*.ckpt"))
    with forked_cohorts():  # the undisturbed fleet has shown that it does not matter who trains
        fleet = home.train(marker, two)
    assert {(student["state"], student["attempt"]) for student in fleet["students"]} == {("done", 2)}
    assert weights(marker / "runs" / "fleet") == {spec.name: home.weights[spec.name] for spec in two.students}


def is_interrupted(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 130, done.stderr
    assert "the same command goes on" in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == 130
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_drivers_are_terminated_interrupted_and_killed(home: Home, trained: Any, marker: Path) -> None:
    """One after the other, each in the midst of what the one before has left; the weights are as if none had been."""
    command = home.command(marker, "train-students", program="tests.on_ray")
    shutil.copytree(home.root / "plain", marker / "stores")

    terminated = interrupt([*command, "--fresh"], marker, SECOND_EPOCH, signal.SIGTERM, group=True)
    assert terminated.returncode == 143, terminated.stderr
    assert "the same command without --fresh goes on" in terminated.stderr
    assert leave_no_process(marker)

    interrupted = interrupt([*command, "--json"], marker, SECOND_EPOCH, signal.SIGINT, group=True)
    is_interrupted(interrupted)
    assert leave_no_process(marker)

    killed = interrupt(command, marker, SECOND_EPOCH, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert "starting Ray" in killed.stderr

    fleet = home.train(marker, home.few)
    assert {student["state"] for student in fleet["students"]} == {"done"}
    assert home.has_weights(marker / "runs" / "fleet")


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with stop_on_signals(told.append) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert (stop.signal, len(told)) == (signal.SIGTERM, 1)
        monkeypatch.setattr("akd_dist.jobs.stopping.ONCE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_waits_for_no_worker(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = prepare(home.recipe.data, Path(home.cache_root))
    base = fleet_job(home.recipe, splits, home.stores, tmp_path, home.cache_root)
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), StopFlag(), Console(quiet=True))
    over = threading.Event()
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    fleet.running.append(RunningCohort(base, ResourceRequest(1, 1), thread=thread))
    monkeypatch.setattr(fleet, "_watch", lambda **_: pytest.fail("it waits"))
    with pytest.raises(KeyboardInterrupt), fleet._stopping_on_errors():
        raise KeyboardInterrupt
    over.set()


def test_whoever_stops_before_workers_train_is_told_that_nothing_is_lost(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "check_alive", lambda _stop: None)
    monkeypatch.setattr("akd_dist.jobs.fleet.GRACE_SECONDS", -1.0)
    splits, stop = prepare(home.recipe.data, Path(home.cache_root)), StopFlag()
    base = fleet_job(home.recipe, splits, home.stores, tmp_path, home.cache_root)
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), stop, Console(quiet=True))
    stop.signal, over = signal.SIGINT, threading.Event()
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    fleet.running, fleet.jobs = [RunningCohort(base, ResourceRequest(1, 1), thread=thread)], [base]
    with pytest.raises(InterruptedByUser, match="none had begun to train, so nothing is lost"):
        fleet._watch(stopping=True)
    monkeypatch.setattr("akd_dist.jobs.fleet.read_progress", lambda _job: "how far it is")
    with pytest.raises(InterruptedByUser, match="only earlier checkpoints are kept"):
        fleet._watch(stopping=True)
    over.set()


def test_a_node_that_joins_takes_the_place_of_a_lost_one(home: Home, tmp_path: Path) -> None:
    """Ray places a cohort's workers again on any node that it was not told to leave out."""
    splits = prepare(home.recipe.data, Path(home.cache_root))
    base = fleet_job(home.recipe, splits, home.stores, tmp_path, home.cache_root)
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), StopFlag(), Console(quiet=True))
    over = threading.Event()
    fleet.executor.nodes = lambda: [Node("joined", 4)]  # type: ignore[method-assign]
    thread = threading.Thread(target=over.wait, daemon=True)
    thread.start()
    fleet.running.append(RunningCohort(base, ResourceRequest(1, 1), thread=thread))
    fleet._check_room()
    fleet.executor.nodes = list  # type: ignore[method-assign]
    with pytest.raises(MachineError, match="nodes were lost") as told:
        fleet._check_room()
    over.set()
    assert "others have joined" in str(told.value.next)


def test_lost_nodes_end_the_run_after_others_checkpoint(home: Home, tmp_path: Path) -> None:
    splits, saved = prepare(home.recipe.data, Path(home.cache_root)), list[str]()
    base = fleet_job(home.recipe, splits, home.stores, tmp_path, home.cache_root)
    fleet = Fleet(base, CostModel(base.device, len(splits.train)), StopFlag(), Console(quiet=True))
    fleet.executor.nodes = list  # type: ignore[method-assign]
    over = threading.Event()
    base.stop_file.parent.mkdir(parents=True)

    def healthy() -> None:
        while not base.stop_file.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        saved.append("it has checkpointed")
        over.set()

    def lost() -> None:
        over.wait()

    for act in (healthy, lost):
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        fleet.running.append(RunningCohort(base, ResourceRequest(1, 1), thread=thread))
    fleet.moved_at -= 61  # and no node is left since then
    with pytest.raises(MachineError, match="nodes were lost"), fleet._stopping_on_errors():
        fleet._keep_busy()
    assert saved == ["it has checkpointed"]


def test_a_task_that_does_not_begin_does_not_hold_up_who_stops(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("akd_dist.jobs.tasks.GRACE_SECONDS", 0.5)
    busy = ray.remote(num_cpus=4)(lambda: time.sleep(600)).remote()
    while cluster.free_nodes()[0].cpus > 0:
        time.sleep(0.1)
    stop = StopFlag()
    stop.signal = signal.SIGTERM
    with Shared({}, str(tmp_path), print) as shared, pytest.raises(TerminatedError, match="the teacher did not answer"):
        run_one(
            lambda: None, threads=4, gpus=0, shared=shared, stop=stop, on_poll=lambda: None, name="the teacher"
        )  # fmt: skip
    ray.cancel(busy, force=True)


def test_sigterm_while_the_teacher_trains_keeps_its_checkpoint(marker: Path, home: Home) -> None:
    train = {"epochs": 3, "optimizer": {"kind": "adamw", "lr": 1e-2}}
    recipe = a_recipe([a_student("one")], teacher={"model": {"kind": "mlp", "hidden": 8}, "train": train})
    command = home.command(marker, "cache-teacher", recipe=recipe)
    stopped = interrupt(command, marker, SECOND_EPOCH, signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert "stopped" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "SIGTERM received" not in stopped.stderr  # Ray's handler, which aborts whoever takes longer than 3 s
    assert not list((marker / "stores").rglob("*.claim"))
    assert list((marker / "stores").glob("teachers/*/checkpoints/*.ckpt"))


def test_the_second_driver_leaves_with_3_and_names_the_holder(home: Home, tmp_path: Path) -> None:
    store_id = Path(home.stores["train"]).name
    with claim_store(str(tmp_path / "stores"), store_id, wait=False):
        second = subprocess.run(home.command(tmp_path, "cache-teacher"), capture_output=True, text=True, check=False)
    assert second.returncode == 3, second.stderr
    assert str(os.getpid()) in second.stderr
    assert "Traceback" not in second.stderr


def test_a_silent_node_gets_no_work(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, told = cluster.nodes(), list[str]()
    answer = ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote()
    monkeypatch.setattr("akd_dist.jobs.shared.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(cluster, "nodes", lambda: [*there, Node("silent", 4, 0, 1e9, "the silent one")])
    monkeypatch.setattr(Shared, "_ask", lambda _shared, _name: answer)
    with Shared({}, str(tmp_path), told.append) as shared:
        assert [node.name for node in shared.nodes()] == [node.name for node in there]
    assert told == ["no answer for 0.5 s, so no work until there is one: the silent one"]
    ray.cancel(answer, force=True)


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ('Training failed.\nFile "model.py", line 3, in forward\n    ^^^^\nSystemExit: 3\n', "SystemExit: 3"),
        (
            "It died.\nWorker exit detail: SIGKILL received.\n Some common causes include: (1) memory",
            "Worker exit detail: SIGKILL received",
        ),
    ],
)
def test_of_what_ray_says_of_a_death_the_cause_is_told(told: str, cause: str) -> None:
    assert _cause(told) == cause


def test_a_signal_to_the_group_leaves_ray_to_the_driver(ray_cluster: None) -> None:
    def blocks(process: psutil.Process, number: int) -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
        return bool(int(mask, 16) >> (number - 1) & 1)

    @ray.remote
    def worker() -> int:
        return os.getpid()

    (raylet,) = (one for one in psutil.Process().children() if one.name() == "raylet")
    others = [one for one in psutil.Process().children() if one.name() == "gcs_server"]
    for process in [raylet, *others, psutil.Process(ray.get(worker.remote()))]:
        assert blocks(process, signal.SIGTERM), process
        assert blocks(process, signal.SIGINT), process
    assert not blocks(psutil.Process(), signal.SIGTERM)


def test_wrong_bytes_in_a_cache_reach_no_student(home: Home, ray_cluster: None, tmp_path: Path) -> None:
    """In the decoded logits they are found by the workers, while they train; sizes and times stay as they are."""
    shutil.copytree(home.root / "plain", tmp_path / "stores")
    store = open_store(home.stores["train"])
    flip(Path(home.cache_root) / "logits" / f"{store.manifest.sha256[:32]}-0" / "logits.npy")
    flip(prepare(home.recipe.data, Path(home.cache_root)).test.files[0])
    told = io.StringIO()
    with forked_cohorts():
        akd_dist.train_students(
            home.few, run_root=str(tmp_path / "runs"), console=Console(file=told, width=1000), **home.places(tmp_path)
        )
    assert home.has_weights(tmp_path / "runs" / "fleet")
    lines = [line for line in told.getvalue().splitlines() if "made anew" in line]
    assert any("logits.npy is no longer what was written there" in line for line in lines)
