"""The server: what one replica of a pool is, every question settled. Costs and memory are worked out from it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from apexsim.specs.base import Spec
from apexsim.specs.cluster import NodeGroup
from apexsim.specs.device import DeviceProfile
from apexsim.specs.engine import EngineProfile, SchedulerDefaults, token_budget
from apexsim.specs.model import ModelSpec
from apexsim.specs.placement import Spans
from apexsim.specs.plan import Phase, Plan

if TYPE_CHECKING:
    from apexsim.specs.workload import Requests

TokenChoice = Literal["greedy", "top_p"]
Prompts = Literal["text", "random_tokens"]


class Load(NamedTuple):
    """What of its requests an engine is configured for: their longest prompt in tokens, and how many run together.

    ``concurrency`` None: nothing bounds it but the seats.
    """

    longest_prompt: int
    concurrency: int | None

    @classmethod
    def of(cls, requests: Requests) -> Load:
        """The load of these requests."""
        return cls(int(requests.distinct_prompts[-1]), requests.concurrency)


class Server(Spec):
    """One replica of the pool named ``pool``: whole values, nothing left to look up.

    ``group``: the nodes that the pool lies on, and ``spans`` how many of them its groups of ranks do. ``weights``,
    ``expert_weights`` and ``kv_cache`` are dtypes. ``Deployment.servers`` makes them, of lawful plans only.
    """

    pool: str
    phases: tuple[Phase, ...]
    model: ModelSpec
    group: NodeGroup
    engine: EngineProfile
    plan: Plan
    spans: Spans
    weights: str
    expert_weights: str
    kv_cache: str
    sampling: TokenChoice
    prompts: Prompts

    def __repr__(self) -> str:
        """What it is in a line: ``model_dump`` gives the whole."""
        return f"<Server {self.pool}: {self.described}>"

    __str__ = __repr__

    @property
    def device(self) -> DeviceProfile:
        """What it runs on, ``plan.devices`` of them."""
        return self.group.device

    @property
    def described(self) -> str:
        """Model, device, plan and engine, for people to read."""
        return f"{self.model.name} on {self.device.name}, {self.plan.name}, {self.engine.name}"

    @property
    def context_limit(self) -> int:
        """Most tokens of prompt and output together that a request may have."""
        return min(self.model.max_context, self.engine.scheduler.max_model_len or self.model.max_context)

    @property
    def rank_scheduler(self) -> SchedulerDefaults:
        """The engine's scheduler settings for this context limit, every one resolved, on an attention-data rank."""
        return self.engine.scheduler_for(self.context_limit, self.device.name, self.device.datasheet)

    @property
    def scheduler(self) -> SchedulerDefaults:
        """The same of the whole replica."""
        return self.rank_scheduler.of_ranks(self.plan.attention_data)

    @property
    def as_published(self) -> bool:
        """Whether the weights are in the dtype of the model's checkpoint."""
        return self.model.checkpoint is not None and self.weights == self.model.checkpoint.dtype

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What is taken for granted of the weights and the plan, for people to read."""
        checkpoint = self.model.checkpoint if self.as_published else None
        if checkpoint is None:
            return self.plan.assumptions
        published = f"weights as {self.model.name} was published: {checkpoint.described}"
        return (published, *checkpoint.notes, *self.plan.assumptions)

    def for_load(self, load: Load) -> Server:
        """This server with its token budget set by its engine's rule, if it has one, for a load.

        As many sequences are counted as run together: the load's concurrency, or all seats where it has no bound.
        """
        scheduler = self.rank_scheduler
        if scheduler.token_budget_rule is None:
            return self
        seats, ranks = scheduler.max_num_seqs, self.plan.attention_data
        sequences = seats if load.concurrency is None else min(seats, -(-load.concurrency // ranks))
        budget = token_budget(prompt_tokens=load.longest_prompt, sequences=sequences)
        return self.model_copy(update={"engine": self.engine.with_token_budget(budget)})
