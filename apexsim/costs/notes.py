"""What a result says of its step costs: what crosses nodes, which kernels stand in, which are newer than the engine."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.version import Version

from apexsim.costs.operators import Collective, Experts, RowOperator
from apexsim.costs.steps import StepCost, fitted_operators
from apexsim.versions import begins, version_in

# An engine and its version in the source of a fitted operator, such as "gemm.parquet (vllm 0.24.0)".
_TIMED_ON = re.compile(r"\b(?P<engine>vllm|sglang|trtllm) (?P<version>\d[\w.]*)", re.IGNORECASE)

# Operators whose kernels depend on the dtype of weights, as people call them.
_WEIGHTED = {"gemm": "products", "moe": "experts"}


def cost_notes(cost: StepCost) -> tuple[str, ...]:
    """Notes on a pool's step costs, for people to read; none where there is nothing to say."""
    return (*_across_nodes(cost), *_stand_ins(cost), *_estimated_weights(cost), *_newer_kernels(cost))


def _across_nodes(cost: StepCost) -> Iterator[str]:
    """Collectives and hand-overs that leave a node, and whether anybody measured them so."""
    stages = cost.lowered.stages
    crossing = [op for op in _operators(cost) if isinstance(op, Collective) and op.crosses_nodes]
    for kind, key, nodes in sorted({(op.kind, op.key, op.nodes) for op in crossing}):
        estimated = "estimated: " if cost.tables.costs.evidence(kind, key) == "estimated" else ""
        if nodes > 1:
            yield f"{estimated}{kind} crosses {nodes} nodes"
        else:
            sends = sum(any(getattr(op, "crosses_nodes", False) for op in stage.once) for stage in stages)
            yield f"{estimated}{sends} of {len(stages) - 1} hand-overs between pipeline stages cross nodes"


def _stand_ins(cost: StepCost) -> Iterator[str]:
    layers = {op.layer for op in _operators(cost) if isinstance(op, Experts)}
    for dtype, kernel in sorted({(layer.dtype, layer.kernel) for layer in layers if layer.kernel}):
        yield f"estimated: experts in {dtype} take what those in {kernel} do on {cost.tables.costs.profile.name}"


def _estimated_weights(cost: StepCost) -> Iterator[str]:
    """Kernels for a dtype of weights that nobody timed on this device; what stands in for another is told apart."""
    lent = {op.layer.kernel for op in _operators(cost) if isinstance(op, Experts)}
    for kind, key in fitted_operators(cost.lowered):
        told = kind in _WEIGHTED and not (kind == "moe" and key in lent)
        if told and cost.tables.costs.evidence(kind, key) == "estimated":
            yield f"{key} {_WEIGHTED[kind]} of {cost.tables.costs.profile.name} are estimated"


def _newer_kernels(cost: StepCost) -> Iterator[str]:
    """Kernels timed on a later version of the engine than its profile answers for."""
    engine, found = cost.engine, dict[Version, set[str]]()
    last = max(filter(None, map(version_in, engine.versions)), default=None)
    if last is None:
        return
    for kind, key in fitted_operators(cost.lowered):
        timed = _TIMED_ON.findall(cost.tables.costs.operator(kind, key).source)
        for text in (text for name, text in timed if name.lower() == engine.engine):
            version = version_in(text)
            # 0.7.3 is of the series 0.7, and no newer.
            if version and version > last and not begins(text, str(last)):
                found.setdefault(version, set()).add(kind)
    if found:
        tables = [f"{version} ({', '.join(sorted(kinds))})" for version, kinds in sorted(found.items())]
        older = f"{engine.engine} up to {last} ({engine.name}) is older than the tables of kernels"
        yield f"{older}, timed on {'; '.join(tables)}: its own may be slower"


def _operators(cost: StepCost) -> list[RowOperator]:
    return [op for stage in cost.lowered.stages for op in (*(op for op, _ in stage.row_operators()), *stage.head)]
