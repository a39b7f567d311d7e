"""The fast path: steps of decodes in closed form, behind the verbs of ``serving/decodes.py``.

While nobody arrives, finishes or runs short of blocks, what each step end leads to is known beforehand: the jobs in
flight get their token, and everybody who decodes is composed again. Such ends are *silent*: nothing outside the replica
can tell when they happen. A stretch plans how many silent ends follow, the replica sleeps through them, and they are
applied when the next end that matters comes. An arrival cuts the stretch at the step in flight, which is why nothing is
applied beforehand::

    in flight   [b0]──────┐ silent    ┌ silent           ┌ next_end: the silent ends applied, then an ordinary one
    ends               end(1)      end(2)   ...  end(silent)    end(silent + 1)
                                      ^ an arrival here leaves one silent end; next_end becomes end(2)
"""

from __future__ import annotations

from apexsim.serving.batch import Flight
from apexsim.serving.decodes import Decodes
from apexsim.serving.fast.one_stage import OneStage, Surroundings
from apexsim.serving.fast.pipeline import InTurn
from apexsim.serving.scheduler import Scheduler


def together(replica: int, flight: Flight, scheduler: Scheduler, windows: tuple[int, ...]) -> Decodes:
    """The fast path of a replica: on one stage all who decode are one cohort, in a pipeline each batch has its own."""
    around = Surroundings(replica, flight, scheduler, windows)
    return OneStage(around) if flight.cost.stages == 1 else InTurn(around)
