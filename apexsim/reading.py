"""Input files, looked at before they are read: what is no file, too large or no text is refused in one line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput

# Far more than any file of this kind has; a reader takes up to a hundred times as much memory.
MAX_TEXT_BYTES = 32 << 20
_KINDS = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def check_regular(path: str | os.PathLike[str], *, would_do: str = "give the path of a file") -> int:
    """Size in bytes of a regular file; BadInput for anything else, such as a pipe or device, which may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        said = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot be read: {said}", where=os.fspath(path)) from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "device")
        raise BadInput(f"is a {kind}; {would_do}", where=os.fspath(path))
    return found.st_size


def read_text(path: str | os.PathLike[str], *, most_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file; BadInput where it is no regular file, has more than ``most_bytes``, or is not UTF-8."""
    size = check_regular(path)
    if size > most_bytes:
        raise BadInput(f"has {size:,} bytes; give at most {most_bytes:,}", where=os.fspath(path))
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=os.fspath(path)) from None
    except UnicodeDecodeError:
        raise BadInput("is not UTF-8 text", where=os.fspath(path)) from None


def read_object(path: str | os.PathLike[str], *, would_do: str = "give a JSON object") -> dict[str, Any]:
    """The JSON object in a file; BadInput naming the file without one."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise BadInput(f"not valid JSON: {said}", where=os.fspath(path)) from None
    if not isinstance(data, dict):
        raise BadInput(would_do, where=os.fspath(path), got=data)
    return data
