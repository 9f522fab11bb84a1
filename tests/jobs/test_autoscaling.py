"""Clusters that grow: what waits is asked for, waited for, and not asked for any more once it is over."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from akd_dist.base.errors import RecipeError
from akd_dist.jobs import cluster as clusters, demand as demands, ray_internals
from akd_dist.jobs.demand import MOST, Demand
from akd_dist.jobs.packing import Node, ResourceRequest, fits, with_more
from akd_dist.options import CacheOptions
from tests.autoscaled import Autoscaled, autoscaled
from tests.fleets import HARD, a_recipe, a_student

ONE = ResourceRequest(1, 1)
CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


class Scaler:
    """An autoscaler that can have so many nodes, each with a CPU and as much memory; it answers at once."""

    def __init__(self, nodes: int, memory: float) -> None:
        self.nodes, self.memory = nodes, memory
        self.bundles: list[dict[str, float]] = []
        self.asked: list[int] = []
        self.version = 0

    def request(self, bundles: list[dict[str, float]], _selector: dict[str, str]) -> None:
        self.bundles = bundles
        self.asked.append(len(bundles))

    def says(self) -> ray_internals.Autoscaling:
        self.version += 1
        held = all(one["CPU"] <= 1 and one.get("memory", 0) <= self.memory for one in self.bundles)
        asked = ray_internals.shapes_of(self.bundles)
        infeasible = len(self.bundles) > self.nodes or not held
        return ray_internals.Autoscaling(asked, self.version, self.version, infeasible)


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> Scaler:
    made = Scaler(nodes=5, memory=100)
    monkeypatch.setattr(ray_internals, "has_autoscaler", lambda: True)
    monkeypatch.setattr(ray_internals, "request", made.request)
    monkeypatch.setattr(ray_internals, "autoscaling", made.says)
    monkeypatch.setattr(clusters, "started_here", lambda: False)
    monkeypatch.setattr(clusters.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(demands, "ASK_SECONDS", 0.0)
    return made


def test_as_much_is_asked_for_as_can_be_had(scaler: Scaler) -> None:
    with Demand() as demand:
        for _ in range(20):
            demand.ask([ONE] * 1000, {})
        assert scaler.asked[0] == MOST
        assert scaler.asked[-1] == scaler.nodes
        assert len(scaler.asked) < 12, "halved, not tried one by one"
        demand.ask([ONE] * 2, {})
        assert scaler.asked[-1] == 2
        assert not demand.refused
    assert scaler.bundles == []


def test_what_no_node_holds_is_refused_and_nothing_is_asked_for_afterwards(scaler: Scaler) -> None:
    with Demand() as demand:
        said = []
        for ask in [ResourceRequest(1, 2)] * 20 + [ONE]:
            demand.ask([ask, ONE], {})
            said.append(demand.refused)
        assert said[-2:] == [True, False], "the last is another question"
        assert scaler.bundles == [{"CPU": 1}] * 2
    assert scaler.bundles == []


def test_nodes_that_say_nothing_of_memory_are_asked_for_without(scaler: Scaler) -> None:
    large = ResourceRequest(1, 1, memory=1000)
    with Demand() as demand:
        for _ in range(20):
            demand.ask([large] * 3, {})
        assert demand.bare
        assert not demand.refused
        assert scaler.bundles == [{"CPU": 1}] * 3


def test_somebody_else_s_request_is_replaced_again(scaler: Scaler) -> None:
    with Demand() as demand:
        demand.ask([ONE], {})
        demand.ask([ONE], {})
        assert scaler.asked == [1]
        scaler.bundles = [{"CPU": 1}] * 3
        demand.ask([ONE], {})
        assert scaler.asked == [1, 1]


def test_who_never_waits_asks_nobody(scaler: Scaler) -> None:
    with Demand(never=True) as demand:
        demand.ask([ONE], {})
        assert not demand.waits
    assert scaler.asked == []


def test_it_is_planned_for_nodes_that_may_come() -> None:
    there = [Node("head", 0), Node("small", 1, memory=8), Node("large", 16, memory=64)]
    more = with_more(there, ResourceRequest(1, 1, memory=1), 2)
    assert [(node.cpus, node.memory) for node in more[3:]] == [(1, 8)] * 2
    assert fits(with_more(there, ResourceRequest(2, 32, gpus=1), 2), ResourceRequest(2, 32, gpus=1))


def test_waiting_for_nodes_takes_a_cluster_that_nodes_join() -> None:
    with pytest.raises(RecipeError, match="--wait-for-nodes without --address"):
        _ = CacheOptions(recipe="r.yaml", wait_for_nodes=True).patient
    assert CacheOptions(recipe="r.yaml", wait_for_nodes=True, address="auto").patient


# ---- with Ray's own autoscaler


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    """Node types of the shape of `cluster.yaml`, but small; and one whose nodes do not come up."""
    shipped = YAML(typ="safe", pure=True).load(CLUSTER)
    head, worker = (shipped["available_node_types"][name] for name in ("head", "worker"))
    assert worker["min_workers"] == 0
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    types = {
        "worker": worker | {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 2},
        "late": {"resources": {"CPU": 32, "memory": 10**9}, "max_workers": 1},
    }
    with autoscaled(folder, types, head=head["resources"], most=3, idle_minutes=0.5) as made:
        yield made
    shutil.rmtree(folder, ignore_errors=True)


def command(cluster: Autoscaled, root: Path, verb: str, *options: str) -> list[str]:
    students = [a_student("one", objective=HARD), a_student("two", seed=1)]
    (root / "recipe.yaml").write_text(a_recipe(students).to_yaml())
    roots = ["--store-root", str(root / "stores"), "--cache-root", str(root / "cache")]
    roots += ["--run-root", str(root / "runs")] if verb == "train-students" else []
    words = [sys.executable, "-W", "ignore", "-m", "akd_dist", verb, str(root / "recipe.yaml")]
    return [*words, "--address", cluster.address, *roots, *options]


def run(cluster: Autoscaled, words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words, env=cluster.environment, capture_output=True, text=True, check=False, timeout=900, cwd="/"
    )
    assert "Traceback" not in done.stderr
    return done


def asked_for(cluster: Autoscaled) -> int:
    return int(cluster.ask("sum(ray_internals.autoscaling().asked.values())"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_from_a_head_without_cpus_to_trained_students_and_back_to_no_workers(
    cluster: Autoscaled, tmp_path: Path
) -> None:
    assert cluster.ask("ray.get(ray.remote(num_cpus=1)(lambda: 7).remote())") == 7, "a control: the provider works"
    assert cluster.ask("ray_internals.has_autoscaler()")
    cluster.until(lambda: cluster.workers() == 0, "its node has gone again")

    planned = run(cluster, command(cluster, tmp_path, "train-students", "--dry-run", "--json"))
    assert planned.returncode == 0, planned.stderr
    document = json.loads(planned.stdout)
    assert document["cpus"] == 0
    assert "1 CPU" in document["waits_for"]
    assert (cluster.workers(), asked_for(cluster)) == (0, 0), "a dry run brings no node"

    trained = run(cluster, command(cluster, tmp_path, "train-students", "--json"))
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("waiting for nodes, for the teacher: 1 CPU on one node") == 1, trained.stderr
    fleet = json.loads(trained.stdout)
    assert [student["state"] for student in fleet["students"]] == ["done", "done"]
    assert (Path(fleet["store"]) / "manifest.json").exists()
    assert asked_for(cluster) == 0
    cluster.until(lambda: cluster.workers() == 0, "no worker is left")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_no_node_type_holds_is_refused(cluster: Autoscaled, tmp_path: Path) -> None:
    words = command(cluster, tmp_path, "cache-teacher", "--set", "teacher.train.threads=64", "--json")
    refused = run(cluster, words)
    assert refused.returncode == 6, refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert "no node that the cluster's autoscaler may bring holds the teacher" in error["what"]
    assert error["expected"] == "64 CPUs on one node"
    assert asked_for(cluster) == 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_waits_for_nodes_leaves_at_once(cluster: Autoscaled, tmp_path: Path, number: int, code: int) -> None:
    words = command(cluster, tmp_path, "cache-teacher", "--set", "teacher.train.threads=32", "--json")
    with (tmp_path / "told").open("w+") as told:
        process = subprocess.Popen(words, env=cluster.environment, stdout=subprocess.PIPE, stderr=told)
        waits = "waiting for nodes, for the teacher: 32 CPUs on one node"
        cluster.until(lambda: waits in (tmp_path / "told").read_text(), "it waits")
        cluster.until(lambda: asked_for(cluster) == 1, "it asks")
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == code, (tmp_path / "told").read_text()
    assert json.loads(out)["error"]["code"] == code
    assert asked_for(cluster) == 0
    assert not list((tmp_path / "stores").rglob("*.claim"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("given", "got"), [({"RAY_AUTH_TOKEN": "a" * 64}, "a token that is not"), (None, "no token")])
def test_a_wrong_token_is_one_message(
    cluster: Autoscaled, tmp_path: Path, given: dict[str, str] | None, got: str
) -> None:
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH_")}
    environment |= {"HOME": str(tmp_path)} | (given or {})
    words = command(cluster, tmp_path, "cache-teacher")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 6, done.stderr
    told = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    assert told[0].startswith("error: the Ray cluster at"), done.stderr
    assert "does not let this user in" in told[0]
    assert got in told[1]
    assert len(told) == 4, "what, got, expected, next; and no line of Ray's"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_secrets_reach_no_log_document_or_process_list(cluster: Autoscaled, tmp_path: Path) -> None:
    """Those of the cluster's environment, after all that this module has run on it, and while it runs a command."""
    secrets = [cluster.environment["RAY_AUTH_TOKEN"], "a-canary-of-aws"]
    environment = cluster.environment | {"AWS_SECRET_ACCESS_KEY": secrets[1], "AWS_SESSION_TOKEN": secrets[1]}
    words = command(cluster, tmp_path, "cache-teacher", "--json")
    seen = set[str]()
    with (tmp_path / "told").open("w+") as told, (tmp_path / "out").open("w+") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=told)
        while process.poll() is None:
            for one in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    seen.add(" ".join(one.cmdline()))
            time.sleep(0.5)
    assert process.returncode == 0, (tmp_path / "told").read_text()
    assert any(cluster.address in line for line in seen), "processes were looked at"
    files = [path for place in (tmp_path, cluster.logs) for path in place.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in secrets:
        assert not [line for line in seen if secret in line]
        assert not [path for path in files if secret.encode() in path.read_bytes()]
