"""What the manifests in deploy/kuberay may consist of: the part of KubeRay's API that they use, and nothing beside it.

KubeRay's own schemas, where they are at hand, know every field. This is stricter: a key that is not here is a mistake,
or has to be added here together with its reason.
"""

# ruff: noqa: N815  -- keys are named as KubeRay names them

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
ResourceName = Literal["cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"]


class Strict(BaseModel):
    """Types as YAML has them, and no other keys."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Named(Strict):
    name: Name
    optional: bool = False


class Metadata(Strict):
    name: Name


class Resources(Strict):
    limits: dict[ResourceName, Quantity]
    requests: dict[ResourceName, Quantity]


class Capabilities(Strict):
    drop: list[Literal["ALL"]] = Field(min_length=1)


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class Confined(Strict):
    """What Kubernetes asks of a container in a namespace with restricted pods."""

    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities
    seccompProfile: Seccomp


class User(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: int = Field(gt=0)
    runAsGroup: int = Field(gt=0)
    fsGroup: int = Field(gt=0)


class Variable(Strict):
    """With its value in the manifest: what is secret comes by `envFrom`."""

    name: Annotated[str, StringConstraints(pattern="^(AKD_DIST|RAY_JOB)_[A-Z_]+$")]
    value: str


class FromSecret(Strict):
    secretRef: Named


class Port(Strict):
    containerPort: int = Field(gt=0, lt=65536)
    name: Name


class Mount(Strict):
    name: Name
    mountPath: Annotated[str, StringConstraints(pattern="^/")]
    readOnly: bool = False


class Container(Strict):
    name: Name
    image: str
    securityContext: Confined
    resources: Resources
    env: list[Variable]
    envFrom: list[FromSecret]
    ports: list[Port] = []
    volumeMounts: list[Mount]


class EmptyDir(Strict):
    sizeLimit: Quantity


class Volume(Strict):
    """A pod's own disk, or a recipe that each pod gets a copy of: none of these is shared and written."""

    name: Name
    emptyDir: EmptyDir | None = None
    configMap: Named | None = None


class Toleration(Strict):
    key: Literal["nvidia.com/gpu"]
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class PodSpec(Strict):
    restartPolicy: Literal["Never"]
    securityContext: User
    tolerations: list[Toleration] = []
    containers: list[Container] = Field(min_length=1, max_length=1)
    volumes: list[Volume]


class Pod(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP"]
    rayStartParams: dict[str, str]
    template: Pod


class WorkerGroup(Strict):
    groupName: Name
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    rayStartParams: dict[str, str]
    template: Pod


class Auth(Strict):
    mode: Literal["token"]


class Autoscaler(Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: int = Field(gt=0)
    resources: Resources
    securityContext: Confined


class ClusterSpec(Strict):
    rayVersion: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: Auth
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Strict):
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: int = Field(ge=0)
    rayClusterSpec: ClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
