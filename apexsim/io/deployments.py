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

from pydantic import Field

from apexsim import catalog
from apexsim.errors import BadInput, Unsupported, nearest
from apexsim.io.clusters import GroupFile, grouped_cluster
from apexsim.io.words import CodeName, Dtype, EngineOption, EngineOptions, outweighing
from apexsim.io.yaml_files import load_spec, write_yaml
from apexsim.specs.base import Spec, parse_spec
from apexsim.specs.cluster import DEVICES_PER_NODE, MAX_DEVICES, Cluster, NodeGroup, Overhead, Trunk
from apexsim.specs.deployment import Bill, Deployment
from apexsim.specs.device import DeviceProfile
from apexsim.specs.engine import EngineProfile
from apexsim.specs.model import ModelSpec
from apexsim.specs.plan import Plan, Pool
from apexsim.specs.server import Prompts, Server, TokenChoice
from apexsim.units import DTYPE_BYTES

DEFAULT_ENGINE = "vllm-v1-async"
ALLOW_PLUGINS = "--allow-plugins"

# Parts of an engine profile whose fields are engine options; no two of them share a field name.
_OPTION_SECTIONS = ("scheduler", "memory", "communication", "host", "sampler", "kernels")


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
    join them.
    """

    model: str
    device: str
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
    router: CodeName = "round_robin"
    weights: Dtype = None
    moe_weights: Dtype = None
    kv_cache: Dtype = None
    sampling: TokenChoice = "greedy"
    prompts: Prompts = "text"
    bill: Bill = "used"
    clock_mhz: float | None = Field(None, gt=0)
    overhead: Overhead = Overhead()

    @property
    def plan(self) -> Plan:
        return Plan(tensor=self.tensor, attention_data=self.attention_data, pipeline=self.pipeline, expert=self.expert)


def read_deployment(path: Path | str) -> DeploymentFile:
    """Read a deployment YAML; a model, device or engine given as a path is looked for beside the file first."""
    file = load_spec(DeploymentFile, Path(path))
    found: dict[str, Any] = {kind: beside(getattr(file, kind), path) for kind in ("model", "device", "engine")}
    if file.groups:
        found["groups"] = tuple(
            group.model_copy(update={"device": beside(group.device, path)}) if group.device else group
            for group in file.groups
        )
    return file.model_copy(update=found)


def beside(name: str, path: Path | str) -> str:
    """``name`` as the path of a file beside ``path`` where there is one; else unchanged."""
    near = Path(path).parent / name
    return str(near.resolve()) if os.path.isfile(near) else name


def write_deployment(path: Path | str, file: DeploymentFile) -> None:
    """Write a deployment YAML atomically: the plan in full, other keys only where they differ from their default.

    A comment at its head says so where it names code of the user's.
    """
    always = {"model", "device", "engine", "tensor", "pipeline", "replicas"}
    given = file.model_dump(exclude_defaults=True).keys() | always
    named = plugins({"router": file.router, "engine_options": file.engine_options}) | engine_plugins(file.engine)
    names = ", ".join(f"{key} {name}" for key, name in named.items())
    head = f"It runs code of yours ({names}), which apexsim imports with {ALLOW_PLUGINS} only." if names else None
    write_yaml(Path(path), {key: value for key, value in file.model_dump().items() if key in given}, head=head)


def load_deployment(path: Path | str, *, allow_plugins: bool = False) -> Deployment:
    """Read a deployment YAML into a ``Deployment`` whose plan is lawful."""
    return deployment_from(path, {}, allow_plugins=allow_plugins)


def plugins(data: Mapping[str, Any]) -> dict[str, str]:
    """Names of the user's own code (``module:Name``) in keys of a deployment or search: key -> name."""
    options = data.get("engine_options")
    policy = options.get("policy") if isinstance(options, Mapping) else None
    named = {"router": data.get("router"), "engine_options.policy": policy}
    return {key: name for key, name in named.items() if isinstance(name, str) and ":" in name}


def engine_plugins(engine: str) -> dict[str, str]:
    """The same for an engine profile by name or path."""
    profile: EngineProfile = catalog.load("engine", engine)
    named = {"scheduler.policy": profile.scheduler.policy}
    named |= {f"changes.{at}.policy": change.policy or "" for at, change in enumerate(profile.changes)}
    return {key: name for key, name in named.items() if ":" in name}


def check_named_code(written: Mapping[str, Any], choices: Mapping[str, Any], where: object, *, allowed: bool) -> None:
    """Raise BadInput for code named by the keys of a file, where nobody has said that it may be imported.

    Keys that the user's own ``choices`` outweigh do not count.
    """
    replaced = {"router": "router" in choices, "engine_options.policy": "policy" in choices.get("engine_options", {})}
    _check_allowed({key: name for key, name in plugins(written).items() if not replaced[key]}, where, allowed)


def check_engine(engine: str, *, allowed: bool) -> None:
    """The same for the profile of an engine, by name or path."""
    _check_allowed(engine_plugins(engine), catalog.locate("engine", engine), allowed)


def _check_allowed(named: Mapping[str, str], where: object, allowed: bool) -> None:
    for key, name in ({} if allowed else named).items():
        would_do = f"the file names code to import; {ALLOW_PLUGINS} lets it (allow_plugins=True in Python)"
        raise BadInput(would_do, where=where, key=key, got=name)


def deployment_from(path: Path | str | None, choices: Mapping[str, Any], *, allow_plugins: bool = False) -> Deployment:
    """The lawful deployment that a YAML file, ``choices`` of its keys, or both describe; choices outweigh the file.

    Code that a file names (``module:Name``) is imported only if ``allow_plugins``; what ``choices`` name, always.
    """
    base = read_deployment(path).model_dump(exclude_unset=True) if path else {}
    check_named_code(base, choices, path, allowed=allow_plugins)
    for key in ("model", "device"):
        if key not in {**base, **choices}:
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
        _check_known(getattr(file, key), DTYPE_BYTES, where, key)
    router_class(file.router, where=where)
    _check_catalog("model", file.model, where)
    device = _device(file, where)
    _check_catalog("engine", file.engine, where)
    engine: EngineProfile = catalog.load("engine", file.engine)
    if "policy" not in file.engine_options:
        check_engine(file.engine, allowed=allow_plugins)
    model: ModelSpec = catalog.load("model", file.model)
    deployment = Deployment(
        model=model,
        cluster=_cluster(file, device, where),
        engine=with_engine_options(engine, file.engine_options, where),
        pools=(Pool(plan=file.plan, replicas=file.replicas),),
        router=file.router,
        weights=file.weights or model.published_dtype,
        moe_weights=file.moe_weights,
        sampling=file.sampling,
        prompts=file.prompts,
        bill=file.bill,
    )
    weights = (deployment.weights, deployment.expert_dtype)
    kv_cache = file.kv_cache or engine.kv_dtype_for(weights, device.datasheet)
    return deployment.model_copy(update={"kv_cache": kv_cache})


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
    if deployment.devices_used > cluster.devices:
        raise BadInput(
            f"the replicas use {deployment.devices_used} devices, the cluster has {cluster.devices}", where=where
        )


def with_engine_options(engine: EngineProfile, options: Mapping[str, EngineOption], where: object) -> EngineProfile:
    """The profile with fields of its sections (host, scheduler, memory, communication, ...) replaced by name.

    An option given by hand also holds where the engine would change it by itself.
    """
    from apexsim.serving.named import policy_class

    data = engine.model_dump()
    sections = {key: section for section in _OPTION_SECTIONS for key in data[section]}
    for key, value in options.items():
        if key not in sections:
            raise BadInput(f"unknown engine option; {nearest(key, sections)}", where=where, got=key)
        data[sections[key]][key] = value
        for change in data["changes"]:
            change.pop(key, None)
    data["given"] = tuple(sorted({*data["given"], *options}))
    profile = parse_spec(EngineProfile, data, where)
    policy_class(profile.scheduler.policy, where=where)
    return profile


def policy_classes() -> dict[str, dict[str, type]]:
    """The batching policies and routers that a deployment can ask for, by kind and name."""
    from apexsim.serving.batching import POLICIES
    from apexsim.serving.routing import ROUTERS

    return {"batching": dict(POLICIES), "router": dict(ROUTERS)}


def _cluster(file: DeploymentFile, device: DeviceProfile, where: object) -> Cluster:
    used = file.plan.devices * file.replicas
    if used > MAX_DEVICES:
        degrees = "tensor x attention_data x pipeline x replicas"
        raise BadInput(f"{degrees} may use up to {MAX_DEVICES} devices", where=where, got=used)
    if file.groups:
        return _grouped(file, where)
    if file.trunk:
        raise BadInput("a trunk joins groups of nodes: give groups", where=where, key="trunk")
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
    group = NodeGroup(name=device.name, device=device, devices_per_node=per_node, nodes=nodes)
    return Cluster(groups=(group,), overhead=file.overhead)


def _grouped(file: DeploymentFile, where: object) -> Cluster:
    for key in ("nodes", "devices_per_node"):
        if getattr(file, key) is not None:
            raise BadInput("every group has its own: leave it out, or the groups", where=where, key=key)
    return grouped_cluster(
        file.groups,
        lambda name: _device(file if name is None else file.model_copy(update={"device": name}), f"{where}: groups"),
        where,
        overhead=file.overhead,
        trunk=file.trunk,
    )


def _device(file: DeploymentFile, where: object) -> DeviceProfile:
    """The device that a file names, at its clock."""
    _check_catalog("device", file.device, where)
    return _clocked(catalog.load("device", file.device), file.clock_mhz, where)


def _clocked(device: DeviceProfile, clock_mhz: float | None, where: object) -> DeviceProfile:
    """The device at a clock; as it was measured for None and at its highest clock."""
    clock = device.power.clock
    if clock_mhz is None or (clock and clock_mhz == clock.nominal_mhz):
        return device
    if clock is None or clock_mhz > clock.nominal_mhz:
        would_do = f"give at most {clock.nominal_mhz:g}" if clock else f"no clocks of {device.name} are known"
        raise BadInput(would_do, where=where, key="clock_mhz", got=clock_mhz)
    return device.at_clock(clock_mhz)


def _fits(plan: Plan, tensor: int, model: ModelSpec, group: NodeGroup) -> bool:
    return not plan.model_copy(update={"tensor": tensor}).lawful(model, group)


def _check_catalog(kind: catalog.Kind, name: str, where: object) -> None:
    """Unknown names and absent files are told with the file and key they stand in."""
    # A publisher's name of a model has a slash, too.
    if not name.endswith((".yaml", ".yml")) and ("/" not in name or (kind == "model" and not os.path.lexists(name))):
        catalog.locate(kind, name, where=f"{where}: {kind}")
    elif not os.path.lexists(name):
        raise BadInput("no such file; give a name, or the path of a YAML file", where=where, key=kind, got=name)


def _check_known(name: str | None, known: Mapping[str, object] | tuple[str, ...], where: object, key: str) -> None:
    if name is not None and name not in known:
        raise BadInput(nearest(name, known), where=where, key=key, got=name)
