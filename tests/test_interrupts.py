"""Ctrl-C and SIGTERM: one line that says what is kept and how to go on, and nothing half-written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apexsim.cli.main import main

ASKED = "model: llama-3.1-8b\ndevices: 4xh100-sxm\nallow_idle: true\nworkload: chat\nrequests: 3000\nrate_per_s: 20\n"
# A machine that is busy with other things may take long to judge the first plan.
PATIENCE_S = 300


def outcomes(journal: Path) -> int:
    return journal.read_text().count('"outcome"') if journal.exists() else 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_search_says_what_is_kept(tmp_path: Path, number: int, status: int) -> None:
    (tmp_path / "s.yaml").write_text(ASKED)
    command = [sys.executable, "-m", "apexsim.cli.main", "search", "s.yaml", "--out", "out", "--jobs", "2"]
    run = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ends_s = time.monotonic() + PATIENCE_S
    while outcomes(tmp_path / "out" / "journal.jsonl") < 2 and run.poll() is None and time.monotonic() < ends_s:
        time.sleep(0.05)
    os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)  # Ctrl-C reaches the workers too
    said, told = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == status
    assert said == ""
    kept = outcomes(tmp_path / "out" / "journal.jsonl")
    word = "interrupted" if status == 130 else "terminated"
    line = re.fullmatch(rf"apexsim: {word}; (\d+) of \d+ plans are kept in out; continue with --resume\n", told)
    assert line
    assert int(line[1]) in (kept, kept - 1)  # the last may have been written and not yet been counted
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["journal.jsonl"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_other_commands_leave_nothing_half_written(
    tmp_path: Path, number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    # While the JSON is being written to its scratch file.
    monkeypatch.setattr("apexsim.atomic.json_text", lambda data: os.kill(os.getpid(), number) or time.sleep(5) or "")
    run = ["simulate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--requests", "2"]
    assert main([*run, "--json", str(tmp_path / "x.json")]) == status
    assert capsys.readouterr().err.endswith("no file is left half-written\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
