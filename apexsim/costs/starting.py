"""Whether an engine would start: the context it serves with, seats with room for their states, or what would do."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from apexsim.costs.memory import MemoryPlan, plan_memory
from apexsim.errors import InfeasiblePlan
from apexsim.specs.cluster import DEVICES_PER_NODE
from apexsim.specs.placement import spans
from apexsim.specs.server import Server

# Nodes over which a hint spreads tensor ranks.
MOST_NODES = 4


@dataclass(frozen=True, slots=True)
class Started:
    """A server as its engine serves, and its memory.

    ``options`` are what the engine must be told to start, and ``notes`` why; empty where it starts as it was asked to.
    """

    server: Server
    memory: MemoryPlan
    options: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def start(server: Server) -> Started:
    """Start a server's engine, if it would: one sequence as long as the context must fit in the KV cache.

    Where no ``max_model_len`` is given and the model's own context does not fit, the longest that does is taken, with a
    note; so is it where the engine starts with any. Seats that no option gives yield to the states of recurrent layers
    in the same way. Raises ``InfeasiblePlan`` with what would do: a ``max_model_len`` in place of one that does not
    start, fewer seats, the smallest tensor degree that would start. A ``max_model_len`` beyond the model's context
    counts as that context, with a note: engines take more only when they are told to. Other options that a person gave
    and that change nothing are noted as well.
    """
    started = _started(server)
    return replace(started, notes=(*_without_effect(server, started.memory), *started.notes))


def _without_effect(server: Server, memory: MemoryPlan) -> Iterator[str]:
    """Options that a person gave and that change nothing here, and why."""
    scheduler, given, model = server.engine.scheduler, server.engine.given, server.model
    asked, own = scheduler.max_model_len, model.max_context
    if asked is not None and asked > own:
        yield f"max_model_len {asked:,} is more than the context of {model.name}: {own:,} holds"
    if "prefix_caching" in given and scheduler.prefix_caching and not memory.steady:
        yield f"prefix_caching has no effect: layers of {model.name} hold unequal caches"
    if server.plan.pipeline > 1 and "receive_interval" in given and scheduler.receive_interval > 1:
        yield "receive_interval has no effect: a pipeline looks at arrivals in every step"
    if server.plan.pipeline > 1 and "lookahead_steps" in given and scheduler.lookahead_steps:
        yield "lookahead_steps has no effect: the other batches of a pipeline hide the host"


def _started(server: Server) -> Started:
    """The same, but for that note."""
    wanted, asked = server.context_limit, server.engine.scheduler.max_model_len
    explicit = asked is not None and server.engine.memory.context_must_fit
    shortage: tuple[str, ...] = ()
    try:
        memory = plan_memory(server)
    except InfeasiblePlan as error:
        shortage = error.reasons
    else:
        if memory.holds(wanted):
            return _seated(Started(server, memory))
    longest = _longest_below(server, wanted)
    if explicit or not longest:
        raise InfeasiblePlan([_refusal(server, shortage, longest)])
    reduced = _with_context(server, longest)
    note = f"max_model_len {longest:,}: a context of {wanted:,} tokens does not fit in the KV cache"
    memory, notes = plan_memory(reduced), (f"{note}; longer requests are rejected",)
    return _seated(Started(reduced, memory, {"max_model_len": longest}, notes))


def _refusal(server: Server, shortage: tuple[str, ...], longest: int) -> str:
    """Why the engine does not start, and what would do."""
    would_do = []
    if longest:
        would_do.append(f"needs max_model_len <= {longest:,}")
    elif seats := _most_seats(server):
        would_do.append(f"starts with max_num_seqs <= {seats:,}")
    if degree := _smallest_tensor(server):
        would_do.append(f"starts with tensor degree {degree}")
    why = "; ".join(shortage) or f"a context of {server.context_limit:,} tokens does not fit in the KV cache"
    return "; ".join(filter(None, (why, ", or ".join(would_do))))


def _seated(started: Started) -> Started:
    """The same engine, with no more seats than states of recurrent layers fit, where it refuses more.

    Seats given as an option stand: with too many of them the engine does not start.
    """
    server, memory = started.server, started.memory
    needed = memory.fixed_blocks if server.engine.memory.seats_need_states else 0
    seats, room = server.rank_scheduler.max_num_seqs, memory.rank_blocks // max(1, needed)
    if not needed or seats <= room:
        return started
    if "max_num_seqs" in server.engine.given or not room:
        states = f"states of recurrent layers for {room:,} sequences fit, not for max_num_seqs {seats:,}"
        raise InfeasiblePlan([f"{states}; needs max_num_seqs <= {room:,}"])
    # Fewer seats leave more memory, never less: what is planned for them holds at least as many states.
    fewer = _with_seats(server, room)
    note = f"max_num_seqs {room:,}: states of recurrent layers for {seats:,} sequences do not fit"
    options, notes = {**started.options, "max_num_seqs": room}, (*started.notes, note)
    return Started(fewer, plan_memory(fewer), options, notes)


def _longest_below(server: Server, wanted: int) -> int:
    """Longest context in whole blocks, shorter than ``wanted``, that starts; 0 where none does.

    Scheduler settings may follow from the context, and what is left for the cache from them: so contexts are tried. The
    first guess is what the cache holds under the context that is wanted, which is the answer where nothing follows.
    """
    size = server.scheduler.block_size
    most = (wanted - 1) // size
    guess = min(most, _capacity(server, wanted) // size)
    if guess and _starts(server, guess * size) and (guess == most or not _starts(server, (guess + 1) * size)):
        return guess * size
    return size * bisect_right(range(1, most + 1), False, key=lambda blocks: not _starts(server, blocks * size))


def _capacity(server: Server, context: int) -> int:
    """Longest sequence that the cache holds when the engine is asked for a context; 0 where nothing fits."""
    settled = _with_context(server, context)
    try:
        longest = plan_memory(settled).max_tokens
    except InfeasiblePlan:
        return 0
    return context if longest is None else longest


def _starts(server: Server, context: int) -> bool:
    return _capacity(server, context) >= context


def _with_context(server: Server, context: int) -> Server:
    engine = server.engine
    scheduler = engine.scheduler.model_copy(update={"max_model_len": context})
    return server.model_copy(update={"engine": engine.model_copy(update={"scheduler": scheduler})})


def _smallest_tensor(server: Server) -> int | None:
    """Smallest higher tensor degree under which a server starts as it was asked for, or at all where it may choose.

    Its cluster has as many nodes of the same devices as it takes, of ``DEVICES_PER_NODE`` unless its own are larger.
    """
    per_node = max(DEVICES_PER_NODE, server.group.devices_per_node)
    inside, beyond = range(1, per_node + 1), range(2 * per_node, MOST_NODES * per_node + 1, per_node)
    degrees: list[int] = [degree for degree in (*inside, *beyond) if degree > server.plan.tensor]
    for tensor in degrees:
        plan = server.plan.model_copy(update={"tensor": tensor})
        room = {"devices_per_node": per_node, "nodes": -(-plan.devices // per_node)}
        group = server.group.model_copy(update=room)
        tried = server.model_copy(update={"group": group, "plan": plan, "spans": spans(plan, per_node)})
        if not plan.lawful(server.model, group) and _fits(tried):
            return tensor
    return None


def _most_seats(server: Server) -> int:
    """Most seats, fewer than it has, with which a replica has room for a cache; 0 where none leave any.

    An engine that samples for all its seats before it sizes its cache keeps that memory.
    """
    seats = server.rank_scheduler.max_num_seqs
    return bisect_right(range(1, seats), False, key=lambda fewer: not _fits(_with_seats(server, fewer)))


def _with_seats(server: Server, seats: int) -> Server:
    engine = server.engine
    scheduler = engine.scheduler.model_copy(update={"max_num_seqs": seats})
    changes = tuple(change.model_copy(update={"max_num_seqs": None}) for change in engine.changes)
    return server.model_copy(update={"engine": engine.model_copy(update={"scheduler": scheduler, "changes": changes})})


def _fits(server: Server) -> bool:
    if server.engine.scheduler.max_model_len is not None:
        return _starts(server, server.context_limit)
    try:
        return plan_memory(server).blocks > 0
    except InfeasiblePlan:
        return False
