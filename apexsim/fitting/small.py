"""The sampler and the element-wise kernels, fitted where layers were timed and carried to the other devices.

The element-wise kernels of datacenter devices stay as they are estimated: served runs on Hopper ask for launches inside
a CUDA graph and for bytes at the speed of HBM, and say no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from apexsim.costs.forms.hardware import Array, Coefficient, Coefficients, Hardware
from apexsim.costs.forms.small import ELEMENTWISE, SAMPLING, elementwise_s, sampling_s
from apexsim.fitting import estimates
from apexsim.fitting.facts import Facts, hardware
from apexsim.fitting.fit import fit_coefficients
from apexsim.fitting.gaps import launch_gap_s
from apexsim.fitting.mixed import OWN, RTX_PRO_6000, SINGLE_LAUNCH, Timed
from apexsim.fitting.problems import Operators, summary
from apexsim.fitting.tables import SECONDS_PER_US, read_table, table_version
from apexsim.fitting.timed_models import MODELS, Widths
from apexsim.specs.device import FittedOperator

Bytes = Callable[[Widths, Array], Array | float]


def _rotated(widths: Widths, tp: Array) -> Array:
    """Bytes of a token that go through the rotary embedding, or the norm of queries and keys: read and written."""
    return np.asarray(4 * 128 * (widths.heads / tp + np.maximum(1.0, widths.kv_heads / tp)))


# Layers of the tables by operator, and the bytes that one moves for a token at a tensor degree.
LAYERS: dict[str, tuple[tuple[str, ...], Bytes]] = {
    "norm": (("layernorm", "final_layernorm"), lambda widths, tp: 8.0 * widths.hidden),
    "rope": (("rotary_emb",), _rotated),
    "qk_norm": (("qk_norm",), _rotated),
    "activation": (("act_fn",), lambda widths, tp: 6.0 * (widths.ffn or 0) / tp),
    "embedding": (("embedding",), lambda widths, tp: 4.0 * widths.hidden),
}


def operators(device: Facts, kernels: Path) -> Operators:
    """Sampler and element-wise kernels of a device."""
    return _small(device, kernels) | _quantise(kernels / "datacenter" / device.folder)


def _small(device: Facts, kernels: Path) -> Operators:
    layers = kernels / "vllm_layers"
    if device.folder not in OWN:
        return estimates.operators(device, kernels) | {"sampling": {"any": _sampling(layers, RTX_PRO_6000)}}
    timed = SINGLE_LAUNCH[device.folder]
    rows = pd.concat(list(_elementwise_rows(layers / timed.folder)), ignore_index=True)
    kinds = {name: _elementwise(rows[rows["kind"] == name], timed) for name in LAYERS if (rows["kind"] == name).any()}
    sampling = _sampling(layers, timed)
    own = {"evidence": "fitted", "source": f"vllm_layers/{timed.folder} (vLLM 0.19)"}
    return {
        "elementwise": {"any": _elementwise(rows, timed), **kinds},
        "sampling": {"any": sampling.model_copy(update=own)},
    }


def _elementwise_rows(folder: Path) -> Iterator[pd.DataFrame]:
    """Timed element-wise kernels: ``kind``, ``bytes`` moved, ``seconds`` with the gap before them."""
    gap_s = launch_gap_s(folder.parents[1])
    for model, widths in MODELS.items():
        table = folder / model / "dense.parquet"
        if not table.is_file():
            continue
        frame = read_table(table, ["tp", "tokens", "time_us_per_call"], ["layer"])
        frame["seconds"] = frame["time_us_per_call"] * SECONDS_PER_US + gap_s
        for kind, (names, bytes_of) in LAYERS.items():
            rows = frame[frame["layer"].isin(names)]
            yield rows.assign(kind=kind, bytes=rows["tokens"] * bytes_of(widths, rows["tp"].to_numpy()))


def _elementwise(rows: pd.DataFrame, timed: Timed) -> FittedOperator:
    moved, seconds = rows["bytes"].to_numpy(), rows["seconds"].to_numpy()
    return memory_bound(moved, seconds, timed.hw, f"vllm_layers/{timed.folder} (vLLM 0.19)")


def memory_bound(
    moved: Array, seconds: Array, hw: Hardware, source: str, coefficients: Sequence[Coefficient] = ELEMENTWISE
) -> FittedOperator:
    """Kernels that take ``seconds`` to move bytes, as a launch and two bandwidths."""

    def predict(c: Coefficients) -> Array:
        return elementwise_s(moved, c, hw)

    c = fit_coefficients(predict, seconds, np.ones(len(moved)), coefficients, {})
    return FittedOperator(
        form="elementwise",
        coefficients=c,
        valid={"bytes": (float(moved.min()), float(moved.max()))},
        evidence="fitted",
        source=source,
        rows_used=len(moved),
        quality={"in_sample": summary(np.abs(predict(c) / seconds - 1))},
    )


def _quantise(folder: Path) -> Operators:
    """Finding scales and quantising activations to fp8 (one table has the former alone), where that was measured."""
    tables = [folder / f"{name}.parquet" for name in ("scale_matrix", "compute_scale")]
    if not all(table.is_file() for table in tables):
        return {}
    scaled, found = (read_table(table, ["m", "k", "latency_us"]) for table in tables)
    both = scaled.merge(found, on=["m", "k"])
    seconds = (both["latency_us_x"] + both["latency_us_y"]).to_numpy() * SECONDS_PER_US
    hw = hardware(folder.name, "bf16")
    source = f"{folder.name}/scale_matrix.parquet and compute_scale.parquet ({table_version(tables[0])})"
    moved = 3.0 * (both["m"] * both["k"]).to_numpy()
    return {"quantise": {"fp8": memory_bound(moved, seconds, hw, source)}}


def _sampling(layers: Path, timed: Timed) -> FittedOperator:
    """The sampler at tensor degree 1, as carried over to another device.

    The models were timed with launches of their own (10 us of kernels for two, 25 us for the third, at the same
    slopes): every model keeps its own in the fit, and the median serves.
    """
    frame = _sampler_rows(layers / timed.folder)
    sequences, vocab, seconds = (frame[name].to_numpy() for name in ("sequences", "vocab", "seconds"))
    models = sorted(frame["model"].unique())
    which = np.array([models.index(model) for model in frame["model"]])
    launches = [SAMPLING[0]._replace(name=f"launch_{number}") for number in range(len(models))]

    def predict(c: Coefficients) -> Array:
        own = np.array([c[launch.name] for launch in launches])[which]
        return sampling_s(sequences, vocab, {**c, "launch_s": own}, timed.hw)

    c = fit_coefficients(predict, seconds, np.ones(len(frame)), [*launches, *SAMPLING[1:]], {})
    score = summary(np.abs(predict(c) / seconds - 1))
    shared = {"launch_s": float(np.median([c.pop(launch.name) for launch in launches]))}
    return FittedOperator(
        form="sampling",
        coefficients=shared | c,
        valid={"sequences": (float(sequences.min()), float(sequences.max()))},
        evidence="estimated",
        source=f"fitted on vllm_layers/{timed.folder} (vLLM 0.19), carried over by HBM bandwidth and L2 size",
        rows_used=len(frame),
        quality={f"in_sample_launches_apart_{timed.folder.lower()}": score},
    )


def _sampler_rows(folder: Path) -> pd.DataFrame:
    found = []
    for model, widths in MODELS.items():
        table = folder / model / "per_sequence.parquet"
        if table.is_file():
            frame = read_table(table, ["tp", "sequences", "time_us_per_call"], ["layer"])
            frame = frame[(frame["layer"] == "sampler") & (frame["tp"] == 1)]
            seconds = frame["time_us_per_call"] * SECONDS_PER_US
            found.append(frame.assign(model=model, vocab=float(widths.vocab), seconds=seconds))
    return pd.concat(found, ignore_index=True)
