"""`cluster.yaml` as Ray's own launcher reads it, and the promises its comments make about exposure."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe", pure=True).load(CLUSTER)
    return loaded


def start_commands(cluster: dict[str, Any]) -> list[str]:
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_key_it_does_not_know(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="dashboard_host"):
        validate_config(prepare_config(cluster | {"dashboard_host": "127.0.0.1"}))


def test_every_node_starts_with_token_authentication(cluster: dict[str, Any]) -> None:
    commands = start_commands(cluster)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.split(";")[-1])
        assert words[:3] == ["RAY_AUTH_MODE=token", "ray", "start"]
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]", CLUSTER.read_text())


def test_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    hosts = [word for command in start_commands(cluster) for word in shlex.split(command) if "-host" in word]
    assert hosts == ["--dashboard-host=127.0.0.1"]


def test_no_port_is_opened_beyond_what_the_launcher_opens(cluster: dict[str, Any]) -> None:
    assert "security_group" not in cluster["provider"]
    assert "run_options" not in cluster["docker"]


def test_nodes_run_the_ray_that_is_pinned_here(cluster: dict[str, Any]) -> None:
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{version('ray')}-py311")
