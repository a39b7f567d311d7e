"""The journal: what it remembers, what a bad byte, a full disk or another process cost, and lost workers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apexsim.cli.main import main
from apexsim.errors import BadInput, InfeasiblePlan, Unsupported
from apexsim.search.executors import run_local
from apexsim.search.journal import FILE_NAME, Journal, journal_in
from apexsim.search.outcomes import Outcome, attempt, settle

KEYS = ["a", "b", "c"]


def outcome_of(key: str) -> Outcome:
    """An outcome with a float, and with text beyond ASCII."""
    return Outcome("ok", f"für {key}", {"value": 0.1 + ord(key), "none": None})


class Counted:
    """An executor in this process that notes what it ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(
        self, function: Callable[[str], Outcome], tasks: Sequence[str], jobs: int
    ) -> Iterator[tuple[int, Outcome]]:
        for number, task in enumerate(tasks):
            self.ran.append(task)
            yield number, function(task)


def settled(
    journal: Journal | None, work: Callable[[str], Outcome] = outcome_of
) -> tuple[dict[str, Outcome], list[str]]:
    """Outcomes of all keys, and which of them were worked out."""
    counted = Counted()
    found = settle({key: key for key in KEYS}, work, executor=counted, jobs=1, journal=journal, progress=None)
    return found, counted.ran


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three outcomes."""
    path = tmp_path / FILE_NAME
    with Journal(path) as journal:
        settled(journal)
    return path


def resumed(path: Path) -> tuple[dict[str, Outcome], list[str]]:
    with Journal(path, resume=True) as journal:
        return settled(journal)


def test_what_was_done_is_not_done_again(path: Path) -> None:
    assert resumed(path) == ({key: outcome_of(key) for key in KEYS}, [])
    assert all(json.loads(line) for line in path.read_text().split("\n") if line)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_one_bad_byte_costs_one_record(path: Path, data: st.DataObject) -> None:
    """Whatever byte becomes whatever other one, is lost, or comes in between."""
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    put = data.draw(st.sampled_from([b"", b"\n", b"\xff", b"\0", b'"', whole[at : at + 1] + b"\n", b"\xff\xfe\n\xff"]))
    hurt = path.with_name("hurt.jsonl")
    hurt.write_bytes(whole[:at] + put + whole[at + 1 :])
    found, ran = resumed(hurt)
    assert len(ran) <= 1
    assert found == {key: outcome_of(key) for key in KEYS}
    assert resumed(hurt)[1] == []
    hurt.unlink()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"0.1", b"0.2", "its checksum does not match"),
        (b'"identity": "b"', b'"identity": "\xff"', "its checksum does not match"),
        (b'"crc32"', b'"crc33"', "it is cut short or none of this version's records"),
    ],
)
def test_a_line_that_does_not_count_is_named(
    path: Path, caplog: pytest.LogCaptureFixture, old: bytes, new: bytes, said: str
) -> None:
    lines = path.read_bytes().split(b"\n")
    (at,) = [at for at, line in enumerate(lines) if b'"identity": "b"' in line]
    path.write_bytes(b"\n".join([*lines[:at], lines[at].replace(b"98.1", b"0.1").replace(old, new), *lines[at + 1 :]]))
    assert resumed(path)[1] == ["b"]
    (line,) = caplog.messages
    assert line.startswith(f"{path}: line {at + 1} does not count: ")
    assert line.endswith("its run is made again")
    assert said in line or "checksum" in line


def foreign(path: Path, outcome: object) -> None:
    """Add a record whose checksum is right."""
    with Journal(path, resume=True) as journal:
        journal._write({"identity": "b", "outcome": outcome})


@pytest.mark.parametrize(
    "outcome",
    [
        5,
        {},
        {"verdict": "fine", "reason": "", "figures": {}},
        {"verdict": "ok", "reason": "", "figures": {}, "since": "version 9"},
    ],
)
def test_a_foreign_record_is_named_and_its_run_is_made_again(
    path: Path, caplog: pytest.LogCaptureFixture, outcome: object
) -> None:
    foreign(path, outcome)
    found, ran = resumed(path)
    assert found["b"] == outcome_of("b")
    assert ran == (["b"] if isinstance(outcome, dict) else [])
    assert "none of this version's" in caplog.messages[0]


def test_of_many_bad_lines_the_first_are_named_and_the_rest_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_text("not ours\n" * 1000)
    assert resumed(tmp_path / FILE_NAME)[1] == KEYS
    assert len(caplog.messages) == 11
    assert caplog.messages[-1].endswith("990 more lines do not count")


def test_failures_that_cannot_change_are_not_repeated(tmp_path: Path) -> None:
    raised = {
        "a": InfeasiblePlan(["too large"]),
        "b": Unsupported("no table"),
        "c": ValueError("no luck"),
    }  # fmt: skip

    def work(key: str) -> Outcome:
        def fails() -> Outcome:
            raise raised[key]

        return attempt(fails)

    with Journal(tmp_path / FILE_NAME) as journal:
        first, ran = settled(journal, work)
    assert ran == KEYS
    assert resumed(tmp_path / FILE_NAME) == (first, [])


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left on device")])
def test_failures_of_the_machine_are_tried_again(tmp_path: Path, error: Exception) -> None:
    def work(key: str) -> Outcome:
        def fails() -> Outcome:
            if key == "b":
                raise error
            return outcome_of(key)

        return attempt(fails)

    with Journal(tmp_path / FILE_NAME) as journal:
        first, _ = settled(journal, work)
    assert first["b"].verdict == "failed"
    found, ran = resumed(tmp_path / FILE_NAME)
    assert ran == ["b"]
    assert found["b"] == outcome_of("b")


def test_what_lost_its_worker_is_tried_again(tmp_path: Path) -> None:
    def loses_b(_: object, tasks: Sequence[str], jobs: int) -> Iterator[tuple[int, Outcome | None]]:
        for number, task in enumerate(tasks):
            yield number, None if task == "b" else outcome_of(task)

    with Journal(tmp_path / FILE_NAME) as journal:
        tasks = {key: key for key in KEYS}
        found = settle(tasks, outcome_of, executor=loses_b, jobs=1, journal=journal, progress=None)
    assert found["b"].verdict == "failed"
    assert "died, twice" in found["b"].reason
    assert resumed(tmp_path / FILE_NAME)[1] == ["b"]


# ---- one writer


def test_a_journal_is_not_begun_anew_over_another(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"got '3 records in journal.jsonl'; give --resume to go on with it, or another"):
        Journal(path)
    assert path.read_bytes() == before


def test_a_journal_without_an_outcome_is_begun_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with journal_in(tmp_path, resume=False, results=["study.json"]) as journal:
            assert journal.known == {}


def test_results_without_their_journal_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    with (
        pytest.raises(BadInput, match=r"got 'study.json'; give --resume"),
        journal_in(tmp_path, resume=False, results=["study.json"]),
    ):
        raise AssertionError
    assert os.listdir(tmp_path) == ["study.json"]


HOLDER = """
import sys, time
from pathlib import Path
from apexsim.search.journal import Journal
with Journal(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_hears_who_is_at_work_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    asked = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(asked, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            BadInput, match=rf"process {holder.pid} on .* is at work in it; wait, or give another --out"
        ):
            Journal(path, resume=True)
        holder.kill()
        holder.wait()
        with Journal(path, resume=True):
            pass


KILLED = """
import os, signal, sys
from pathlib import Path
from apexsim.search.journal import Journal
from apexsim.search.outcomes import Outcome, settle

def dies_behind_two(function, tasks, jobs):
    yield from enumerate(map(function, tasks[:2]))
    os.kill(os.getpid(), signal.SIGKILL)

def outcome_of(key):
    return Outcome("ok", f"f\\u00fcr {key}", {"value": 0.1 + ord(key), "none": None})

with Journal(Path(sys.argv[1])) as journal:
    tasks = {key: key for key in "abc"}
    settle(tasks, outcome_of, executor=dies_behind_two, jobs=1, journal=journal, progress=None)
"""


def test_a_killed_process_loses_nothing_that_was_done(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False).returncode == -9
    assert resumed(path) == ({key: outcome_of(key) for key in KEYS}, ["c"])


def test_the_command_says_in_one_line_who_is_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "llama-3.1-8b", "--devices", "1xh100-sxm", "--workload", "chat", "--requests", "5"]
    with Journal(tmp_path / FILE_NAME):
        assert main(["search", *asked, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}: process {os.getpid()} on " in said
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_symlink_is_refused_and_its_target_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / FILE_NAME).symlink_to(target)
    with pytest.raises(BadInput, match="is a symbolic link"):
        Journal(tmp_path / FILE_NAME, resume=True)
    assert target.read_text() == "mine"


def test_only_a_regular_file_is_taken(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadInput, match="is no regular file"):
        Journal(tmp_path / "fifo", resume=True)
    with pytest.raises(BadInput, match="cannot be opened: Is a directory"):
        Journal(tmp_path)


# ---- the disk


def test_every_record_is_on_the_disk_before_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / FILE_NAME
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_bytes()))
    with Journal(path) as journal:
        settled(journal)
    assert [text.count(b'"identity"') for text in synced] == [0, 1, 2, 3]


FULL = """
import resource, sys
from apexsim.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("most_bytes", [10, 400])
def test_a_full_disk_is_one_line_and_what_was_written_counts(tmp_path: Path, most_bytes: int) -> None:
    asked = ["search", "--model", "llama-3.1-8b", "--devices", "2xh100-sxm", "--workload", "chat", "--requests", "5"]
    asked += ["--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-c", FULL, str(most_bytes), *asked]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("cannot be written: File too large; make room, then go on with --resume\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "study.json").exists()
    assert main([*asked, "--resume"]) == 0


# ---- workers


def noted(task: int, folder: str, deadly: int, deaths: int) -> int:
    """Leave a file a run, named by task and process; the deadly task ends its process so many times."""
    runs = Path(folder)
    (runs / f"{task}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if task == deadly and len(list(runs.glob(f"{task}-*"))) <= deaths:
        os._exit(1)
    return task


@pytest.mark.parametrize(("deaths", "result"), [(1, 3), (9, None)])
def test_a_lost_worker_costs_its_own_task(tmp_path: Path, deaths: int, result: int | None) -> None:
    """The deadly task is run twice, any other once, and every death brings one process more."""
    work = partial(noted, folder=str(tmp_path), deadly=3, deaths=deaths)
    found = dict(run_local(work, range(12), 2))
    assert found == {task: task for task in range(12)} | {3: result}
    files = [name.split("-") for name in os.listdir(tmp_path)]
    assert Counter(int(task) for task, *_ in files) == {task: 2 if task == 3 else 1 for task in range(12)}
    assert len({process for _, process, _ in files}) <= 2 + min(deaths, 2)
