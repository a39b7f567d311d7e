"""Files that appear whole or not at all.

What stands at a path decides how it is written:

nothing, or a file       a scratch file beside it takes its name when all is written
a link                   stays; the file that it points to is written
a device, a pipe         is written to, never replaced; ``/dev/stdout`` is one whatever stands behind it
a directory, a socket    refused
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from apexsim.errors import BadInput

# A file system takes 255 bytes; a scratch file beside the target has some more than its name.
_MAX_NAME_BYTES = 200
# Links that stand for this process' own descriptors: /dev/stdout, /dev/fd/3.
_DESCRIPTOR = re.compile(r"/proc/(?:self|\d+)/fd/(\d+)")
# How long a pipe may be without a reader.
_READER_WAIT_S, _READER_LOOK_S = 10.0, 0.05


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a scratch path; its content takes the place of ``path`` when the block ends well and vanishes if not."""
    check_writable(path, where=path)
    streamed, target = is_stream(path), Path(os.path.realpath(path))
    folder = None if streamed else target.parent
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{Path(path).name}.", suffix=Path(path).suffix, dir=folder)
        os.close(handle)
        try:
            yield Path(scratch)
            if streamed:
                _copy(scratch, path)
            else:
                os.chmod(scratch, _mode(target))
                os.replace(scratch, target)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror or error}", where=path) from None


def is_stream(path: Path | str) -> bool:
    """Whether ``path`` takes bytes as they come: a character device, a pipe, or a descriptor of this process."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or _descriptor(path) is not None


def make_folder(path: Path | str, *, where: object = "--out", files: Iterable[str] = ("file",)) -> Path:
    """The folder at ``path``, made with its parents where it is not there; ``BadInput`` when that cannot be, or when
    one of the ``files`` that will be written into it could not be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot be made a folder: {said}", where=where, got=str(path)) from None
    for name in files:
        check_writable(folder / name, where=where)
    return folder


def check_writable(path: Path | str, *, where: object) -> None:
    """Raise ``BadInput`` now rather than after a long run when ``path`` could not be written."""
    target = Path(os.path.realpath(path))
    if is_stream(path):
        writable = os.access(path, os.W_OK)
    elif not os.path.isdir(target.parent):
        raise BadInput("its folder does not exist; create it first", where=where, got=str(path))
    else:
        too_long = len(os.fsencode(target.name)) > _MAX_NAME_BYTES
        odd = os.path.lexists(target) and not os.path.isfile(target)  # a directory, a socket, a link to itself
        writable = not too_long and not odd and os.access(target.parent, os.W_OK)
    if not writable:
        raise BadInput("give the path of a file that can be written", where=where, got=str(path))


def _descriptor(path: Path | str) -> int | None:
    """The descriptor that a path such as ``/dev/stdout`` stands for; None for any other."""
    link = os.path.abspath(path)
    for _ in range(40):  # as many links as a system follows
        link = os.path.join(os.path.realpath(os.path.dirname(link)), os.path.basename(link))
        if found := _DESCRIPTOR.fullmatch(link):
            return int(found[1])
        if not os.path.islink(link):
            return None
        link = os.path.join(os.path.dirname(link), os.readlink(link))
    return None


def _copy(scratch: str, path: Path | str) -> None:
    with open(scratch, "rb") as source, _open_stream(path) as out:
        shutil.copyfileobj(source, out)


def _open_stream(path: Path | str) -> BinaryIO:
    """A device or pipe to write to. BadInput for a pipe that nobody reads, whose opening would never end."""
    own = _descriptor(path)
    if own is not None:  # opened anew it would begin at 0, over what was written before
        return os.fdopen(os.dup(own), "wb")
    if not stat.S_ISFIFO(os.stat(path).st_mode):
        return open(path, "wb")
    end_s = time.monotonic() + _READER_WAIT_S
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            if time.monotonic() > end_s:
                raise BadInput("nobody reads this pipe; start its reader first", where=path) from None
            time.sleep(_READER_LOOK_S)
            continue
        os.set_blocking(handle, True)
        return os.fdopen(handle, "wb")


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced; of a new one those that a user expects, which mkstemp does not give."""
    try:
        return stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        return 0o666 & ~_umask()


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
    # There is no way to read the mask without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
