"""The routed experts of a layer as operators: the router, the experts, and what carries tokens to them and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from apexsim.costs.collectives import copies_sent
from apexsim.costs.fitted import MoeLayer
from apexsim.costs.operators import (
    ACTIVATION_BYTES,
    Collective,
    CollectiveKind,
    Experts,
    Gemm,
    RowOperator,
    Rows,
)
from apexsim.specs.plan import Plan
from apexsim.specs.server import Server

if TYPE_CHECKING:
    from apexsim.specs.experts import MoESpec
    from apexsim.specs.layers import LayerKind

# Measured exchanges of expert layers, by what an engine profile calls them.
EXCHANGES: dict[tuple[str, str], CollectiveKind] = {
    ("all_to_all", "dispatch"): "all_to_all",
    ("all_to_all", "combine"): "all_to_all",
    ("deepep", "dispatch"): "deepep_dispatch",
    ("deepep", "combine"): "deepep_combine",
    ("deepep_ll", "dispatch"): "deepep_ll_dispatch",
    ("deepep_ll", "combine"): "deepep_ll_combine",
    ("trtllm", "dispatch"): "trtllm_dispatch",
    ("trtllm", "combine"): "trtllm_combine",
}


def routed_part(server: Server, kind: LayerKind) -> list[RowOperator]:
    """Router and routed experts of one layer on one rank.

    With ``all_reduce`` every rank holds all tokens already, or gathers those of the other attention-data ranks and
    hands back their sums, and partial sums meet in the closing all-reduce; with any other ``moe_dispatch`` it sends its
    share of the tokens to the ranks of their experts and gets them back.
    """
    model, plan, moe = server.model, server.plan, moe_of(server)
    dtype = model.part_dtype("experts", kind, server.expert_weights)
    random = server.prompts == "random_tokens"
    layer = MoeLayer(
        hidden=model.hidden,
        inter=moe.ffn // plan.moe_tensor,
        topk=moe.active,
        experts=moe.experts,
        ep=plan.expert,
        dtype=dtype,
        routing_exponent=moe.random_routing_exponent if random else moe.routing_exponent,
        gated=model.gated,
        kernel=stand_in_kernel(server, dtype),
    )
    choice_s = server.engine.expert_choice_s(server.device.datasheet)
    experts = Experts("experts", layer, rows=_expert_rows(plan), choice_s=choice_s)
    return [Gemm("router", moe.experts, model.hidden, "bf16"), *_carried(server, experts)]


def stand_in_kernel(server: Server, dtype: str) -> str | None:
    """The dtype whose kernels of experts stand for those of MXFP4, where no others were timed.

    Marlin, which multiplies 4-bit weights in bf16, is what an engine may ask for, and all that devices before Hopper
    have; its int4 kernel reads as many bytes.
    """
    if dtype != "mxfp4":
        return None
    known = server.device.operators.get("moe", {})
    only_int4 = "mxfp4" not in known and "int4_wo" in known
    return "int4_wo" if server.engine.kernels.marlin_experts or only_int4 else None


def dispatches(server: Server) -> bool:
    """Whether tokens travel to their experts; only where every rank holds whole experts."""
    whole = server.plan.expert > 1 and server.plan.moe_tensor == 1
    return whole and server.engine.communication.moe_dispatch != "all_reduce"


def moe_of(server: Server) -> MoESpec:
    """The experts of a model that has some."""
    assert server.model.moe is not None, "a block with experts belongs to a model that has some"
    return server.model.moe


def _expert_rows(plan: Plan) -> Rows:
    return "all_tokens" if plan.attention_data > 1 else "tokens"


def _carried(server: Server, experts: Experts) -> list[RowOperator]:
    """The experts between what brings tokens to them from other ranks and what takes them back."""
    if dispatches(server):
        return [_exchange(server, "dispatch"), experts, _exchange(server, "combine")]
    ranks, width = server.plan.attention_data, ACTIVATION_BYTES * server.model.hidden
    if ranks == 1:
        return [experts]
    nodes = server.spans.attention_data
    gather = Collective("gather", "all_gather", ranks, width, rows="all_tokens", nodes=nodes)
    scatter = Collective("scatter", "reduce_scatter", ranks, width, rows="all_tokens", nodes=nodes)
    return [gather, experts, scatter]


def _exchange(server: Server, phase: Literal["dispatch", "combine"]) -> Collective:
    """Tokens to the ranks of their experts, or back: a copy an expert, or a rank where the library merges copies."""
    library, ranks, active = server.engine.communication.moe_dispatch, server.plan.expert, moe_of(server).active
    copies = copies_sent(active, ranks) if library in ("deepep", "trtllm") else active
    sent, rows = ACTIVATION_BYTES * server.model.hidden * copies / ranks, _expert_rows(server.plan)
    nodes = server.spans.stage
    return Collective(phase, EXCHANGES[library, phase], ranks, sent, rows=rows, nodes=nodes)
