"""How often a request changes rooms: ``python benchmarks/rooms.py [--requests N] [--pipeline N]``.

A change of room is a call from one module of apexsim into another while a run is simulated; it is counted, not timed.
Llama-3.1-8B serves the generated ``chat`` workload at 4 requests/s on H100s.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

RATE_PER_S = 4.0
SHOWN = 15


def changes_of_room(requests: int, pipeline: int) -> tuple[Counter[tuple[str, str]], int]:
    """(caller's module, called module) and how often, over one run; and all calls inside apexsim."""
    import apexsim

    root = str(Path(apexsim.__file__).parent) + "/"
    deployment = apexsim.deployment(model="llama-3.1-8b", device="h100-sxm", pipeline=pipeline)
    workload = apexsim.workload("chat", requests=requests, rate_per_s=RATE_PER_S)
    apexsim.simulate(deployment, workload)  # fills the tables of operators
    changes: Counter[tuple[str, str]] = Counter()
    calls = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        called = frame.f_code.co_filename
        if event != "call" or not called.startswith(root):
            return
        calls += 1
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(root):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != called:
            changes[caller.f_code.co_filename.removeprefix(root), called.removeprefix(root)] += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        apexsim.simulate(deployment, workload)
    finally:
        sys.setprofile(before)
    return changes, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--pipeline", type=int, default=1)
    asked = parser.parse_args()
    changes, calls = changes_of_room(asked.requests, asked.pipeline)
    count = asked.requests
    print(f"{count} requests: {calls / count:.0f} calls, {changes.total() / count:.1f} changes of room a request")
    for (caller, called), times in changes.most_common(SHOWN):
        print(f"{times / count:7.2f}  {caller} -> {called}")


if __name__ == "__main__":
    main()
