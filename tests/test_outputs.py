"""Where results are written: files whole or not at all; devices, pipes and links stay what they are."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from apexsim.atomic import atomic_path, check_writable, is_stream, make_folder, write_json
from apexsim.cli.main import main
from apexsim.errors import BadInput

RUN = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--requests", "2"]


def test_a_device_is_written_to_and_stays_a_device() -> None:
    write_json("/dev/null", {"a": 1})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="/dev/full: cannot be written: No space left"):
        write_json("/dev/full", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_gets_all_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_json(pipe, {"numbers": list(range(50_000))})
    reader.join()
    assert json.loads(got[0]) == {"numbers": list(range(50_000))}
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_pipe_that_nobody_reads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("apexsim.atomic._READER_WAIT_S", 0.0)
    with pytest.raises(BadInput, match="nobody reads this pipe"):
        write_json(tmp_path / "pipe", {})


def test_a_link_is_kept_and_its_file_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file.json", tmp_path / "link.json"
    target.write_text("old")
    os.symlink(target, link)
    with pytest.raises(ZeroDivisionError), atomic_path(link) as scratch:
        scratch.write_text(f"half {1 / 0}")
    assert target.read_text() == "old"
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(target.parent.iterdir()) == [target]


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.touch(mode=0o600)
    write_json(file, {})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_descriptors_of_this_process_go_on_where_they_are(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as out:
        out.write(b"before\n")
        out.flush()
        path = f"/dev/fd/{out.fileno()}"
        assert is_stream(path)
        write_json(path, {"a": 1})
        out.write(b"after\n")
    first, *middle, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert json.loads("".join(middle)) == {"a": 1}


def test_what_cannot_be_written_is_found_before(tmp_path: Path) -> None:
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    os.symlink(tmp_path / "nowhere" / "x", tmp_path / "dangling")
    for path in (tmp_path, tmp_path / "loop", tmp_path / "dangling", tmp_path / "no" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match="--json"):
            check_writable(path, where="--json")
    (tmp_path / "out" / "study.json").mkdir(parents=True)
    with pytest.raises(BadInput, match="--out"):
        make_folder(tmp_path / "out", files=["study.json"])


def test_the_command_refuses_a_directory_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("apexsim.serving.simulator.simulate", lambda *_, **__: pytest.fail("it ran"))
    assert main([*RUN, "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
