"""``apexsim show memory``: whether an engine would start, and where the memory of a device goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apexsim.cli.facts import table
from apexsim.errors import InfeasiblePlan

if TYPE_CHECKING:
    from rich.table import Table

    from apexsim.costs.starting import Started
    from apexsim.specs.server import Server

_PARTS = {"activations": "a full step", "collective buffers": "collectives"}
_SHARE_OF = {
    "total": "all of it",
    "started": "what is free before weights are loaded",
    "loaded": "what is free once weights are loaded and a full step has run",
}


def whether_it_starts(asked: Server, engine: Started) -> str:
    """``yes``, with what it takes, or ``perhaps not`` where the KV cache may be too small (95 %)."""
    served, memory = engine.server.context_limit, engine.memory
    must_fit = engine.server.engine.memory.context_must_fit
    possible = memory.figures(served)["kv_tokens_range"]
    # Where no length is too much for the cache, it is too small only if nothing is left of it.
    needed = 1 if memory.max_tokens is None or not must_fit else served
    least = None if possible is None else possible[0] // memory.ranks
    shorter = served < asked.context_limit
    if least is not None and least < (1 if shorter else needed):
        holds = f"the KV cache of a replica holds {possible[0]:,} to {possible[1]:,} tokens (95 %)"
        return f"perhaps not: {holds}, and the context (max_model_len) is {served:,}"
    if shorter and not must_fit:
        return f"yes; requests of more than {served:,} tokens are rejected"
    seats = engine.options.get("max_num_seqs")
    told = [f"max_num_seqs {seats:,} or less"] if seats else []
    if shorter:
        sure = f"; {least:,} to be sure at 95 %" if least is not None and least < served else ""
        told.insert(0, f"max_model_len {served:,} or less (the model's own: {asked.model.max_context:,}{sure})")
    return f"yes, with {' and '.join(told)}" if told else "yes"


def memory_table(server: Server, figures: dict[str, Any]) -> Table:
    """What a replica holds, and where the memory of a device goes."""
    from apexsim.units import format_bytes

    device, possible = figures["device"], figures["kv_tokens_range"]
    parts = {"a full step": "activation_bytes", "engine reserve": "reserve_bytes", "collectives": "communication_bytes"}
    rows = [
        ("weights of a replica", format_bytes(figures["weights_bytes"])),
        ("KV cache of a replica", format_bytes(figures["kv_bytes"])),
        ("KV tokens", f"{figures['kv_tokens']:,}"),
        ("95 % interval", f"{possible[0]:,} to {possible[1]:,}" if possible else "-"),
        ("context (max_model_len)", f"{figures['max_model_len']:,}"),
        ("requests of that context at once", f"{figures['max_concurrency_at_context']:.3g}"),
        *_offer_rows(server),
        ("device: weights", format_bytes(device["weights_bytes"])),
        *((f"device: {what}", format_bytes(device[name])) for what, name in parts.items()),
        ("device: KV cache", format_bytes(device["kv_bytes"])),
    ]
    return table(("", server.described), rows)


def refused_table(server: Server) -> Table:
    """The same of an engine that does not start: all that is known, or what a device lacks for any KV cache."""
    from apexsim.costs.memory import needed_bytes, plan_memory
    from apexsim.units import format_bytes

    try:
        plan = plan_memory(server)
    except InfeasiblePlan:
        offered, parts = needed_bytes(server)
        rows = [
            *_offer_rows(server),
            ("device: offered to the engine", format_bytes(offered)),
            *((f"device: {_PARTS.get(what, what)}", format_bytes(size)) for what, size in parts.items() if size),
            ("device: lacks, before any KV cache", format_bytes(sum(parts.values()) - offered)),
        ]
        return table(("", server.described), rows)
    return memory_table(server, plan.figures(server.context_limit))


def _offer_rows(server: Server) -> list[tuple[str, str]]:
    from apexsim.units import format_bytes

    seen, memory = server.device.datasheet.memory_bytes, server.engine.memory
    share = f"{memory.share_on(seen):.3g} of {_SHARE_OF[memory.share_of]}"
    return [("memory that a process sees", format_bytes(seen)), ("share that the engine takes", share)]
