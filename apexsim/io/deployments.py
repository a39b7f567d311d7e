"""Deployments as YAML: the flags of ``apexsim simulate`` in a file; ``apexsim search`` writes one as ``best.yaml``.

model: llama-3.1-70b        # catalog name, or the path of a model YAML
device: h100-sxm
engine: vllm@0.19.0         # a version, or a profile: vllm-v1-async
tensor: 4
replicas: 2
engine_options: {max_num_seqs: 128}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from apexsim import catalog
from apexsim.errors import BadInput, Unsupported
from apexsim.io.clusters import GroupFile, grouped_cluster
from apexsim.io.engines import (
    ALLOW_PLUGINS,
    DEFAULT_ENGINE,
    check_allowed,
    engine_named,
    engine_plugins,
)
from apexsim.io.names import check_catalog, check_known, device_named
from apexsim.io.pools import PoolFile, resolve_pool
from apexsim.io.words import CodeName, Dtype, EngineOptions, outweighing
from apexsim.io.yaml_files import load_spec, write_yaml
from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.cluster import DEVICES_PER_NODE, MAX_DEVICES, Cluster, NodeGroup, Overhead, Trunk
from apexsim.specs.deployment import Bill, Deployment
from apexsim.specs.model import ModelSpec
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.server import Prompts, Server, TokenChoice
from apexsim.units import DTYPE_BYTES


class DeploymentFile(Spec):
    """A deployment by names: what a person writes. ``resolve_deployment`` turns it into whole specs.

    ``nodes`` and ``devices_per_node`` describe the cluster. With neither given the cluster is one node of exactly the
    devices used, or, above 8 devices, as many whole nodes of 8 as hold them. ``bill`` says whose price and power count:
    of the devices ``used``, of every ``node`` that holds them (of 8 devices unless said), or of the whole ``fleet``
    (which must be given). ``engine`` is a profile, ``vllm@0.19.0``, or ``vllm`` for the newest; ``engine_options`` are
    fields of the profile. Without ``weights`` they are as the model was published, and without ``kv_cache`` the
    engine's own default holds.
    ``clock_mhz`` holds the multiprocessors at a lower clock than the highest, ``overhead`` is what servers and building
    draw beside the devices. A cluster of several kinds of nodes has ``groups`` in place of ``nodes``; a ``trunk`` may
    join them. A deployment of several pools has ``pools`` in place of degrees and replicas. ``device`` may be left out
    where every group, or every pool, names its own.
    """

    model: str
    device: str | None = None
    nodes: int | None = Field(None, ge=1, le=MAX_DEVICES)
    devices_per_node: int | None = Field(None, ge=1, le=MAX_DEVICES)
    groups: tuple[GroupFile, ...] = ()
    trunk: Trunk | None = None
    engine: str = DEFAULT_ENGINE
    engine_options: EngineOptions = Field(default_factory=dict)
    tensor: int = Field(1, ge=1)
    attention_data: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    replicas: int = Field(1, ge=1, le=MAX_DEVICES)
    pools: tuple[PoolFile, ...] = ()
    router: CodeName = "round_robin"
    weights: Dtype = None
    moe_weights: Dtype = None
    kv_cache: Dtype = None
    sampling: TokenChoice = "greedy"
    prompts: Prompts = "text"
    bill: Bill = "used"
    clock_mhz: float | None = Field(None, gt=0)
    overhead: Overhead = Overhead()

    @field_validator("groups", "pools")
    @classmethod
    def _lists_something(cls, listed: tuple[Spec, ...]) -> tuple[Spec, ...]:
        if not listed:
            raise ValueError("give at least one, or leave it out")
        return listed

    @property
    def plan(self) -> Plan:
        return Plan(tensor=self.tensor, attention_data=self.attention_data, pipeline=self.pipeline, expert=self.expert)


def read_deployment(path: Path | str) -> DeploymentFile:
    """Read a deployment YAML; a model, device or engine given as a path is looked for beside the file first."""
    file = load_spec(DeploymentFile, Path(path))
    named = {kind: getattr(file, kind) for kind in ("model", "device", "engine")}
    found: dict[str, Any] = {kind: beside(name, path) for kind, name in named.items() if name}
    if file.groups:
        found["groups"] = tuple(
            group.model_copy(update={"device": beside(group.device, path)}) if group.device else group
            for group in file.groups
        )
    if file.pools:
        found["pools"] = tuple(_beside(pool, path, file) for pool in file.pools)
    return file.model_copy(update=found)


def _beside(pool: PoolFile, path: Path | str, file: DeploymentFile) -> PoolFile:
    """A pool whose engine, and device unless it names a group, is looked for beside the file."""
    keys = ("engine",) if file.groups else ("engine", "device")
    named = {key: getattr(pool, key) for key in keys if getattr(pool, key)}
    return pool.model_copy(update={key: beside(name, path) for key, name in named.items()})


def beside(name: str, path: Path | str) -> str:
    """``name`` as the path of a file beside ``path`` where there is one; else unchanged."""
    near = Path(path).parent / name
    return str(near.resolve()) if os.path.isfile(near) else name


def write_deployment(path: Path | str, file: DeploymentFile) -> None:
    """Write a deployment YAML atomically: the plan in full, other keys only where they differ from their default.

    A comment at its head says so where it names code of the user's.
    """
    always = {"model", "engine", *(() if file.pools else ("tensor", "pipeline", "replicas"))}
    given = file.model_dump(exclude_defaults=True).keys() | always
    named = plugins(file.model_dump(include={"router", "engine_options", "pools"}))
    for engine in dict.fromkeys([file.engine, *(pool.engine for pool in file.pools if pool.engine)]):
        named |= engine_plugins(engine)
    names = ", ".join(f"{key} {name}" for key, name in named.items())
    head = f"It runs code of yours ({names}), which apexsim imports with {ALLOW_PLUGINS} only." if names else None
    write_yaml(Path(path), {key: value for key, value in file.model_dump().items() if key in given}, head=head)


def load_deployment(path: Path | str, *, allow_plugins: bool = False) -> Deployment:
    """Read a deployment YAML into a ``Deployment`` whose plan is lawful."""
    return deployment_from(path, {}, allow_plugins=allow_plugins)


def plugins(data: Mapping[str, Any]) -> dict[str, str]:
    """Names of the user's own code (``module:Name``) in keys of a deployment or search: key -> name."""
    named = {"router": data.get("router"), "engine_options.policy": _policy_in(data)}
    named |= {f"pools.{at}.engine_options.policy": _policy_in(pool) for at, pool in enumerate(data.get("pools", ()))}
    return {key: name for key, name in named.items() if isinstance(name, str) and ":" in name}


def _policy_in(data: Mapping[str, Any]) -> object:
    options = data.get("engine_options")
    return options.get("policy") if isinstance(options, Mapping) else None


def check_named_code(written: Mapping[str, Any], choices: Mapping[str, Any], where: object, *, allowed: bool) -> None:
    """Raise BadInput for code named by the keys of a file, where nobody has said that it may be imported.

    Keys that the user's own ``choices`` outweigh do not count.
    """
    replaced = {"router": "router" in choices, "engine_options.policy": "policy" in choices.get("engine_options", {})}
    replaced |= {key: "pools" in choices for key in plugins(written) if key.startswith("pools.")}
    check_allowed({key: name for key, name in plugins(written).items() if not replaced[key]}, where, allowed)


def deployment_from(path: Path | str | None, choices: Mapping[str, Any], *, allow_plugins: bool = False) -> Deployment:
    """The lawful deployment that a YAML file, ``choices`` of its keys, or both describe; choices outweigh the file.

    Code that a file names (``module:Name``) is imported only if ``allow_plugins``; what ``choices`` name, always.
    """
    base = read_deployment(path).model_dump(exclude_unset=True) if path else {}
    check_named_code(base, choices, path, allowed=allow_plugins)
    listed = bool({"groups", "pools"} & choices.keys())  # each may name its device
    for key in () if path else ("model",) if listed else ("model", "device"):
        if key not in choices:
            raise BadInput("give a deployment file, or a model and a device", where=f"--{key}")
    where = path or "deployment"
    options = outweighing(base.get("engine_options", {}), choices.get("engine_options", {}), where)
    file = parse_spec(DeploymentFile, {**base, **choices, "engine_options": options}, where)
    deployment = resolve_deployment(file, where, allow_plugins=allow_plugins)
    check_lawful(deployment, where)
    check_computes(deployment, where)
    return deployment


def resolve_deployment(file: DeploymentFile, where: object, *, allow_plugins: bool = False) -> Deployment:
    """Look every name up; ``BadInput`` at ``where`` on the first that means nothing. Lawfulness is not checked.

    Code that the engine's file names is imported only if ``allow_plugins``; keys of ``file`` are the caller's affair.
    """
    from apexsim.serving.named import router_class

    for key in ("weights", "moe_weights", "kv_cache"):
        check_known(getattr(file, key), DTYPE_BYTES, where, key)
    router_class(file.router, where=where)
    check_catalog("model", file.model, where)
    if file.device:
        check_catalog("device", file.device, where)
    model: ModelSpec = catalog.load("model", file.model)
    engine = engine_named(file.engine, file.engine_options, where, allow_plugins=allow_plugins)
    pools = _pools(file, where, allow_plugins=allow_plugins)
    cluster = _cluster(file, pools, where)
    if len(cluster.groups) > 1 and not file.pools:
        would_do = "give pools, each with the device that it lies on; or one group"
        raise BadInput(would_do, where=where, key="groups", got=len(cluster.groups))
    if not file.groups:
        shared = file.device if len(cluster.groups) > 1 else None
        pools = tuple(_on_its_device(pool, pool.device or shared) for pool in pools)
    known = {
        "model": model,
        "cluster": cluster,
        "engine": engine,
        "pools": pools,
        "router": file.router,
        "weights": file.weights or model.published_dtype,
        "moe_weights": file.moe_weights,
        "sampling": file.sampling,
        "prompts": file.prompts,
        "bill": file.bill,
    }
    deployment = parse_spec(Deployment, known, where)
    weights = (deployment.weights, deployment.expert_dtype)
    device = catalog.load("device", file.device) if file.device else cluster.group(pools[0].device).device
    kv_cache = file.kv_cache or engine.kv_dtype_for(weights, device.datasheet)
    return _with_kv_cache(deployment.model_copy(update={"kv_cache": kv_cache}), own=file.kv_cache is None)


def _pools(file: DeploymentFile, where: object, *, allow_plugins: bool) -> tuple[Pool, ...]:
    if not file.pools:
        return (Pool(plan=file.plan, replicas=file.replicas),)
    if given := file.model_fields_set & {*Plan.model_fields, "replicas"}:
        would_do = "every pool has its own: leave it out, or the pools"
        raise BadInput(would_do, where=where, key=sorted(given)[0])
    return tuple(
        resolve_pool(pool, file.engine, file.engine_options, where, allow_plugins=allow_plugins) for pool in file.pools
    )


def _on_its_device(pool: Pool, device: str | None) -> Pool:
    """A pool on the group that is called as its ``device`` is; None leaves it on the only one."""
    return pool.model_copy(update={"device": catalog.load("device", device).name}) if device else pool


def _with_kv_cache(deployment: Deployment, *, own: bool) -> Deployment:
    """The deployment with the KV dtype of every pool that takes another by itself; none does unless ``own``."""
    pools = []
    for pool in deployment.pools:
        engine, device = pool.engine or deployment.engine, deployment.cluster.group(pool.device).device
        weights = pool.weights or deployment.weights
        experts = pool.moe_weights or deployment.moe_weights or deployment.model.expert_dtype(weights)
        taken = engine.kv_dtype_for((weights, experts), device.datasheet) if own else deployment.kv_cache
        kv_cache = pool.kv_cache or (taken if taken != deployment.kv_cache else None)
        pools.append(pool.model_copy(update={"kv_cache": kv_cache}))
    return deployment.model_copy(update={"pools": tuple(pools)})


def check_computes(deployment: Deployment, where: object) -> None:
    """Raise ``Unsupported`` for weights or experts, given or as published, that the device has no products for.

    A kernel that stands for another's counts as that one.
    """
    from apexsim.costs.experts import stand_in_kernel

    for server in deployment.servers():
        model = server.model
        experts = model.expert_dtypes(server.expert_weights)
        kernels = {stand_in_kernel(server, dtype) or dtype for dtype in experts}
        _check_products(server, "gemm", model.dense_dtypes(server.weights), f"{where}: weights")
        _check_products(server, "moe", kernels, f"{where}: moe_weights")


def _check_products(server: Server, kind: str, dtypes: set[str], where: str) -> None:
    device, model = server.device, server.model
    published = {model.published_dtype, model.expert_dtype(model.published_dtype)} if server.as_published else ()
    known = device.operators.get(kind, {})
    for dtype in sorted(dtypes - known.keys()):
        have = f"{device.name} has no {kind} cost for {dtype}; it has: {', '.join(sorted(known)) or 'none'}"
        said = f"; {model.name} was published in it" if dtype in published else ""
        raise Unsupported(f"{where}: {have}{said}: give another dtype, or another device")


def check_lawful(deployment: Deployment, where: object) -> None:
    """Raise ``BadInput`` with every reason why a plan cannot be laid out, and the tensor degrees that could."""
    cluster, model = deployment.cluster, deployment.model
    for pool in deployment.pools:
        group = cluster.group(pool.device)
        reasons = pool.plan.lawful(model, group)
        if reasons:
            degrees = [t for t in range(1, group.devices_per_node + 1) if _fits(pool.plan, t, model, group)]
            hint = f"; tensor degrees that work: {', '.join(map(str, degrees))}" if degrees else ""
            raise BadInput("; ".join(reasons) + hint, where=where)
    for group in cluster.groups:
        if (used := deployment.used(group)) > group.devices:
            has = group.name if len(cluster.groups) > 1 else "the cluster"
            raise BadInput(f"the replicas use {used} devices, {has} has {group.devices}", where=where)


def _cluster(file: DeploymentFile, pools: tuple[Pool, ...], where: object) -> Cluster:
    """The nodes that a file lists; without a list, those of the devices that its pools use."""
    used = sum(pool.devices for pool in pools)
    if used > MAX_DEVICES:
        degrees = "tensor x attention_data x pipeline x replicas"
        raise BadInput(f"{degrees} may use up to {MAX_DEVICES} devices", where=where, got=used)
    if file.trunk and len(file.groups) < 2:
        raise BadInput("a trunk joins groups of nodes: give two groups or more", where=where, key="trunk")
    if file.groups:
        return _grouped(file, where)
    on = [_device_of(file, pool.device, "pool" if file.pools else None, where) for pool in pools]
    names = list(dict.fromkeys(on))
    sizes = {key: getattr(file, key) for key in ("nodes", "devices_per_node") if getattr(file, key)}
    if len(names) > 1 and (sizes or file.bill == "fleet"):
        key = next(iter(sizes), "bill")
        raise BadInput(f"the pools use {len(names)} kinds of devices: give groups", where=where, key=key)
    groups = [
        _group(file, name, sum(pool.devices for pool, its in zip(pools, on, strict=True) if its == name), where)
        for name in names
    ]
    return parse_spec(Cluster, {"groups": groups, "overhead": file.overhead}, where)


def _device_of(file: DeploymentFile, own: str | None, each: str | None, where: object) -> str:
    """The device of a group or pool (``each``): its ``own``, or else the deployment's."""
    if name := own or file.device:
        return name
    raise BadInput("give it" + (f", or a device in every {each}" if each else ""), where=where, key="device")


def _group(file: DeploymentFile, name: str, used: int, where: object) -> NodeGroup:
    """Nodes of the device called ``name``, ``used`` of them."""
    device = device_named(name, file.clock_mhz, where)
    if file.bill == "fleet" and not (file.nodes or file.devices_per_node):
        would_do = "give nodes and devices_per_node (a search: devices), or bill used or node"
        raise BadInput(would_do, where=where, key="bill", got=file.bill)
    exact = used <= DEVICES_PER_NODE and not file.nodes and file.bill == "used"
    per_node = file.devices_per_node or (used if exact else DEVICES_PER_NODE)
    nodes = file.nodes or -(-used // per_node)
    if nodes * per_node < used:
        have = f"{nodes} x {per_node}"
        raise BadInput(
            f"the replicas use {used} devices, the cluster has {have}", where=where, key="nodes", got=file.nodes
        )
    return NodeGroup(name=device.name, device=device, devices_per_node=per_node, nodes=nodes)


def _grouped(file: DeploymentFile, where: object) -> Cluster:
    for key in ("nodes", "devices_per_node"):
        if getattr(file, key) is not None:
            raise BadInput("every group has its own: leave it out, or the groups", where=where, key=key)
    return grouped_cluster(
        file.groups,
        lambda name: device_named(_device_of(file, name, "group", where), file.clock_mhz, f"{where}: groups"),
        where,
        overhead=file.overhead,
        trunk=file.trunk,
    )


def _fits(plan: Plan, tensor: int, model: ModelSpec, group: NodeGroup) -> bool:
    return not plan.model_copy(update={"tensor": tensor}).lawful(model, group)
