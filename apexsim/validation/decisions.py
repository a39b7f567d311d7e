"""Would the predictions have chosen well? Among measured plans and concurrencies, the most tokens per device in time.

A question is one (model, device, engine, dtype, lengths) with two or more plans, and a limit on TPOT: one of five
percentiles of the TPOT measured there. A chooser takes the row with the most output tokens/s per device among those it
believes to keep the limit (the fastest where it believes in none). Regret is the share of the best row's rate that is
lost; a choice whose measured TPOT breaks the limit by more than 5 % loses all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apexsim.validation.scores import EXCLUDED

if TYPE_CHECKING:
    import pandas as pd

PERCENTILES = (20, 35, 50, 65, 80)
TOLERATED = 1.05
SUMMARY = ["chooser", "questions", "right", "mean_regret", "p90_regret"]
_SAME_QUESTION = (
    "set", "model", "device", "engine", "weight_dtype", "prompt_tokens", "output_tokens", "length_range_ratio",
)  # fmt: skip
BY_MODEL = ("model_kind", "engine", "device", "model")
_PLAN = ("tensor", "pipeline", "expert", "attention_data")

# Rows of a question and its limit in seconds -> position of the row chosen.
Chooser = Callable[["pd.DataFrame", float], "int | None"]


def decisions(table: pd.DataFrame) -> pd.DataFrame:
    """One row a question: its group, its limit, and for each chooser its regret (NaN where it has no numbers).

    ``table`` is that of ``scores.with_parts``. Only closed loops that say their devices and tensor
    degree have a question; excluded rows are no answers.
    """
    import pandas as pd

    found: list[dict[str, Any]] = []
    for names, group in _groups(table):
        for percentile in PERCENTILES:
            limit_s = float(np.percentile(group["tpot_mean_s"], percentile))
            regrets = {name: _regret(group, limit_s, choose) for name, choose in CHOOSERS.items()}
            asked = {"rows": len(group), "percentile": percentile, "limit_s": limit_s}
            found.append({**names, "model_kind": group["model_kind"].iloc[0], **asked, **regrets})
    return pd.DataFrame(found)


def summary(decided: pd.DataFrame) -> pd.DataFrame:
    """One row a chooser: questions answered, share right, mean regret and its 90th percentile, in percent."""
    import pandas as pd

    rows = []
    for name in CHOOSERS if len(decided) else ():
        regrets = decided[name].dropna()
        if len(regrets):
            figures = [100 * (regrets <= 0).mean(), 100 * regrets.mean(), 100 * regrets.quantile(0.9)]
            rows.append([name, len(regrets), *figures])
    return pd.DataFrame(rows, columns=SUMMARY)


def summary_by_model(decided: pd.DataFrame) -> pd.DataFrame:
    """The same for predictions alone, one row a kind of model, engine, device and model; most regret in all first."""
    import pandas as pd

    if decided.empty:
        return pd.DataFrame(columns=[*BY_MODEL, *SUMMARY[1:]])
    parts = [summary(group).head(1).assign(**dict(zip(BY_MODEL, map(str, names), strict=True)))
             for names, group in decided.groupby(list(BY_MODEL), sort=True)]  # fmt: skip
    found = pd.concat(parts)
    lost = found["questions"] * found["mean_regret"]
    return found.iloc[np.argsort(-lost.to_numpy(), kind="stable")][[*BY_MODEL, *SUMMARY[1:]]]


def _groups(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    used = (table["workload"] == "closed_loop") & (table["part"] != EXCLUDED) & (table["tpot_mean_s"] > 0)
    asked = table[used & (table["ttft_mean_s"] > 0)]
    if asked.empty:
        return
    # A column that no file has is one that every row leaves empty.
    rows = _with_rates(asked.reindex(columns=list(dict.fromkeys((*asked, *_SAME_QUESTION, *_PLAN, "gpus")))))
    rows = rows.dropna(subset=["rate", "tensor"])
    for names, group in rows.groupby(list(_SAME_QUESTION), sort=True, dropna=False):
        if group["plan"].nunique() > 1:
            yield dict(zip(_SAME_QUESTION, names, strict=True)), group.reset_index(drop=True)


def _with_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with their plan and, as measured, predicted and by the peer, output tokens/s per device of a closed loop."""
    import pandas as pd

    numbers = {key: pd.to_numeric(rows[key]) for key in ("concurrency", "output_tokens", "tensor", "gpus")}
    ratio = pd.to_numeric(rows["length_range_ratio"]).fillna(1.0)
    outputs = numbers["output_tokens"] * (1 + ratio) / 2
    rates = {}
    for prefix in ("", "predicted_", "peer_"):
        life_s = rows[f"{prefix}ttft_mean_s"] + (outputs - 1) * rows[f"{prefix}tpot_mean_s"]
        rates[f"{prefix}rate"] = numbers["concurrency"] * outputs / life_s / numbers["gpus"]
    plans = ["-".join(map(str, plan)) for plan in rows[list(_PLAN)].itertuples(index=False)]
    return rows.assign(**rates, plan=plans, tensor=numbers["tensor"], gpus=numbers["gpus"])


def _regret(group: pd.DataFrame, limit_s: float, choose: Chooser) -> float:
    """Share of the best rate that a choice loses; NaN where the chooser has no numbers."""
    chosen = choose(group, limit_s)
    if chosen is None:
        return math.nan
    tpot_s, rate = group["tpot_mean_s"].to_numpy(), group["rate"].to_numpy()
    best = float(rate[tpot_s <= limit_s].max())
    return 1.0 if tpot_s[chosen] > TOLERATED * limit_s else max(0.0, 1 - float(rate[chosen]) / best)


@dataclass(frozen=True)
class ByNumbers:
    """Believes the numbers with this prefix; chooses nothing unless every row of the question has them."""

    prefix: str

    def __call__(self, group: pd.DataFrame, limit_s: float) -> int | None:
        tpot_s = group[f"{self.prefix}tpot_mean_s"].to_numpy()
        rate = group[f"{self.prefix}rate"].to_numpy()
        if np.isnan(tpot_s).any() or np.isnan(rate).any():
            return None
        keeps = tpot_s <= limit_s
        return int(np.argmax(np.where(keeps, rate, -1.0)) if keeps.any() else np.argmin(tpot_s))


@dataclass(frozen=True)
class ByPlan:
    """Knows which rows keep the limit; takes the plan with the most (``sign`` 1) or least (-1) ``key``, at its best."""

    key: str
    sign: int

    def __call__(self, group: pd.DataFrame, limit_s: float) -> int | None:
        keeps = group["tpot_mean_s"].to_numpy() <= limit_s
        wanted = np.where(keeps, self.sign * group[self.key].to_numpy(), -np.inf)
        return int(np.argmax(np.where(wanted == wanted.max(), group["rate"].to_numpy(), -1.0)))


CHOOSERS: dict[str, Chooser] = {
    "apexsim": ByNumbers("predicted_"),
    "peer": ByNumbers("peer_"),
    "largest tensor": ByPlan("tensor", 1),
    "fewest devices": ByPlan("gpus", -1),
}
