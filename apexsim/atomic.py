"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput

# A file system takes 255 bytes; a scratch file beside the target has some more than its name.
_MAX_NAME_BYTES = 200


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a scratch path beside ``path``; it takes that name when the block ends well and vanishes if not."""
    target = Path(path)
    check_writable(target, where=target)
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        try:
            yield Path(scratch)
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, target)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror or error}", where=target) from None


def make_folder(path: Path | str, *, where: object = "--out") -> Path:
    """The folder at ``path``, made with its parents where it is not there; ``BadInput`` when that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot be made a folder: {error.strerror}", where=where, got=str(path)) from None
    check_writable(folder / "file", where=where)
    return folder


def check_writable(path: Path | str, *, where: object) -> None:
    """Raise ``BadInput`` now rather than after a long run when ``path`` could not be written."""
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise BadInput("its folder does not exist; create it first", where=where, got=str(path))
    too_long = len(os.fsencode(target.name)) > _MAX_NAME_BYTES
    if too_long or os.path.isdir(target) or not os.access(target.parent, os.W_OK):
        raise BadInput("give the path of a file that can be written", where=where, got=str(path))


def write_json(path: Path | str, data: Mapping[str, Any]) -> None:
    """Write ``data`` atomically in the one JSON form of this package."""
    with atomic_path(path) as scratch:
        scratch.write_text(json_text(data), encoding="utf-8")


def json_text(data: Mapping[str, Any]) -> str:
    """Indented JSON in the order of ``data``; what is not a number (NaN, infinity) is written as null."""
    return json.dumps(without_nan(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """The same nested data with every NaN or infinite float replaced by None; numpy scalars become Python's."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    plain = value.item() if hasattr(value, "item") and not isinstance(value, str | bytes) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def _umask() -> int:
    # There is no way to read the mask without setting it; mkstemp has given the file 0600, which no user expects.
    mask = os.umask(0)
    os.umask(mask)
    return mask
