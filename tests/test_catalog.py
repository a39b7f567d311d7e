"""The catalog: shipped specs by name, files by path, engine versions to profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

import apexsim
from apexsim import catalog
from apexsim.catalog import EngineChoice, Kind, engine_for
from apexsim.errors import BadInput
from apexsim.io.yaml_files import write_yaml
from apexsim.specs.model import ModelSpec
from apexsim.versions import begins, version_in

KINDS: list[Kind] = ["model", "device", "engine", "workload"]
PACKAGE = Path(apexsim.__file__).parent


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_spec_loads_under_its_own_name(kind: Kind) -> None:
    for name in catalog.names(kind):
        assert catalog.load(kind, name).name == name


def test_the_data_is_found_in_a_checkout_and_when_installed() -> None:
    assert catalog.data_root() in (PACKAGE.parent, PACKAGE / "_data")
    assert "llama-3.1-70b" in catalog.names("model")


def test_a_wheel_carries_its_data_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path / package)
    with pytest.raises(BadInput, match="data folders are missing"):
        catalog.data_root()
    (tmp_path / "apexsim" / "_data" / "model_specs").mkdir(parents=True)
    assert catalog.data_root() == tmp_path / "apexsim" / "_data"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama-3.1-80b", "did you mean llama-3.1-8b or llama-3.1-70b"),
        ("lama-3.1-70B", "did you mean llama-3.1-70b"),
        ("zzz", "known: codellama-34b, "),
        ("", "known: codellama-34b, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        catalog.load("model", name)
    assert str(caught.value).startswith(f"model: got {name!r}; unknown model; ")
    assert said in str(caught.value)


def test_a_path_is_taken_in_place_of_a_name(tmp_path: Path) -> None:
    spec = catalog.load("model", "qwen3-8b")
    file = tmp_path / "mine.yaml"
    write_yaml(file, spec.model_dump(exclude_defaults=True) | {"name": "mine"})
    for path in (file, str(file)):
        mine = catalog.load("model", path)
        assert isinstance(mine, ModelSpec)
        assert mine == spec.model_copy(update={"name": "mine"})
    with pytest.raises(BadInput, match=r"nobody\.yaml: cannot be read"):
        catalog.load("model", tmp_path / "nobody.yaml")


def profile(engine: str, name: str, versions: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "engine": engine,
        "versions": versions,
        "host": {},
        "scheduler": {"policy": "chunked_prefill"},
        "memory": {},
        "communication": {},
        "evidence": "prior",
        "source": "test",
    }


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine_profiles").mkdir()
    made_up = [
        ("acme", "acme-old", ["0.1", "0.6"]),
        ("acme", "acme-mid", ["0.6.4", "0.8", "0.9"]),
        ("acme", "acme-new", ["0.10", "0.11"]),
        ("other", "other-1", ["1.0", "1"]),
    ]
    for engine, name, versions in made_up:
        write_yaml(tmp_path / "engine_profiles" / f"{name}.yaml", profile(engine, name, versions))
    monkeypatch.setattr(catalog, "data_root", lambda: tmp_path)


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("engine", "version", "name"),
    [
        ("acme", "0.6.0", "acme-old"),
        ("acme", "0.6.4", "acme-mid"),
        ("acme", "0.6.4.post1", "acme-mid"),
        ("acme", "0.6.40", "acme-old"),
        ("acme", "0.1.5", "acme-old"),
        ("acme", "0.11.2", "acme-new"),
        ("acme", "0.10rc1", "acme-new"),
        ("other", "1.0.0rc3", "other-1"),
    ],
)
def test_the_longest_listed_prefix_answers(engine: str, version: str, name: str) -> None:
    choice = engine_for(engine, version)
    assert (choice.profile, choice.mapped) == (name, True)


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("version", ["", "nightly", "nightly-dev-20260216-d3bae71e", "gpt-oss-dev", "0.12.1", "1.0"])
def test_a_version_beyond_the_list_takes_the_newest_profile_and_says_so(version: str) -> None:
    choice = engine_for("acme", version)
    assert (choice.profile, choice.mapped) == ("acme-new", False)
    assert "newest profile (0.11)" in choice.note


@pytest.mark.usefixtures("engines")
def test_what_no_profile_answers_for_is_refused() -> None:
    with pytest.raises(BadInput, match=r"acme: got '0\.7\.1'; no profile lists it; known: 0\.1, 0\.6, 0\.6\.4, 0\.8"):
        engine_for("acme", "0.7.1")
    with pytest.raises(BadInput, match=r"engine: got 'acmee'; unknown engine; did you mean acme"):
        engine_for("acmee", "0.6")


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("vllm==0.11.0", "vllm-v1-sync"),
        ("vllm===0.11.0", "vllm-v1-sync"),
        ("vllm == 0.11.*", "vllm-v1-sync"),
        ("vllm-0.11.0", "vllm-v1-sync"),
        ("vllm-v0.19.1-cu130", "vllm-v1-async"),
        ("vLLM@0.19", "vllm-v1-async"),
        ("vLLM", "vllm-v1-async"),
        ("sglang==0.4.9", "sglang-0.4"),
        ("sglang-0.5.8.post1", "sglang-0.5"),
        ("tensorrt_llm==1.0.0rc3", "trtllm-1.0"),
        ("TensorRT-LLM-1.2.0", "trtllm-1.1"),
        ("vllm-0.6", "vllm-0.6"),
    ],
)
def test_engines_are_known_as_their_packages_are_installed(asked: str, name: str) -> None:
    assert catalog.load("engine", asked).name == name


def test_a_version_in_any_spelling_has_its_memory_terms() -> None:
    wanted = catalog.load("engine", "vllm@0.8.5").memory
    assert wanted != catalog.load("engine", "vllm@0.11.0").memory
    assert catalog.load("engine", "vllm==0.8.5").memory == catalog.load("engine", "vllm-0.8.5").memory == wanted


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("vllm>=0.11", "got 'vllm>=0.11'; give one version, as vllm@0.11.0"),
        ("vllm~=0.11.0", "give one version, as vllm@0.11.0"),
        ("vllm==9.0", "no profile lists it; known: 0.4, 0.5, "),
        ("vlm==0.11", "unknown engine; did you mean vllm"),
        ("vllm-v1", "did you mean vllm-v1-sync or vllm-v1-async"),
    ],
)
def test_what_names_no_version_is_answered(asked: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        catalog.load("engine", asked)
    assert said in str(caught.value)


def test_versions_are_found_at_the_head_of_what_people_write() -> None:
    found = {text: version_in(text) for text in ("v0.19.1-cu130", "0.6.4.post1", "1.0.0rc3", "0.11.0+cu128", "0.11.x")}
    assert [str(version) for version in found.values()] == ["0.19.1", "0.6.4.post1", "1.0.0rc3", "0.11.0+cu128", "0.11"]
    assert [version_in(text) for text in ("", "nightly-0.11", "5b8c30d62b", "gpt-oss-dev")] == [None] * 4
    assert begins("0.1rc2", "0.1")
    assert not begins("0.11", "0.1")
    assert not begins("0.6", "0.6.4")
    assert not begins("nightly", "0.6")


def test_a_choice_is_a_value() -> None:
    assert EngineChoice("a", True, "b", "c") == EngineChoice("a", True, "b", "c")


@pytest.mark.parametrize(
    ("engine", "version", "name"),
    [
        ("vllm", "0.6.0", "vllm-0.6"),
        ("vllm", "0.11.1", "vllm-v1-sync"),
        ("vllm", "0.14.0", "vllm-v1-async"),
        ("vllm", "", "vllm-v1-async"),
        ("sglang", "0.5.8.post1", "sglang-0.5"),
        ("trtllm", "1.0.0rc3", "trtllm-1.0"),
    ],
)
def test_shipped_profiles_answer_for_their_versions(engine: str, version: str, name: str) -> None:
    choice = engine_for(engine, version)
    assert (choice.profile, choice.mapped) == (name, bool(version))


def test_no_version_is_listed_by_two_shipped_profiles() -> None:
    profiles = [catalog.load("engine", name) for name in catalog.names("engine")]
    listed = [(profile.engine, version) for profile in profiles for version in profile.versions]
    assert len(listed) == len(set(listed))
