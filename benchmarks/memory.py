"""Peak memory of a run whose workload is read from a parquet file and whose tables are written to a folder.

    python benchmarks/memory.py --requests 1000000 [--replicas 1]

Prints one JSON object: requests, replicas, the peak resident set in megabytes (``VmHWM``, Linux) and seconds. The load
is light (32 to 96 prompt and 4 to 12 output tokens, 100 requests a second and replica), so that a million takes about
two minutes. Each figure needs a process of its own: a peak never falls.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RATE_PER_S = 100.0
ROWS = 1 << 16


def write_load(path: Path, *, requests: int, rate_per_s: float) -> None:
    """A request file, written a part at a time."""
    rng, begun_s, writer = np.random.default_rng(0), 0.0, None
    for first in range(0, requests, ROWS):
        count = min(ROWS, requests - first)
        arrival_s = begun_s + np.cumsum(rng.exponential(1 / rate_per_s, count))
        begun_s = float(arrival_s[-1])
        prompts, outputs = rng.integers(32, 97, count), rng.integers(4, 13, count)
        table = pa.table({"arrival_s": arrival_s, "prompt_tokens": prompts, "output_tokens": outputs})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def measure(folder: Path, *, requests: int, replicas: int) -> dict[str, float]:
    """Serve the load of ``folder`` and save the result beside it."""
    import apexsim

    began_s = time.perf_counter()
    deployment = apexsim.deployment(model="llama-3.1-8b", device="h100-sxm", replicas=replicas)
    result = apexsim.simulate(deployment, apexsim.workload(folder / "load.parquet"))
    result.save(folder / "result")
    finished = result.summary()["requests"]["finished"]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {
        "requests": requests,
        "replicas": replicas,
        "finished": finished,
        "peak_mb": round(peak_mb, 1),
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_load(path / "load.parquet", requests=asked.requests, rate_per_s=RATE_PER_S * asked.replicas)
        print(json.dumps(measure(path, requests=asked.requests, replicas=asked.replicas)))


if __name__ == "__main__":
    main()
