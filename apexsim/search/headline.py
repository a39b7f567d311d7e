"""The answer in words: the best plan, how sure that is, and what it is better than."""

from __future__ import annotations

import numpy as np

from apexsim.reasons import number_of
from apexsim.search.judging import Row
from apexsim.search.objective import Objective
from apexsim.search.study import MOST_DRAWN, Study
from apexsim.search.ties import FEWEST_PARTS, broken_by, half_width, sampling_error, short_rivals

USUAL = "the usual choice (largest tensor degree in a node)"
MOST_NAMED = 3


def headline(study: Study) -> str:
    """One sentence on the best plan, or on why there is none."""
    if study.winner is None:
        return _no_winner(study)
    best, objective = study.winner, study.question.objective
    parts = [f"{_opening(study)}, {_figure(best, objective)}"]
    parts += _fewer(study) if objective.any_devices else _margins(study)
    parts += _resolved(study) + _idle(study) + list(study.started.notes if study.started else ())
    # Where the opening says how many requests would do, the reason says it again for one plan.
    if best.outcome.reason and not (study.decision == "short" and _wanted(study)):
        parts.append(best.outcome.reason)
    if (drawn := len(study.question.requests)) > study.asked:
        parts.append(f"{number_of(drawn, 'request')} drawn in place of {study.asked:,}: windows were too short")
    parts += best.candidate.plan.assumptions
    if best.candidate.plan.tensor > study.question.space.base.cluster.devices_per_node:
        parts.append("estimated: collectives of tensor ranks on several nodes")
    return "; ".join(parts)


def _idle(study: Study) -> list[str]:
    """How many devices are not needed, and whether they are paid for all the same; or that fewer were not tried."""
    assert study.best is not None
    cluster, said = study.best.cluster, []
    if not study.question.space.allow_idle and study.question.objective.half_width and cluster.devices > 1:
        said.append("plans on fewer devices were not looked at (--allow-idle)")
    if idle := cluster.devices - study.best.devices_used:
        paid = study.best.billed_devices - study.best.devices_used
        which = "" if paid == idle else f"{paid} of them {'is' if paid == 1 else 'are'} "
        beside = f", but {which}paid for (bill: {study.best.bill})"
        said.append(f"{number_of(idle, 'device')} {'is' if idle == 1 else 'are'} not needed" + beside * bool(paid))
    return said


def _resolved(study: Study) -> list[str]:
    """That plans are told apart by their resolution alone, where no sampling error of the nearest two is known."""
    objective, ran = study.question.objective, [row for row in study.rows if row.outcome.verdict == "ok"]
    if len(ran) < 2 or objective.any_devices or sampling_error(ran[0], ran[1], objective) is not None:
        return []
    return [f"plans tie within {objective.resolution:.1%} only, as no sampling error of theirs is known"]


def _opening(study: Study) -> str:
    """Who is first, and whether that is a win."""
    name, by = study.leaders[0].candidate.name, study.question.objective.name
    match study.decision:
        case "short":
            return f"too short to say which plan is best by {by}{_would_do(study)}: first is {name}"
        case "equal":
            return f"equal by {by} and by all that breaks ties: {_names(study.leaders)}: first is {name}"
        case "tie":
            return f"a tie by {by}: {_names(study.leaders)}; {name} is first by {_break(study)}"
    return f"best by {by}: {name}"


def _would_do(study: Study) -> str:
    """What would make windows long enough."""
    said = [f"about {wanted:,.0f} requests would do"] if (wanted := _wanted(study)) else []
    if study.question.supply.grows:
        said.append(f"more than the {MOST_DRAWN:,} that a search draws by itself: give --requests")
    return f" ({', '.join(said)})" if said else ""


def _wanted(study: Study) -> float | None:
    """The most requests that a window of a plan which may be best wants; None where that is not known."""
    objective = study.question.objective
    wanted = [objective.wanted_requests(row.outcome.figures) for row in short_rivals(study.rows, objective)]
    return max((count for count in wanted if count is not None), default=None)


def _break(study: Study) -> str:
    """The figure that broke the tie, of the first and of the second."""
    by = broken_by(study.leaders, study.question.objective.breaks)
    assert by is not None, "a tie that nothing breaks is equal"
    mine, theirs = (row.outcome.figures.get(by.column) for row in study.leaders[:2])
    said = ["unknown" if value is None else by.form.format(value) for value in (mine, theirs)]
    return f"{by.title} ({said[0]}, the next {said[1]})"


def _names(rows: tuple[Row, ...]) -> str:
    names = [row.candidate.name for row in rows[:MOST_NAMED]]
    if more := len(rows) - len(names):
        names.append(f"{more} more")
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _margins(study: Study) -> list[str]:
    """By how much the first plan is ahead of the next that does not tie with it, and of the usual choice."""
    best, objective = study.rows[0], study.question.objective
    rest = [row for row in study.rows[len(study.leaders) :] if row.outcome.verdict == "ok"]
    usual = usual_choice(study)
    if not rest:
        alone = [f"no other plan {_kept(study)}"] if len(study.leaders) == 1 else []
        return [*alone, _versus_usual(study, usual)]
    order = "next" if len(study.leaders) > 1 else "second"
    ahead = f"{_compare(objective, best, rest[0])} the {order}, {rest[0].candidate.name}{_doubt(rest[0], objective)}"
    return [f"{ahead}, which is {USUAL}"] if rest[0] is usual else [ahead, _versus_usual(study, usual)]


def _fewer(study: Study) -> list[str]:
    """What the best plan with one device fewer misses."""
    count = study.rows[0].candidate.devices - 1
    if not count:
        return ["there are no fewer"]
    nearest = next(row for row in study.rows if row.candidate.devices == count)
    verdict = {"misses_slo": "misses it"}.get(nearest.outcome.verdict, f"is {nearest.outcome.verdict}")
    return [f"with one device fewer the nearest plan, {nearest.candidate.name}, {verdict}: {nearest.outcome.reason}"]


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
        behind = first.outcome.window == "growing" and study.question.objective.lasting
        fails = "keeps up" if behind else _kept(study)
        return f"no plan {fails}; the nearest is {first.candidate.name}: {first.outcome.reason}"
    return f"no plan could run; {first.candidate.name}: {first.outcome.reason}"


def _kept(study: Study) -> str:
    """What a plan that is good enough does."""
    slo = study.question.slo
    return "keeps the SLO" if slo.limited else f"serves {slo.target_words} of requests"


def _versus_usual(study: Study, usual: Row | None) -> str:
    best, objective = study.rows[0], study.question.objective
    if usual is None:
        return "the usual choice is not lawful here"
    if usual is best:
        return f"it is {USUAL}"
    if any(usual is row for row in study.leaders):
        return f"a tie with {USUAL}, {usual.candidate.name}"
    named = f"{USUAL}, {usual.candidate.name}"
    if usual.outcome.verdict == "ok":
        return f"{_compare(objective, best, usual)} {named}"
    # A plan that falls behind has no figure worth comparing: its queue would grow on.
    verdict = "is not good enough" if usual.outcome.verdict == "misses_slo" else "does not run"
    return f"{named}, {verdict}: {usual.outcome.reason}"


def _compare(objective: Objective, best: Row, other: Row) -> str:
    gap = margin(objective, best, other)
    if gap is None:
        return "not comparable with"
    better, worse = ("above", "below") if objective.highest else ("below", "above")
    return f"{abs(gap):.1%} {better if gap >= 0 else worse}"


def _doubt(other: Row, objective: Objective) -> str:
    """The sampling error of a figure that a short window gave."""
    value, error = objective.value(other.outcome.figures), objective.error(other.outcome.figures)
    if not objective.window or other.outcome.window != "short" or not value or error is None:
        return ""
    return f" (whose window is short: +-{error / abs(value):.0%})"


def _figure(row: Row, objective: Objective) -> str:
    """The figure that counts, with its intervals or the word that there is none."""
    value = objective.value(row.outcome.figures)
    if value is None:
        return f"{objective.title} unknown"
    if objective.any_devices:
        return number_of(round(value), "device")
    return f"{objective.title} {value:.4g} {objective.unit} ({_intervals(row, objective, value)})"


def _intervals(row: Row, objective: Objective, value: float) -> str:
    figures, said = row.outcome.figures, []
    if not objective.own_rate:
        said.append(f"a rate {objective.resolution:.0%} higher fails")
    elif value and (error := _sampling_error(row, objective)) is not None:
        said.append(f"95 %: +-{error / abs(value):.1%} from sampling")
    else:
        said.append("its sampling error is not known")
    whole = figures.get(objective.whole) if objective.whole else None
    reach = [figures.get(name) for name in objective.range or ()]
    if whole and len(reach) == 2 and None not in reach:
        low, high = (each / whole - 1 for each in reach if each is not None)
        said.append(f"80 %: {low:+.0%} to {high:+.0%} from errors of the model")
    else:
        said.append("how wrong the model may be for this figure is not known")
    return "; ".join(said)


def _sampling_error(row: Row, objective: Objective) -> float | None:
    """Half-width of the figure that counts: its own, or over the parts of the run; None where neither is known."""
    if (known := objective.error(row.outcome.figures)) is not None:
        return known
    parts = [value for value in row.outcome.batches.get(objective.column, ()) if value is not None]
    return half_width(np.array(parts)) if len(parts) >= FEWEST_PARTS else None
