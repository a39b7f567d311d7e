"""Where the simulations of a search run: in this process, over local processes, or on a Ray cluster.

An executor takes a function that never raises and its tasks, and yields ``(number of the task, result)`` as they end;
the result is None where the process that ran the task died, in a second try too. Order is the caller's affair: it
knows the numbers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, Protocol, TypeVar

from apexsim.errors import BadInput, nearest

T = TypeVar("T")
R = TypeVar("R")
Results = Iterator[tuple[int, R | None]]

# Below this many requests to simulate, starting processes (each imports numpy and pandas) takes longer than it saves.
REQUESTS_WORTH_A_POOL = 20_000
# How often a task is tried whose process dies.
ATTEMPTS = 2
LOST = (
    "the process that ran it died, twice, out of memory perhaps; a script that starts jobs needs "
    "if __name__ == '__main__'"
)


class Executor(Protocol):
    """Runs ``function`` on every task, at most ``jobs`` at a time."""

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Results[R]: ...


def choose_jobs(jobs: int | None, requests: int) -> int:
    """``jobs`` as asked for, else the cores this process may use, but one where the requests to simulate are few."""
    if jobs is not None and jobs < 1:
        raise BadInput("give at least 1", where="--jobs", got=jobs)
    if jobs is None and requests < REQUESTS_WORTH_A_POOL:
        return 1
    return jobs or available_cores()


def available_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def executor_named(name: str) -> Executor:
    """The executor of that name; ``BadInput`` when there is none, or when it is not installed."""
    if name not in EXECUTORS:
        raise BadInput(f"unknown executor; {nearest(name, EXECUTORS)}", where="--executor", got=name)
    if name == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise BadInput("install it with: pip install 'apexsim[ray]'", where="--executor", got=name) from None
    return EXECUTORS[name]


def run_local(function: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Results[R]:
    """Over local processes; in this one when a single job is asked for or there is a single task."""
    if min(jobs, len(tasks)) <= 1:
        yield from enumerate(map(function, tasks))
        return
    with _Crew(function, tasks, jobs) as crew:
        while ended := crew.ended():
            yield from ended


def run_on_ray(function: Callable[[T], R], tasks: Sequence[T], jobs: int) -> Results[R]:
    """On a Ray cluster: the one named by ``RAY_ADDRESS``, else one started here with ``jobs`` cores."""
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else jobs, log_to_driver=False)

    def run(task: T) -> R:  # ray takes plain functions only, not partial ones
        return function(task)

    remote = ray.remote(max_retries=ATTEMPTS - 1)(run)
    pending = {remote.remote(task): number for number, task in enumerate(tasks)}
    while pending:
        (done, *_), _ = ray.wait(list(pending))
        number = pending.pop(done)
        try:
            yield number, ray.get(done)
        except ray.exceptions.RayError:
            yield number, None


EXECUTORS: dict[str, Executor] = {"local": run_local, "ray": run_on_ray}


class _Crew:
    """Workers, each a process of its own: one that dies costs the task it was at, and another takes its place.

    A task whose worker dies goes to the end of the queue; at its last attempt its result is None.
    """

    def __init__(self, function: Callable[[T], R], tasks: Sequence[T], jobs: int) -> None:
        self._function, self._tasks = function, tasks
        self._waiting = deque(range(len(tasks)))
        self._deaths: Counter[int] = Counter()
        self._idle = [_worker() for _ in range(min(jobs, len(tasks)))]
        self._busy: dict[Future[Any], tuple[int, ProcessPoolExecutor]] = {}
        self._fill()

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
        for worker in (*self._idle, *(worker for _, worker in self._busy.values())):
            # Whoever interrupts does not wait for what is running.
            for process in list((worker._processes or {}).values()) if fault else ():
                process.terminate()
            worker.shutdown(cancel_futures=True)

    def ended(self) -> list[tuple[int, Any]]:
        """Tasks that have ended since, with their results, as soon as there is one; none when all are done."""
        found: list[tuple[int, Any]] = []
        while self._busy and not found:
            done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
            for future in done:
                found += self._end(future)
            self._fill()  # before anyone looks at the results: no worker waits for that
        return found

    def _fill(self) -> None:
        while self._idle and self._waiting:
            worker, number = self._idle.pop(), self._waiting.popleft()
            try:
                future = worker.submit(self._function, self._tasks[number])
            except BrokenProcessPool:  # it died while it had no task: none is to blame
                worker = _renewed(worker)
                future = worker.submit(self._function, self._tasks[number])
            self._busy[future] = number, worker

    def _end(self, future: Future[Any]) -> list[tuple[int, Any]]:
        number, worker = self._busy.pop(future)
        died = isinstance(future.exception(), BrokenProcessPool)
        self._idle.append(_renewed(worker) if died else worker)
        if not died:
            return [(number, future.result())]
        self._deaths[number] += 1
        if self._deaths[number] == ATTEMPTS:
            return [(number, None)]
        self._waiting.append(number)
        return []


def _renewed(worker: ProcessPoolExecutor) -> ProcessPoolExecutor:
    worker.shutdown()
    return _worker()


def _worker() -> ProcessPoolExecutor:
    """One process, started when it gets its first task."""
    return ProcessPoolExecutor(1, mp_context=_process_context(), initializer=_leave_with_parent)


def _leave_with_parent() -> None:
    """In a worker: end when the process that started it is gone, so that a killed search leaves nobody behind.

    Ctrl-C reaches the workers too, but who answers it is the process that started them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _process_context() -> BaseContext:
    """A server that imports apexsim once and forks workers from that; plain fork is unsafe beside threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apexsim.search.study"])
    return context  # type: ignore[no-any-return]
