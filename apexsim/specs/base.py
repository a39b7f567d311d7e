"""The base of every spec: a frozen pydantic model whose faults become one teaching line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from apexsim.errors import BadInput, nearest

# A name stands in tables, file names and messages; the longest one known has some 60 characters.
MAX_NAME_CHARS = 200

# Products of some of them, as floats, stay finite.
MAX_WHOLE = 10**30

_CONFIG = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cells(BaseModel):
    """A frozen row of a text file: numbers and booleans are read from their text. Otherwise as ``Spec``."""

    model_config = _CONFIG


def _strict(schema: Any) -> Any:
    """The same schema with every number and boolean in it strict; keys of mappings, text in JSON, stay as they are."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind == "int":
        return core_schema.no_info_before_validator_function(_no_text_or_bool, schema)
    if kind in ("float", "bool"):
        return {**schema, "strict": True}
    if kind == "function-before" and schema["function"].get("function") is _no_text_or_bool:
        return schema  # of a spec inside this one
    left = ("keys_schema", "metadata", "serialization", "default")
    return {key: value if key in left else _strict(value) for key, value in schema.items()}


def _no_text_or_bool(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError("int_type", "give a whole number")
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise PydanticCustomError("int_type", "give a whole number of at most 30 digits")
    return value


class Holds(NamedTuple):
    """Annotates a mapping with what its keys may be: one of them beside it, not in it, gets a hint."""

    names: Callable[[], frozenset[str]]


class Spec(BaseModel):
    """A frozen value. Unknown keys are refused; numbers must be finite; derived facts are properties.

    Types are strict: true is no number, text is no number, 1 is not true. A whole number may be written as 8e10.
    """

    model_config = _CONFIG

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        strict: CoreSchema = _strict(handler(source))
        return strict


def _plain_name(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable() or set("[]") & set(name):
        raise ValueError(f"give 1 to {MAX_NAME_CHARS} printable characters without brackets")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
"""What a person calls a thing: it can stand in a table, a file name and a message as it is."""


SpecT = TypeVar("SpecT", bound=Spec)

_PLAIN = ("bool", "int", "float", "str")
_ANY_PLAIN = "give a number, true, false or text"


def parse_spec(cls: type[SpecT], data: Mapping[str, Any], where: object) -> SpecT:
    """Build a spec from plain data; a fault becomes ``BadInput`` naming ``where``, the key and what would do."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _first_fault(error, cls, where) from None


def _first_fault(error: ValidationError, cls: type[Spec], where: object) -> BadInput:
    """The fault to tell: an unknown key before all others, since a misspelt one is also a missing one."""
    faults = error.errors()
    fault = next((each for each in faults if each["type"] == "extra_forbidden"), faults[0])
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])
        return BadInput(f"unknown key; {_meant(name, cls, fault['loc'][:-1])}", where=where, key=path)
    if fault["type"] == "missing":
        return BadInput("is missing and has no default", where=where, key=path)
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_kind(fault, cls, where)
    if fault["loc"] and fault["loc"][-1] in _PLAIN:  # one of several types that would do: the last part is its name
        path = path.rpartition(".")[0]
        finite = "finite_number" in {each["type"] for each in faults}
        return BadInput("give a finite number" if finite else _ANY_PLAIN, where=where, key=path, got=fault["input"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    # What is wrong with a spec as a whole is said in the message; its keys and values would say nothing.
    return BadInput(message, where=where, key=path or None, got=fault["input"] if path else ...)


def _wrong_kind(fault: ErrorDetails, cls: type[Spec], where: object) -> BadInput:
    """A value whose ``kind`` is missing or names none of the specs that may stand there."""
    kinds = [str(option.model_fields["kind"].default) for option in _options_at(cls, fault["loc"])]
    key = ".".join([*(str(part) for part in fault["loc"]), "kind"])
    if fault["type"] == "union_tag_not_found":
        return BadInput(f"is missing; known: {', '.join(kinds)}", where=where, key=key)
    tag = str(fault["ctx"]["tag"])
    return BadInput(nearest(tag, kinds), where=where, key=key, got=tag)


def _meant(name: str, cls: type[Spec], path: tuple[int | str, ...]) -> str:
    """Which key may be meant by an unknown one at ``path``: the same one inside a section, or one much like it."""
    fields = _options_at(cls, path)[0].model_fields
    sections = {key: field.annotation for key, field in fields.items() if isinstance(field.annotation, type)}
    inside = [key for key, kind in sections.items() if issubclass(kind, Spec) and name in kind.model_fields]
    if inside:
        return f"did you mean {' or '.join(f'{key}.{name}' for key in inside)}?"
    for key, field in fields.items():
        if any(isinstance(each, Holds) and name in each.names() for each in field.metadata):
            return f"did you mean {key}: {{{name}: ...}}?"
    return nearest(name, fields)


def _options_at(cls: type[Spec], path: tuple[int | str, ...]) -> list[type[Spec]]:
    """Specs that may stand at ``path``; pydantic's paths name the ``kind`` of a union's member after its field."""
    options = [cls]
    for part in path:
        field = options[0].model_fields.get(str(part))
        of_kind = [
            each for each in options if "kind" in each.model_fields and each.model_fields["kind"].default == part
        ]
        options = (_types_in(field.annotation) if field else of_kind) or options
    return options


def _types_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [found for arg in getattr(annotation, "__args__", ()) for found in _types_in(arg)]
