"""Policies and routers by name: one that apexsim knows, or ``module:Name`` of a class of one's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from apexsim.errors import BadInput, InfeasiblePlan, nearest
from apexsim.serving.audit import Audited, AuditedRouter
from apexsim.serving.policies import POLICIES, BatchPolicy
from apexsim.serving.routing import ROUTERS, Router
from apexsim.specs.deployment import Deployment
from apexsim.specs.engine import SchedulerDefaults
from apexsim.specs.slo import SLO
from apexsim.specs.workload import DEADLINE, Requests

_WANTED = {"policy": "give a subclass of BatchPolicy", "router": "give a class with a method choose"}


def policy_class(name: str, *, where: object = None) -> type[BatchPolicy]:
    """The class of a batching policy: one of ``POLICIES``, or a subclass of ``BatchPolicy`` as ``module:Name``."""
    found: type[BatchPolicy] = _class(name, POLICIES, "policy", where)
    if not issubclass(found, BatchPolicy):
        raise BadInput(_WANTED["policy"], where=where, key="policy", got=name)
    return found


def router_class(name: str, *, where: object = None) -> type[Router]:
    """The class of a router: one of ``ROUTERS``, or one with a method ``choose`` as ``module:Name``."""
    found: type[Router] = _class(name, ROUTERS, "router", where)
    if not callable(getattr(found, "choose", None)):
        raise BadInput(_WANTED["router"], where=where, key="router", got=name)
    return found


def check_due(policy: BatchPolicy | type[BatchPolicy], requests: Requests, slo: SLO | None) -> None:
    """Raise BadInput where a policy needs times at which first tokens are due, and nothing says them."""
    if policy.needs_deadline and DEADLINE not in requests.columns and (slo is None or slo.ttft_s is None):
        would_do = f"needs a time at which first tokens are due; give --slo ttft_s=... or a column {DEADLINE}"
        raise BadInput(f"the policy {would_do}", key="policy")


def make_policy(scheduler: SchedulerDefaults) -> BatchPolicy:
    """The batching policy that a scheduler names. One of one's own is audited."""
    policy: BatchPolicy = _built(policy_class(scheduler.policy), "policy", scheduler.policy, scheduler)
    return policy if scheduler.policy in POLICIES else Audited(policy)


def make_router(name: str) -> Router:
    """A router by name. One of one's own is audited."""
    router: Router = _built(router_class(name), "router", name)
    return router if name in ROUTERS else AuditedRouter(router)


def _class(name: str, known: Mapping[str, type], key: str, where: object) -> type[Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in known:
            would_do = f"unknown {key}; {nearest(name, known)}, or give module:Name"
            raise BadInput(would_do, where=where, key=key, got=name)
        return known[name]
    found = _imported(module, attribute, where=where, key=key)
    if not isinstance(found, type):
        raise BadInput(_WANTED[key], where=where, key=key, got=name)
    return found


def check_all_due(deployment: Deployment, requests: Requests, slo: SLO | None) -> None:
    """``check_due`` of the policy of every pool. A plan that cannot be laid out runs none, and has a row saying so."""
    try:
        servers = deployment.servers()
    except InfeasiblePlan:
        return
    for server in servers:
        check_due(policy_class(server.scheduler.policy), requests, slo)


def _imported(module: str, attribute: str, *, where: object, key: str) -> Any:
    """What ``module:attribute`` names; BadInput says why it cannot be had, and where the module was looked for."""
    name = f"{module}:{attribute}"
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise BadInput("give module:Name", where=where, key=key, got=name)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a module of the user's may fail in any way
        absent = isinstance(error, ModuleNotFoundError) and error.name in (module, module.partition(".")[0])
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        said = f"cannot be imported ({why})" + (f"; {_looked_in()}" if absent else "")
        raise BadInput(said, where=where, key=key, got=name) from None
    if not hasattr(loaded, attribute):
        found = {each: value for each, value in vars(loaded).items() if isinstance(value, type)}
        classes = [each for each, value in found.items() if value.__module__ == module]
        would_do = f"{module} has no {attribute}; {nearest(attribute, classes)}"
        raise BadInput(would_do, where=where, key=key, got=name)
    return getattr(loaded, attribute)


def _looked_in() -> str:
    """Where a module that was not found was looked for."""
    if {"", os.getcwd()} & set(sys.path):
        return "looked for in the current folder, PYTHONPATH and installed packages"
    return "looked for in PYTHONPATH and installed packages, not in the current folder"


def _built(found: type[Any], key: str, name: str, *arguments: object) -> Any:
    try:
        return found(*arguments)
    except TypeError as error:
        takes = "the scheduler's settings" if arguments else "nothing"
        raise BadInput(f"cannot be built ({error}); its constructor takes {takes}", key=key, got=name) from None
