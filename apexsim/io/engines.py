"""Engine profiles with options of their sections by name, and the user's own code that they may name."""

from __future__ import annotations

from collections.abc import Mapping

from apexsim import catalog
from apexsim.errors import BadInput, nearest
from apexsim.io.names import check_catalog
from apexsim.io.words import OPTION_SECTIONS, EngineOption
from apexsim.specs.base import parse_spec
from apexsim.specs.engine import EngineProfile

DEFAULT_ENGINE = "vllm-v1-async"
ALLOW_PLUGINS = "--allow-plugins"


def engine_plugins(engine: str) -> dict[str, str]:
    """Names of the user's own code (``module:Name``) in an engine profile by name or path: key -> name."""
    profile: EngineProfile = catalog.load("engine", engine)
    named = {"scheduler.policy": profile.scheduler.policy}
    named |= {f"changes.{at}.policy": change.policy or "" for at, change in enumerate(profile.changes)}
    return {key: name for key, name in named.items() if ":" in name}


def check_engine(engine: str, *, allowed: bool) -> None:
    """Raise BadInput for code that the profile of an engine names, where nobody has said that it may be imported."""
    check_allowed(engine_plugins(engine), catalog.locate("engine", engine), allowed)


def check_allowed(named: Mapping[str, str], where: object, allowed: bool) -> None:
    """Raise BadInput for code named at ``where``, as key -> name, unless it is allowed to be imported."""
    for key, name in ({} if allowed else named).items():
        would_do = f"the file names code to import; {ALLOW_PLUGINS} lets it (allow_plugins=True in Python)"
        raise BadInput(would_do, where=where, key=key, got=name)


def engine_named(
    name: str, options: Mapping[str, EngineOption], where: object, *, allow_plugins: bool
) -> EngineProfile:
    """The engine of the catalog, or of a YAML file, with these options; code that it names must be allowed."""
    check_catalog("engine", name, where)
    profile: EngineProfile = catalog.load("engine", name)
    if "policy" not in options:
        check_engine(name, allowed=allow_plugins)
    return with_engine_options(profile, options, where)


def with_engine_options(engine: EngineProfile, options: Mapping[str, EngineOption], where: object) -> EngineProfile:
    """The profile with fields of its sections (host, scheduler, memory, communication, ...) replaced by name.

    An option given by hand also holds where the engine would change it by itself.
    """
    from apexsim.serving.named import policy_class

    data = engine.model_dump()
    sections = {key: section for section in OPTION_SECTIONS for key in data[section]}
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
    from apexsim.serving.policies import POLICIES
    from apexsim.serving.routing import ROUTERS

    return {"batching": dict(POLICIES), "router": dict(ROUTERS)}
