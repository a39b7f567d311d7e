"""YAML in and out: PyYAML's traps closed, faults in one line, files whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apexsim.errors import BadInput
from apexsim.io.yaml_files import format_yaml, load_spec, read_yaml, write_yaml
from apexsim.specs.slo import SLO


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "x.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("989e12", 989e12),
        ("9.89e14", 9.89e14),
        ("1e-6", 1e-6),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("off", "off"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("010", "010"),
        ("0x1F", "0x1F"),
        ("1:30", "1:30"),
        ("2024-07-23", "2024-07-23"),
        ("0.11.1", "0.11.1"),
        ("'1e3'", "1e3"),
        ("=", "="),
        ("e5", "e5"),
        ("[1e3, no, 2]", [1000.0, "no", 2]),
    ],
)
def test_scalars_mean_what_they_look_like(tmp_path: Path, text: str, value: object) -> None:
    got = read(tmp_path, f"key: {text}\n")["key"]
    assert got == value
    assert type(got) is type(value)


def test_plain_pyyaml_has_the_traps() -> None:
    """The reason for this loader; should PyYAML change, the table in its docstring must too."""
    assert yaml.safe_load("[989e12, no, 010, 1:30]") == ["989e12", False, 8, 90]
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}


def test_infinity_and_not_a_number_are_read_as_floats(tmp_path: Path) -> None:
    data = read(tmp_path, "a: .inf\nb: -.inf\nc: .nan\n")
    assert data["a"] == float("inf")
    assert data["b"] == float("-inf")
    assert data["c"] != data["c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "a: is given twice, again on line 3; keep one"),
        ("top:\n  in: 1\n  in: 1\n", "in: is given twice, again on line 3; keep one"),
        ("list:\n- {k: 1, k: 1}\n", "k: is given twice, again on line 2; keep one"),
        ("1: a\n1: b\n", "1: is given twice, again on line 2; keep one"),
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3: not valid YAML"),
        ("a:\n\tb: 1\n", "line 2: not valid YAML"),
        ("a: !!python/object:os.system x\n", "line 1: not valid YAML: could not determine a constructor"),
        ("a: *nobody\n", "line 1: not valid YAML"),
        ("? [1, 2]\n: 3\n", "line 1: not valid YAML: found unhashable key"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML"),
        ("- 1\n- 2\n", "got [1, 2]; give a YAML mapping"),
        ("just words\n", "got 'just words'; give a YAML mapping"),
        ("", "got None; give a YAML mapping"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.yaml'}: ")
    assert said in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="is a directory; give the path of a file"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin\.yaml: is not UTF-8 text"):
        read_yaml(tmp_path / "latin.yaml")


def test_a_spec_fault_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "slo.yaml").write_text("ttft_s: 5e-1\ntpot: 0.05\n")
    with pytest.raises(BadInput, match=r"slo\.yaml: tpot: .*did you mean tpot_s"):
        load_spec(SLO, tmp_path / "slo.yaml")
    (tmp_path / "slo.yaml").write_text("ttft_s: 5e-1\n")
    assert load_spec(SLO, tmp_path / "slo.yaml") == SLO(ttft_s=0.5)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.sampled_from(
        ["no", "on", "~", "", "1e3", "010", "2024-07-23", "1:30", ".inf", "true", "0x1f", "<<", "=", "1_0"]
    ),
)
DATA = st.dictionaries(
    st.text(),
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8),
    max_size=5,
)


@given(data=DATA)
def test_what_is_written_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    write_yaml(file, data)
    back = read_yaml(file)
    assert back == data
    assert repr(back) == repr(data)  # types and key order too
    assert format_yaml(back) == file.read_text(encoding="utf-8")


@given(text=st.sampled_from(["no", "yes", "1e3", "1.5e+3", "010", "2024-07-23", "1:30", "~", "true"]))
def test_written_strings_stay_strings_in_plain_yaml(text: str) -> None:
    assert yaml.safe_load(format_yaml({"key": text})) == {"key": text}


def test_written_form_is_readable() -> None:
    text = format_yaml({"name": "x", "rate": 3.35e12, "knots": (1, 2.5), "deep": {"rows": [{"a": 1}]}})
    assert text == "name: x\nrate: 3350000000000.0\nknots: [1, 2.5]\ndeep:\n  rows:\n  - a: 1\n"


def test_shared_values_are_written_out_not_aliased() -> None:
    shared = {"a": 1}
    assert "*" not in format_yaml({"x": shared, "y": shared})


def test_a_failed_write_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    write_yaml(file, {"a": 1})
    with pytest.raises(yaml.YAMLError):
        write_yaml(file, {"a": object()})
    assert read_yaml(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(BadInput):
        write_yaml(tmp_path / "no folder" / "spec.yaml", {"a": 1})
