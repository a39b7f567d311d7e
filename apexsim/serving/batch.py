"""A composed step, and the steps on their way through the pipeline stages of a replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from apexsim.costs.steps import BatchStats
from apexsim.costs.timing import StepTimes
from apexsim.serving.job import Job
from apexsim.serving.recording import Recorder

Labels = tuple[int, int, int]
"""What a row of steps says about its replica: which one, how many jobs had a seat when it was composed, and waited."""


class Batch:
    """Who computes in a step and when it runs.

    The jobs in ``samples`` get a token each at its end. For those in ``leaving`` it is the last; with it those in
    ``showing`` have all that their client is handed first.
    """

    __slots__ = ("end_ns", "labels", "leaving", "samples", "showing", "start_ns", "stats")

    def __init__(
        self, stats: BatchStats, samples: Sequence[Job], leaving: Sequence[Job] = (), showing: Sequence[Job] = ()
    ) -> None:
        self.stats = stats
        self.samples = samples
        self.leaving = leaving
        self.showing = showing
        self.start_ns = 0
        self.end_ns = 0
        self.labels: Labels = (0, 0, 0)

    def emit(self, recorder: Recorder) -> None:
        """The batch ends: its tokens exist, and clients are handed their first ones."""
        for job in self.showing:
            job.show(self.end_ns)
        emit(self.samples, self.end_ns, recorder)


def emit(jobs: Sequence[Job], end_ns: int, recorder: Recorder) -> None:
    """A sampled token of each job comes to exist; the time since its previous one is an inter-token latency."""
    latest_ns = count = 0
    for job in jobs:
        before_ns = job.emit(end_ns)
        if before_ns == latest_ns:
            count += 1
        elif before_ns is not None:
            if count:
                recorder.gap(end_ns - latest_ns, count)
            latest_ns, count = before_ns, 1
    if count:
        recorder.gap(end_ns - latest_ns, count)


class Flight:
    """The batches of a replica that are on their way, oldest first, at most ``most``.

    A batch enters a stage when the stage before has passed it on and the batch before has left it: ``free_ns`` says
    when each stage is free. With one batch in flight that is synchronous scheduling. With two on one stage it is
    asynchronous: a batch is composed when the one before it starts, from what is known at that time.
    """

    __slots__ = ("batches", "cost", "free_ns", "most", "recorder")

    def __init__(self, cost: StepTimes, recorder: Recorder, *, lookahead: int) -> None:
        self.batches: deque[Batch] = deque()
        self.cost = cost
        self.recorder = recorder
        self.free_ns = [0] * cost.stages
        self.most = max(cost.stages, 1 + lookahead)

    def launch(self, batch: Batch, now_ns: int) -> None:
        """Send a batch through the stages."""
        free = self.free_ns
        free_ns = free[0]
        batch.start_ns = time_ns = now_ns if now_ns > free_ns else free_ns
        durations_ns = self.cost.stage_ns(batch.stats)
        for stage, duration_ns in enumerate(durations_ns):
            free_ns = free[stage]
            time_ns = free[stage] = (time_ns if time_ns > free_ns else free_ns) + duration_ns
        if len(durations_ns) > 1 and not batch.stats.chunks:
            self.recorder.pipeline(sum(durations_ns))
        batch.end_ns = time_ns
        self.batches.append(batch)
