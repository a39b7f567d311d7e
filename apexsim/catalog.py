"""The specs that ship with apexsim, by kind and name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, overload

from packaging.utils import canonicalize_name
from packaging.version import Version

from apexsim.costs.profile_check import check_profile
from apexsim.errors import BadInput, nearest
from apexsim.io.model_ids import published_names, shipped_name
from apexsim.io.yaml_files import load_spec
from apexsim.specs.base import Spec
from apexsim.specs.device import DeviceProfile
from apexsim.specs.engine import EngineProfile
from apexsim.specs.model import ModelSpec
from apexsim.specs.workload import Workload
from apexsim.versions import begins, version_in

Kind = Literal["model", "device", "engine", "workload"]

FOLDERS: dict[Kind, str] = {
    "model": "model_specs",
    "device": "device_profiles",
    "engine": "engine_profiles",
    "workload": "workloads",
}
_CLASSES: dict[Kind, type[Spec]] = {
    "model": ModelSpec,
    "device": DeviceProfile,
    "engine": EngineProfile,
    "workload": Workload,
}


def data_root() -> Path:
    """The folder that holds the data folders: inside an installed package, else the top of the checkout."""
    package = Path(str(resources.files("apexsim")))
    for root in (package / "_data", package.parent):
        if (root / FOLDERS["model"]).is_dir():
            return root
    raise BadInput("the data folders are missing; install apexsim again", where=package)


def names(kind: Kind) -> tuple[str, ...]:
    """Names of every shipped spec of a kind, sorted."""
    return tuple(sorted(path.stem for path in (data_root() / FOLDERS[kind]).glob("*.yaml")))


@overload
def load(kind: Literal["model"], name: str | os.PathLike[str]) -> ModelSpec: ...
@overload
def load(kind: Literal["device"], name: str | os.PathLike[str]) -> DeviceProfile: ...
@overload
def load(kind: Literal["engine"], name: str | os.PathLike[str]) -> EngineProfile: ...
@overload
def load(kind: Literal["workload"], name: str | os.PathLike[str]) -> Workload: ...
def load(kind: Kind, name: str | os.PathLike[str]) -> Spec:
    """A shipped spec by name, or the spec in a YAML file by path (with a separator, or ending in .yaml or .yml).

    A model may be named as its publisher does (``meta-llama/Llama-3.1-70B-Instruct``). An engine may be named by its
    version (``vllm@0.11.1``, as pip does ``vllm==0.11.1``, or ``vllm-0.11.1``), whose memory terms then hold, or alone
    (``vllm``): then its newest profile answers.
    Raises BadInput for an unknown name, with the nearest known ones, and for whatever is wrong in the file.
    """
    path = locate(kind, name)
    spec = _parsed(_CLASSES[kind], path, path.stat().st_mtime_ns if os.path.isfile(path) else None)
    text = os.fspath(name)
    if not isinstance(spec, EngineProfile) or _is_path(text) or text == path.stem:
        return spec
    engine, version = _engine_and_version(text)
    listed = _listed(engine)
    return spec.for_version(version if any(begins(version, each) for each in listed) else _newest(listed))


@cache
def _parsed(cls: type[Spec], path: Path, modified_ns: int | None) -> Spec:
    """A file is parsed once while it stays as it is: a sweep asks for the same few again and again."""
    spec = load_spec(cls, path)
    if isinstance(spec, DeviceProfile):
        check_profile(spec, path)
    return spec


def locate(kind: Kind, name: str | os.PathLike[str], where: object = None) -> Path:
    """The file behind a name or path; BadInput at ``where`` with the nearest names where a name is unknown."""
    text, known = os.fspath(name), names(kind)
    if kind == "model" and text not in known and not _is_file(text):
        text = shipped_name(text, _published()) or text
    if _is_path(text):
        return Path(text)
    if kind == "engine" and text not in known:
        text = _profile_of(text, where) or text
    if text not in known:
        raise BadInput(f"unknown {kind}; {nearest(text, known)}", where=where or kind, got=text)
    return data_root() / FOLDERS[kind] / f"{text}.yaml"


@cache
def _published() -> dict[str, str]:
    """Shipped models by the names that their publishers gave them."""
    shipped = [load("model", data_root() / FOLDERS["model"] / f"{name}.yaml") for name in names("model")]
    return {key: spec.name for spec in shipped for key in published_names(spec.name, spec.source)}


def _is_file(text: str) -> bool:
    """Whether a name is the path of a file: one that is there, or by its ending."""
    return text.endswith((".yaml", ".yml")) or (os.sep in text and Path(text).exists())


def _is_path(text: str) -> bool:
    """Whether a name of a spec is the path of its file."""
    return os.sep in text or text.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class EngineChoice:
    """The profile that answers for an engine version. ``mapped`` is False where no profile names the version.

    ``name`` is what ``load`` takes for it: with the version where that is listed (``vllm@0.8.5``).
    """

    profile: str
    mapped: bool
    note: str
    name: str


def engine_for(engine: str, version: str = "") -> EngineChoice:
    """Map an engine (``vllm``) and its version (``0.11.1``) to a profile, by the longest version prefix listed.

    The path of a profile answers for any version.

    A version that says nothing (empty, nightly, dev), or is newer than every listed one, takes the engine's newest
    profile: ``mapped`` is then False and ``note`` says so. Raises BadInput for an unknown engine or an older version.
    """
    if _is_path(engine):
        return EngineChoice(engine, True, f"{engine} is an engine profile", engine)
    listed = _listed(engine)
    if not listed:
        known = {profile.engine for profile in _profiles()}
        raise BadInput(f"unknown engine; {nearest(engine, known)}", where="engine", got=engine)
    matches = [prefix for prefix in listed if begins(version, prefix)]
    if matches:
        best = max(matches, key=len)
        return EngineChoice(listed[best], True, f"{engine} {version} is listed as {best}", f"{engine}@{version}")
    newest, asked = _newest(listed), version_in(version)
    if asked is None or asked.release > Version(newest).release:
        note = f"{engine} {version or 'of unknown version'} is not listed: its newest profile ({newest}) answers"
        return EngineChoice(listed[newest], False, note, engine)
    raise BadInput(f"no profile lists it; known: {_versions(listed)}", where=engine, got=version)


def _profile_of(text: str, where: object) -> str | None:
    """The profile of an engine's version, or of its newest; None where ``text`` names neither.

    A number beyond the listed ones is refused: who wants the newest profile for it says so by the engine's name alone.
    """
    engine, version = _engine_and_version(text, where)
    listed = _listed(engine)
    if not version and not listed:
        return None
    try:
        choice = engine_for(engine, version)
    except BadInput as error:
        raise BadInput(str(error), where=where or "engine") from None
    if not choice.mapped and version_in(version):
        would_do = f"no profile lists it; known: {_versions(listed)}; {engine} alone takes the newest"
        raise BadInput(would_do, where=where or "engine", got=text)
    return choice.profile


# vllm@0.11.0, vllm==0.11.0 or vllm-0.11.0: an engine and its version, which has a dot where it stands behind a dash.
_VERSIONED = re.compile(r"(?P<engine>.+?)\s*(?P<mark>[=<>~!]=?=?|@|-(?=v?\d+\.))\s*(?P<version>.*)")
# What packages of engines are called, where it is not the engine's name.
_PACKAGES = {"tensorrt-llm": "trtllm"}


def _engine_and_version(text: str, where: object = None) -> tuple[str, str]:
    """An engine's name and the version asked for, which is empty where ``text`` gives none."""
    match = _VERSIONED.fullmatch(text.strip())
    engine, mark, version = match.group("engine", "mark", "version") if match else (text.strip(), "", "")
    if mark not in ("", "@", "-", "==", "==="):
        raise BadInput(f"give one version, as {engine}@0.11.0", where=where or "engine", got=text)
    name = canonicalize_name(engine)
    return _PACKAGES.get(name, name), version


def _profiles() -> list[EngineProfile]:
    return [load("engine", name) for name in names("engine")]


def _listed(engine: str) -> dict[str, str]:
    """Version prefixes of an engine and the profile of each; empty for an unknown engine."""
    return {prefix: profile.name for profile in _profiles() if profile.engine == engine for prefix in profile.versions}


def _versions(listed: Iterable[str]) -> str:
    return ", ".join(sorted(listed, key=Version))


def _newest(listed: Iterable[str]) -> str:
    return max(listed, key=Version)
