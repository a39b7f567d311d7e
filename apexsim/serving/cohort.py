"""Requests that decode in step, kept as one.

On one stage every decoding request gets a token in every decode step. A cohort counts those steps once instead of
updating each request at each of them: a member's tokens follow from the count, so that a step costs the same whether 4
or 400 requests decode. The replica dissolves the cohort, which brings its members up to date one by one, whenever they
cannot all march on (budgets or blocks run short); the oracle (``exact_steps``) never forms one.

    member.computed = member.base + step          (known is one more: a member always awaits its next token)
    member samples its last token at step s       when base + s + 1 == total: a heap of those steps
    and the last of those first shown             when base + s + 1 == shown: another
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush

from apexsim.serving.growth import Taking, growth_of
from apexsim.serving.kv_cache import BlockManager
from apexsim.serving.request import Request


class Cohort:
    """``size`` decoding requests after ``step`` common steps; ``context`` sums their computed tokens.

    ``late`` members joined while the others stood still: their next token is stamped singly, because it does not come
    as long after their previous one. ``last_end_ns`` is when everybody else's latest token came, at the end of the step
    composed at count ``last_step``. ``unshown`` members have yet to sample what their client is handed first.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.size = 0
        self.step = 0
        self.context = 0
        self.late: list[Request] = []
        self.last_end_ns = 0
        self.last_step: int | None = None
        self._growth = growth_of(blocks)
        self._leavers: list[tuple[int, int, Request]] = []
        self.unshown: list[tuple[int, int, Request]] = []
        self._joined = 0

    def join(self, request: Request, *, late: bool) -> None:
        """Take in a request that has just sampled by itself; ``late`` if the cohort did not march in that same step."""
        request.base = request.computed - self.step
        request.joined = self.step + 1 if late else self.step
        self._growth.join(request)
        heappush(self._leavers, (request.total - 1 - request.base, self._joined, request))
        if request.known < request.shown:
            heappush(self.unshown, (request.shown - 1 - request.base, self._joined, request))
        self._joined += 1
        self.size += 1
        self.context += request.computed
        if late:
            self.late.append(request)

    def missing(self, steps: int) -> int:
        """Blocks that the members lack to march ``steps`` steps."""
        return self._growth.missing(self.step, steps)

    def most_missing(self, steps: int) -> int:
        """No fewer blocks than the members lack to march ``steps`` steps, now or later."""
        return self._growth.most_missing(steps)

    @property
    def steps_to_leave(self) -> int:
        """Steps until a member samples its last token."""
        return self._leavers[0][0] - self.step

    def lone_leaver(self, steps: int) -> Request | None:
        """The one who samples its last token at step ``steps`` from now, if nobody else does then or one step later."""
        due = self.step + steps
        if len(self._leavers) < 2 or self._leavers[0][0] != due:
            return None
        return None if min(self._leavers[1:3])[0] <= due + 1 else self._leavers[0][2]

    @property
    def late_block_ns(self) -> int:
        """See ``Growth``."""
        return self._growth.late_block_ns()

    def march(self, steps: int, taking: Taking | None = None) -> list[Request]:
        """Compose ``steps`` steps, now or at times that have passed.

        Returns the members whose last token the last of them samples, who leave.
        """
        if taking is None:
            self._growth.march(self.step, steps)
        else:
            self._growth.march_over(self.step, steps, taking)
        self.step += steps
        self.context += steps * self.size
        leaving = []
        while self._leavers and self._leavers[0][0] == self.step:
            leaving.append(heappop(self._leavers)[2])
        return leaving

    def take_late(self) -> Sequence[Request]:
        """The late members, as the step is composed whose token they get singly."""
        if not self.late:
            return ()
        late, self.late = self.late, []
        for request in late:
            request.pending += 1
        return late

    def show(self) -> list[tuple[int, Request]]:
        """Members who have sampled the tokens that their client is handed first, with the step that did it."""
        shown = []
        while self.unshown and self.unshown[0][0] <= self.step:
            step, _, request = heappop(self.unshown)
            shown.append((step, request))
        return shown

    def leave(self, requests: Iterable[Request]) -> None:
        """Let members go whose last token is being sampled."""
        for request in requests:
            request.computed, request.known = request.total - 1, request.total
            self._growth.leave(request)
            self.size -= 1
            self.context -= request.computed

    def dissolve(self, members: Iterable[Request], stamped: Collection[Request] = ()) -> None:
        """Bring all members up to date and let them go their own ways.

        Those in ``stamped`` have a token of their own in flight: its end, and that of the one before, are theirs alone.
        """
        for request in members:
            request.computed = request.base + self.step
            request.known = request.computed + 1
            self._growth.leave(request)
            if self.last_step is not None and request.joined <= self.last_step and request not in stamped:
                request.last_token_ns = self.last_end_ns
        self._leavers.clear()
        self.unshown.clear()
        self.late.clear()
        self.size = self.context = 0

    def attended(self, members: Iterable[Request], window: int, ahead: int = 0) -> int:
        """Sum over the members of min(computed, window), ``ahead`` steps from now."""
        step = self.step + ahead
        return sum(min(request.base + step, window) for request in members)
