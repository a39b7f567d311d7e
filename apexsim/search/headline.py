"""The answer in words: the best plan, and by what margin over the second and over what most people would take."""

from __future__ import annotations

from apexsim.search.judging import Row
from apexsim.search.objective import Objective
from apexsim.search.study import Study

USUAL = "the usual choice (largest tensor degree in a node)"


def headline(study: Study) -> str:
    """One sentence on the best plan, or on why there is none."""
    if study.winner is None:
        return _no_winner(study)
    best, objective = study.winner, study.question.objective
    parts = [f"best by {objective.name}: {best.candidate.name}, {objective.title} {_value(best, objective)}"]
    second = study.rows[1] if len(study.rows) > 1 else None
    if second is None or second.outcome.verdict != "ok":
        parts.append("no other plan keeps the SLO")
    else:
        parts.append(f"{_compare(objective, best, second)} the second, {second.candidate.name}")
    parts.append(_versus_usual(objective, best, usual_choice(study)))
    if idle := study.question.space.base.cluster.devices - best.candidate.devices:
        parts.append(f"{idle} devices stand idle")
    if best.outcome.reason:
        parts.append(best.outcome.reason)
    parts += best.candidate.plan.assumptions
    if best.candidate.plan.tensor > study.question.space.base.cluster.devices_per_node:
        parts.append("estimated: collectives of tensor ranks on several nodes")
    return "; ".join(parts)


def usual_choice(study: Study) -> Row | None:
    """What needs no search: tensor parallel as wide as is lawful in a node, then pipeline stages, then replicas; all
    devices used, no expert or attention-data parallelism. None when no such plan is lawful."""
    devices = study.question.space.base.cluster.devices
    lawful = [row for row in study.rows if not row.candidate.reasons and row.candidate.devices == devices]
    node = study.question.space.base.cluster.devices_per_node
    inside = [row for row in lawful if row.candidate.plan.tensor <= node]
    plain = [row for row in inside if row.candidate.plan.expert == row.candidate.plan.attention_data == 1]
    return max(plain, key=lambda row: (row.candidate.plan.tensor, row.candidate.plan.pipeline), default=None)


def margin(objective: Objective, best: Row, other: Row) -> float | None:
    """How much better the figure of ``best`` is, as a share of that of ``other``; None when one is not known."""
    mine, theirs = (objective.value(row.outcome.figures) for row in (best, other))
    if mine is None or not theirs:
        return None
    return mine / theirs - 1 if objective.highest else 1 - mine / theirs


def _no_winner(study: Study) -> str:
    first = study.rows[0]
    if first.outcome.verdict == "misses_slo":
        return f"no plan keeps the SLO; the nearest is {first.candidate.name}: {first.outcome.reason}"
    return f"no plan could run; {first.candidate.name}: {first.outcome.reason}"


def _versus_usual(objective: Objective, best: Row, usual: Row | None) -> str:
    if usual is None:
        return "the usual choice is not lawful here"
    if usual is best:
        return f"it is {USUAL}"
    compared = f"{_compare(objective, best, usual)} {USUAL}, {usual.candidate.name}"
    verdict = {"ok": "", "misses_slo": ", which misses the SLO"}.get(usual.outcome.verdict, ", which does not run")
    return compared + verdict


def _compare(objective: Objective, best: Row, other: Row) -> str:
    gap = margin(objective, best, other)
    if gap is None:
        return "not comparable with"
    better, worse = ("above", "below") if objective.highest else ("below", "above")
    return f"{abs(gap):.1%} {better if gap >= 0 else worse}"


def _value(row: Row, objective: Objective) -> str:
    value = objective.value(row.outcome.figures)
    return "unknown" if value is None else f"{value:.4g} {objective.unit}"
