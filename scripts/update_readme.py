"""Put the real output of the README's first command into the README: ``python scripts/update_readme.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = re.compile(r"(?<=```text\n).*?(?=```\n)", re.DOTALL)


def output_of_main_job() -> str:
    """What the command prints where its output is no terminal, without trailing blanks."""
    command = re.search(r"&& apexsim (.+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert command, "the README has no first command"
    run = [sys.executable, "-m", "apexsim.cli.main", *command[1].split()]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    output = output_of_main_job()
    text = SHOWN.sub(lambda _: output, readme.read_text(encoding="utf-8"), count=1)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
