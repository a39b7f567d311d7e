"""The journal of a search or sweep: what has been run, so that an interrupted one can go on where it stopped.

A record is a line of JSON that ends with the CRC-32 of what stands before it, and a blank line follows: a byte that
goes bad, a newline too, costs one record. Two kinds: ``{"identity", "outcome"}``, and ``{"process", "host"}`` of
whoever opened the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apexsim.errors import BadInput
from apexsim.specs.workload import Requests

FILE_NAME = "journal.jsonl"
_CHECKSUM = b', "crc32": "'
# Of lines that do not count, so many are named one by one.
_MOST_NAMED = 10

# Goes up whenever the same specs come to mean something else (a default or a cost that changed): outcomes from before
# then answer other questions.
GENERATION = 4


def identity(data: Mapping[str, Any]) -> str:
    """Hash of the canonical JSON of ``data`` and ``GENERATION``. Specs in it are dumped without their defaults, so that
    a field added later does not orphan old journals."""
    canonical = json.dumps({"generation": GENERATION, **data}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def fingerprint(requests: Requests) -> str:
    """Hash of the requests themselves: the same rows under another file name are the same workload."""
    waves = " waves" if requests.waves else ""
    digest = hashlib.sha256(f"{requests.concurrency} {requests.turnaround_s!r}{waves}".encode())
    for column in (requests.arrival_s, requests.prompt_tokens, requests.output_tokens):
        digest.update(b"-" if column is None else column.tobytes())
    for name in sorted(requests.extra):
        values = json.dumps(requests.extra[name].tolist(), default=lambda array: array.tolist())
        digest.update(f"{name} {values}".encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Known:
    """An outcome in a journal, and the line it stands on."""

    line: int
    outcome: Mapping[str, Any]


class Journal:
    """Append-only file of checked JSON lines; of equal identities the last one counts.

    ``known`` holds the outcomes to go on from, by identity: those in the file when ``resume`` is asked for, else none.
    A line that is damaged or not ours is named in a warning of ``logging`` and does not count. The file is locked until
    ``close``, or the end of the process, however it ends. Raises BadInput where another holds it, where it is a
    symbolic link or no regular file, and, without ``resume``, where there are records in it.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self._file: int | None = _opened(path)
        try:
            self.known = self._read(resume)
            self._write({"process": os.getpid(), "host": socket.gethostname()})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def append(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Add one outcome to the file; it is on the disk when this returns. BadInput where the disk takes it not."""
        self._write({"identity": key, "outcome": dict(outcome)})

    def _read(self, resume: bool) -> dict[str, Known]:
        known, faults, count = {}, [], 0
        for line, record in _records(self.path):
            count += "process" not in record
            if "fault" in record:
                faults.append(f"line {line} does not count: {record['fault']}")
            elif "identity" in record:
                known[record["identity"]] = Known(line, record["outcome"])
        if count and not resume:
            raise _taken(self.path.parent, f"{count} records in {self.path.name}")
        warn(self.path, faults)
        return known

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "the journal is closed"
        text = json.dumps(record, allow_nan=False).encode()
        # A newline comes first too: whatever a crash left of the line before, this one starts on its own.
        line = b"\n" + text[:-1] + _CHECKSUM + _checksum(text) + b'"}\n'
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            would_do = f"cannot be written: {error.strerror}; make room, then go on with --resume"
            raise BadInput(would_do, where=self.path) from None


@contextmanager
def journal_in(folder: Path, *, resume: bool, results: Iterable[str]) -> Iterator[Journal]:
    """The journal of a folder, held until the block ends.

    Raises BadInput, as ``Journal`` does, and where the folder holds one of the files ``results`` without ``resume``.
    """
    found = [name for name in results if (folder / name).exists()]
    if found and not resume:
        raise _taken(folder, found[0])
    with Journal(folder / FILE_NAME, resume=resume) as journal:
        yield journal


def warn(path: Path, faults: list[str]) -> None:
    """Say what of a journal does not count; its runs are made again."""
    log = logging.getLogger(__name__)
    for fault in faults[:_MOST_NAMED]:
        log.warning("%s: %s; its run is made again", path, fault)
    if len(faults) > _MOST_NAMED:
        log.warning("%s: %d more lines do not count", path, len(faults) - _MOST_NAMED)


def _taken(folder: Path, found: str) -> BadInput:
    return BadInput("give --resume to go on with it, or another --out", where=folder, got=found)


def _opened(path: Path) -> int:
    """A descriptor of the file, made where it is not there, and locked."""
    # Not blocking: a FIFO without a reader would wait for ever.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        if path.is_symlink():
            raise BadInput("is a symbolic link; give another --out", where=path)
        file = os.open(path, flags, 0o666)
    except OSError as error:
        raise BadInput(f"cannot be opened: {error.strerror}; give another --out", where=path) from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadInput("is no regular file; give another --out", where=path)
        _lock(file, path)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = "another process"
        for _, record in _records(path):
            if "process" in record:
                holder = f"process {record['process']} on {record['host']}"
        raise BadInput(f"{holder} is at work in it; wait, or give another --out", where=path.parent) from None
    except OSError as error:
        raise BadInput(f"cannot be locked: {error.strerror}; give an --out on another disk", where=path) from None


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line that is not blank, by its number: what it holds, or ``{"fault": why it does not count}``."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _record(line.rstrip(b"\n"))
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}; give another --out", where=path) from None


def _record(line: bytes) -> dict[str, Any]:
    text, mark, checksum = line.rpartition(_CHECKSUM)
    if not mark:
        return {"fault": "it is cut short or none of this version's records"}
    if checksum != _checksum(text + b"}") + b'"}':
        return {"fault": "its checksum does not match"}
    try:
        record = json.loads(text + b"}")
    except (ValueError, RecursionError):
        return {"fault": "it is no JSON"}
    kinds = {"identity": str, "outcome": dict} if "identity" in record else {"process": int, "host": str}
    if {key: type(value) for key, value in record.items()} != kinds:
        return {"fault": "it is none of this version's records"}
    return dict(record)


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
