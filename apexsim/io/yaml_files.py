"""YAML in and out, with PyYAML's traps closed.

PyYAML alone                              here
989e12, 1e-6 are strings                  floats
no, on, yes, off are booleans             strings; only true and false are booleans
a key given twice: the last one wins      refused, naming file, line and key
010 is 8, 1:30 is 90, 2024-07-23 a date   strings
<< merges mappings                        an ordinary key
!!python, !!set, !!binary make objects    refused, as every tag but those of plain data
deep nesting kills the process            refused, as is what aliases blow up
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from apexsim.atomic import atomic_path
from apexsim.errors import BadInput, printable
from apexsim.reading import read_text
from apexsim.specs.base import SpecT, parse_spec

if TYPE_CHECKING:
    from yaml import SafeLoader as _FastLoader
else:
    _FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_ODD_BREAKS = re.compile("[\r\x85\u2028\u2029]")
_SCALARS = (str, int, float, bool, type(None))
# Long enough that indenting the grids of numbers in a profile costs little.
LINE_WIDTH = 320
# The largest profile has 60 KB, a few levels and no alias. PyYAML takes 200 bytes of memory for one of a file.
MAX_YAML_BYTES = 1 << 20
_MAX_DEPTH, _MAX_NODES = 100, 1_000_000


class _Loader(_FastLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise _DuplicateKeyError(str(key), key_node.start_mark.line + 1)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    # What plain data are made of; any other tag is told as one that this loader does not know.
    yaml_constructors = {  # noqa: RUF012 (PyYAML's own name)
        tag: _FastLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map")))
    }


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this loader, or a plain YAML 1.1 one, would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _DuplicateKeyError(Exception):
    def __init__(self, key: str, line: int) -> None:
        self.key, self.line = key, line
        super().__init__(key)


def _represent_list(dumper: yaml.SafeDumper, data: Any) -> yaml.Node:
    """Lists of scalars on one line: tables of coefficients stay readable."""
    flat = all(isinstance(item, _SCALARS) for item in data)
    return dumper.represent_sequence(_TAG + "seq", data, flow_style=flat)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float)


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value)


def _represent_dict(dumper: yaml.SafeDumper, data: dict[Any, Any]) -> yaml.Node:
    """Mappings to fractions, or to lists of numbers, flow: coefficients of a form, ranges, errors."""
    flat = len(data) > 1 and (all(map(_is_fraction, data.values())) or all(map(_is_row, data.values())))
    return dumper.represent_mapping(_TAG + "map", data, flow_style=flat)


def _represent_str(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    """Other line breaks than newline lose themselves outside double quotes."""
    return dumper.represent_scalar(_TAG + "str", data, style='"' if _ODD_BREAKS.search(data) else None)


_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
for _rule in (_Loader, _Dumper):
    _rule.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _rule.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(dict, _represent_dict)
_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(tuple, _represent_list)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises BadInput, in one line, for a file that cannot be read, is not YAML, gives a key twice, or holds no mapping.
    """
    where = os.fspath(path)
    text = read_text(path, most_bytes=MAX_YAML_BYTES)
    try:
        _check_size(text)
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except _DuplicateKeyError as error:
        raise BadInput(f"is given twice, again on line {error.line}; keep one", where=where, key=error.key) from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # LookupError: !!bool of another word
        raise BadInput(_syntax_message(error), where=where) from None
    if not isinstance(data, dict):
        raise BadInput("give a YAML mapping of keys to values", where=where, got=data)
    return data


def _check_size(text: str) -> None:
    """Raise ValueError for text nested too deep for the loader, or blown up by aliases of aliases."""
    sizes, anchors = [0], [""]  # nodes and anchor of every collection that is open, the whole file first
    known: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            anchors.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            size = known[anchors.pop()] = sizes.pop()
            sizes[-1] += size
        elif isinstance(event, yaml.AliasEvent):  # inside what it stands for it has no end
            sizes[-1] += _MAX_NODES if event.anchor in anchors else known.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
        if len(sizes) > _MAX_DEPTH or sizes[-1] > _MAX_NODES:
            most = f"{_MAX_DEPTH} levels and {_MAX_NODES:,} values"
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ValueError(f"line {line}: give at most {most}")


def _syntax_message(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: not valid YAML: {error.problem or error.context}"
    if isinstance(error, LookupError):
        return f"not valid YAML: {error} is not what its tag (!!bool, !!int, ...) says; leave the tag away"
    return f"not valid YAML: {str(error) or type(error).__name__}"


def load_spec(cls: type[SpecT], path: str | os.PathLike[str]) -> SpecT:
    """The spec that a YAML file holds; BadInput names the file, the key and what would do."""
    return parse_spec(cls, read_yaml(path), os.fspath(path))


def format_yaml(data: Mapping[str, Any]) -> str:
    """YAML text of plain data (dicts, lists, strings, numbers, None), keys in the order given."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=LINE_WIDTH)


def write_yaml(path: str | os.PathLike[str], data: Mapping[str, Any], *, head: str | None = None) -> None:
    """Write ``format_yaml(data)``, under ``head`` as a comment: the file appears whole or not at all.

    Raises BadInput where it cannot be written.
    """
    text = format_yaml(data) if head is None else f"# {printable(head)}\n{format_yaml(data)}"
    with atomic_path(Path(path)) as scratch:
        scratch.write_text(text, encoding="utf-8")
