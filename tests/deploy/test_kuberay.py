"""The manifests in deploy/kuberay: as KubeRay's own schemas have them, where these are at hand; and their promises."""

from __future__ import annotations

import copy
import functools
import json
import shlex
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from pydantic import ByteSize, TypeAdapter, ValidationError
from ruamel.yaml import YAML

from akd_dist.cli import cli
from tests.deploy.manifests import RayCluster, RayJob

ROOT = Path(__file__).parents[2]
# The OpenAPI schemas out of KubeRay's CRDs, beside the repository. They say nothing of unknown keys, which a Kubernetes
# API server refuses: `closed` adds that.
SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay"
KINDS: dict[str, type[RayCluster | RayJob]] = {"raycluster": RayCluster, "rayjob": RayJob}


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "deploy" / "kuberay" / f"{name}.yaml")
    return loaded


def cluster(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster of either kind."""
    spec: dict[str, Any] = document["spec"]
    inner: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return inner


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    found = cluster(manifest(name))
    yield "head", found["headGroupSpec"]["template"]["spec"]
    for group in found["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def closed(schema: Any) -> Any:
    """The schema with every object that lists its properties closed against others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def kuberay(name: str) -> Any:
    path = SCHEMAS / f"{name}.v1.schema.json"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not in {SCHEMAS}")
    return jsonschema.Draft202012Validator(closed(json.loads(path.read_text())))


def check_by_kuberay(name: str, document: Any) -> None:
    kuberay(name).validate(document)


def misspelt(document: dict[str, Any]) -> None:
    document["spec"]["shutDown"] = True


def foreign_mode(document: dict[str, Any]) -> None:
    cluster(document)["authOptions"]["mode"] = "password"


def deep_key(document: dict[str, Any]) -> None:
    cluster(document)["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []


def text_for_a_number(document: dict[str, Any]) -> None:
    cluster(document)["workerGroupSpecs"][0]["replicas"] = "two"


def no_head(document: dict[str, Any]) -> None:
    del cluster(document)["headGroupSpec"]


MISTAKES = [misspelt, foreign_mode, deep_key, text_for_a_number, no_head]


@pytest.mark.parametrize("name", KINDS)
def test_kuberay_accepts_it(name: str) -> None:
    check_by_kuberay(name, manifest(name))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_kuberay_would_refuse_a_mistake(mistake: Callable[[dict[str, Any]], None], name: str) -> None:
    document = copy.deepcopy(manifest(name))
    mistake(document)
    with pytest.raises(jsonschema.ValidationError):
        check_by_kuberay(name, document)


@pytest.mark.parametrize("name", KINDS)
def test_it_has_only_what_it_needs(name: str) -> None:
    KINDS[name].model_validate(manifest(name))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_our_own_schema_refuses_mistakes_too(mistake: Callable[[dict[str, Any]], None], name: str) -> None:
    document = copy.deepcopy(manifest(name))
    mistake(document)
    with pytest.raises(ValidationError):
        KINDS[name].model_validate(document)


@pytest.mark.parametrize("name", KINDS)
def test_every_pod_takes_the_same_image_of_this_version_and_says_what_it_needs(name: str) -> None:
    images = set()
    for _, pod in pods(name):
        (container,) = pod["containers"]
        images.add(container["image"])
        resources = container["resources"]
        assert resources["limits"] == resources["requests"], "Ray plans with the limits, Kubernetes with the requests"
        assert {"cpu", "memory", "ephemeral-storage"} <= resources["limits"].keys()
    assert images == {f"REGISTRY/akd-dist:{version('akd-dist')}"}
    assert cluster(manifest(name))["rayVersion"] == version("ray")


@pytest.mark.parametrize("name", KINDS)
def test_pods_run_as_the_user_of_the_image_and_write_into_its_cache(name: str) -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    (user,) = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")]
    for _, pod in pods(name):
        context, (container,) = pod["securityContext"], pod["containers"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
        assert context["fsGroup"] == context["runAsGroup"]
        (mounted,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/cache"]
        assert any(volume["name"] == mounted and "emptyDir" in volume for volume in pod["volumes"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_cache_stays_within_the_disk_that_a_pod_asks_for() -> None:
    size = TypeAdapter(ByteSize).validate_python
    for _, pod in pods("raycluster"):
        (container,) = pod["containers"]
        (budget,) = [one["value"] for one in container["env"] if one["name"] == "AKD_DIST_CACHE_BUDGET"]
        limit = pod["volumes"][0]["emptyDir"]["sizeLimit"]
        asked = container["resources"]["requests"]["ephemeral-storage"]
        assert size(budget) < size(f"{limit}B") < size(f"{asked}B")


@pytest.mark.parametrize("name", KINDS)
def test_gpus_are_asked_for_by_one_group_and_cpus_are_there_from_the_start(name: str) -> None:
    asking = {group: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group, pod in pods(name)}
    assert asking == {"head": None, "cpu": None, "gpu": "1"}
    for group in cluster(manifest(name))["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert ("tolerations" in group["template"]["spec"]) == (group["groupName"] == "gpu")


def test_the_job_is_a_command_and_its_cluster_the_other_manifest_with_the_recipe() -> None:
    program, name, *words = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert program == "akd-dist"
    command = cli.commands[name]
    context = command.make_context(name, list(words), resilient_parsing=False)
    assert isinstance(context, click.Context)
    assert context.params["address"] == "auto"
    assert context.params["store_root"].startswith("s3://")
    assert context.params["run_root"].startswith("s3://")
    recipe = Path(context.params["recipe"])
    job = cluster(manifest("rayjob"))
    for _, pod in pods("rayjob"):
        (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "recipe"]
        assert mount["mountPath"] == str(recipe.parent)
    without = json.loads(
        json.dumps(job)
        .replace(', {"name": "recipe", "mountPath": "/recipes", "readOnly": true}', "")
        .replace(', {"name": "recipe", "configMap": {"name": "akd-dist-recipe"}}', "")
    )
    assert without == cluster(manifest("raycluster"))
