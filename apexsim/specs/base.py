"""The base of every spec: a frozen pydantic model whose faults become one teaching line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from apexsim.errors import BadInput, nearest


class Spec(BaseModel):
    """A frozen value. Unknown keys are refused; numbers must be finite; derived facts are properties."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SpecT = TypeVar("SpecT", bound=Spec)


def parse_spec(cls: type[SpecT], data: Mapping[str, Any], where: object) -> SpecT:
    """Build a spec from plain data; the first fault becomes ``BadInput`` naming ``where``, the key and what would do."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _first_fault(error, cls, where) from None


def _first_fault(error: ValidationError, cls: type[Spec], where: object) -> BadInput:
    fault = error.errors()[0]
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][-1])
        return BadInput(f"unknown key; {nearest(name, _keys_at(cls, fault['loc'][:-1]))}", where=where, key=path)
    if fault["type"] == "missing":
        return BadInput("is missing and has no default", where=where, key=path)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return BadInput(message, where=where, key=path or None, got=fault["input"])


def _keys_at(cls: type[Spec], path: tuple[int | str, ...]) -> list[str]:
    """Field names that a spec knows at ``path``; of the spec itself where the path leads elsewhere."""
    current = cls
    for part in path:
        field = current.model_fields.get(str(part))
        inner = [t for t in _types_in(field.annotation)] if field else []
        current = inner[0] if inner else current
    return list(current.model_fields)


def _types_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [found for arg in getattr(annotation, "__args__", ()) for found in _types_in(arg)]
