"""What every test shares: a home and caches of its own, and one Ray cluster for those that ask for it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from akd_dist.recipe import Recipe


REAL_S3 = os.environ.get("AKD_DIST_TEST_S3")
"""A real server for the tests that need a bucket, as http://KEY:SECRET@HOST:PORT, instead of a mock; read before the
environment is cleared."""


@pytest.fixture(scope="session", autouse=True)
def isolated_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test, nor a process it starts, reads or writes the user's home, caches or credentials."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AKD_", "AWS_", "XDG_", "ZARR_")):
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("AKD_DIST_CACHE", str(home / "cache" / "akd-dist"))
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # Beside other work, workers that give way to it take many times as long, and longer than Ray waits for them.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_agent_register_timeout_ms", "600000")
        patch.setenv("RAY_worker_register_timeout_seconds", "600")
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
        yield home


@pytest.fixture(autouse=True)
def forgotten_code(isolated_home: Path) -> Iterator[None]:
    """Modules that a test, or a fixture of it, had imported from its folder are forgotten: another's may have the same
    name.
    """
    yield
    tests = str(isolated_home.parent)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(tests):
            del sys.modules[name]
    sys.path[:] = [place for place in sys.path if not place.startswith(tests)]


_probed: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def probed_once() -> Iterator[None]:
    """Of students that are alike, one is probed in a session: each command would start a process that imports torch.
    And however long that takes, each is probed.
    """
    probing = sys.modules.get("akd_dist.jobs.planning.probing")
    if probing is None:  # no test module plans a fleet
        yield
        return
    probe = probing.Prober.probe
    # Beside other work the first probes may take all the time that probes are given, and the last would be estimated.
    patch = pytest.MonkeyPatch()
    patch.setattr(probing, "ALL_SECONDS", 3600.0)

    def once(prober: Any, spec: Any) -> Any:
        key = json.dumps([prober.job["data"], prober.job["device"], prober.job["stacked"], probing.probe_key(spec)])
        if "custom" in key:  # code of another folder is other code
            key += json.dumps(prober.job["trusted"])
        if _probed.get(key) is None:
            _probed[key] = probe(prober, spec)
        return _probed[key]

    patch.setattr(probing.Prober, "probe", once)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors on one thread: several wait for each other where a machine has other work too."""
    import torch  # here, as most tests need none

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_cluster(isolated_home: Path) -> Iterator[None]:
    """One Ray for the whole session, started by the first test that needs it; four logical CPUs on any machine."""

    from akd_dist.jobs.cluster import connect, shut_down

    connect(None, num_cpus=4)
    yield
    shut_down()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of a module share: a teacher, its stores, a cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def stores(recipe: Recipe, home: Path) -> dict[str, str]:
    """The stores of a module's own `recipe`, of a teacher with random weights."""
    from tests.fleets import a_teacher, stores_of

    return stores_of(recipe, a_teacher(recipe, home / "teacher", home / "cache"), home)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket on a server of this machine, and the AWS_* environment that leads there."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        server = urlsplit(REAL_S3 or stack.enter_context(mock_s3()))
        patch.setenv("AWS_ENDPOINT_URL", f"{server.scheme}://{server.hostname}:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", str(server.username))
        patch.setenv("AWS_SECRET_ACCESS_KEY", str(server.password))
        patch.setenv("AWS_REGION", "us-east-1")
        import boto3  # comes with moto

        client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
        client.create_bucket(Bucket=(name := f"akd-{secrets.token_hex(6)}"))
        yield f"s3://{name}"


@contextlib.contextmanager
def mock_s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://test:canary-secret@127.0.0.1:{port}"
    server.stop()
