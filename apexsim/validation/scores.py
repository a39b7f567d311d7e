"""How far predictions are from what was measured, by group, beside another simulator's on the same rows.

Errors are relative to the measured figure, in percent: ``mape`` mean of their size, ``median`` of their size, ``bias``
their mean. Every row belongs to one ``part``: rows that a set marks for exclusion, rows whose engine version no profile
names and rows of requests with images or video are reported apart, never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from apexsim.validation.runs import MEASURED, PEER_SCORED

if TYPE_CHECKING:
    import pandas as pd

SCORED, UNVERSIONED, MULTIMODAL, EXCLUDED = "scored", "version not known", "images or video", "excluded"
PARTS = (SCORED, UNVERSIONED, MULTIMODAL, EXCLUDED)
BY_CLASS = ("set", "part", "model_kind")
BY_ENGINE = ("set", "part", "engine", "device", "model_kind")
BY_UNIT = ("set", "part", "engine", "device", "model")
ERRORS = ("rows", "predicted", "mape", "median", "bias", "peer_rows", "on_peer_rows", "peer_mape")

_MULTIMODAL_TASKS = ("image-chat", "video-chat")
Floats = npt.NDArray[np.float64]


def with_parts(table: pd.DataFrame) -> pd.DataFrame:
    """The table of replayed rows with ``part``, and with measured, predicted and peer columns as numbers.

    Where no peer predicts power and energy, a yardstick stands in: every device draws the mean power measured for its
    kind with models of that kind.
    """
    import pandas as pd

    numbers = [f"{prefix}{name}" for name in MEASURED for prefix in ("", "peer_", "predicted_")]
    table = table.assign(**{name: pd.to_numeric(_column(table, name)) for name in numbers})
    parts = np.where(table["version_known"], SCORED, UNVERSIONED).astype(object)
    parts[np.isin(_column(table, "task", "").to_numpy(), _MULTIMODAL_TASKS)] = MULTIMODAL
    parts[_column(table, "exclude", "").fillna("").to_numpy() != ""] = EXCLUDED
    table = table.assign(part=parts)
    devices = pd.to_numeric(_column(table, "gpus"))
    per_device_w = (table["power_w"] / devices).groupby([table[key] for key in ("set", "part", "device", "model_kind")])
    constant_w = per_device_w.transform("mean") * devices
    constant_j = constant_w / table["output_tokens_per_s"]
    yardsticks = {"peer_power_w": constant_w, "peer_energy_per_output_token_j": constant_j}
    return table.assign(**{name: table[name].fillna(values) for name, values in yardsticks.items()})


def score(table: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """One row a group and measured figure; groups in order of their names. ``table`` is that of ``with_parts``.

    ``rows`` hold the figure, ``predicted`` of them have a prediction; ``peer_rows`` have the peer's too, and on those
    ``on_peer_rows`` is ours and ``peer_mape`` the peer's. Rows whose TTFT alone is excluded count under ``excluded``.
    """
    import pandas as pd

    found: list[dict[str, Any]] = []
    for name in MEASURED:
        rows = table[table[name] > 0]
        if name == "ttft_mean_s":
            apart = _column(rows, "exclude_ttft", "").fillna("") != ""
            rows = rows.assign(part=rows["part"].where(~apart, EXCLUDED))
        for names, group in rows.groupby(list(by), sort=True):
            found.append({**dict(zip(by, names, strict=True)), "figure": name, **_errors(group, name)})
    return pd.DataFrame(found, columns=[*by, "figure", *ERRORS])


def ahead_of_peer(scores: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Figure -> (groups in which our MAPE is below the peer's, groups that have a peer), over groups that are scored.

    Rows whose engine version is not known form groups of their own.
    """
    found = {}
    rows = scores[scores["part"].isin((SCORED, UNVERSIONED)) & (scores["peer_rows"] > 0)]
    for name in PEER_SCORED:
        groups = rows[rows["figure"] == name]
        if len(groups):
            found[name] = int((groups["on_peer_rows"] < groups["peer_mape"]).sum()), len(groups)
    return found


def relative_errors(predicted: pd.Series, measured: pd.Series) -> Floats:
    """Signed errors in percent; NaN where there is no prediction."""
    return np.asarray(100 * (predicted / measured - 1), dtype=float)


def _errors(group: pd.DataFrame, name: str) -> dict[str, float]:
    ours = relative_errors(group[f"predicted_{name}"], group[name])
    peers = relative_errors(group[f"peer_{name}"], group[name])
    known, both = ours[np.isfinite(ours)], np.isfinite(ours) & np.isfinite(peers)
    return {
        "rows": len(group),
        "predicted": len(known),
        "mape": _mean(np.abs(known)),
        "median": float(np.median(np.abs(known))) if len(known) else np.nan,
        "bias": _mean(known),
        "peer_rows": int(both.sum()),
        "on_peer_rows": _mean(np.abs(ours[both])),
        "peer_mape": _mean(np.abs(peers[both])),
    }


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else np.nan


def _column(table: pd.DataFrame, name: str, missing: Any = np.nan) -> pd.Series:
    import pandas as pd

    return table[name].replace("", missing) if name in table else pd.Series(missing, index=table.index)
