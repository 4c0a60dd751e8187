"""Tasks carried out in order by several threads, beside which the caller's thread goes on."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

TICK_SECONDS = 0.2  # what is left to flush when the last tile is made is waited for
# A task writes some bytes of the output and says how many.
Task = Callable[[], int]


def carry_out(
    tasks: Iterator[Task],
    jobs: int,
    progress: Callable[[int], None],
    beside: Callable[[], None],
) -> None:
    """Carries out the tasks, taken in order by `jobs` threads, and calls `beside` now and then in
    this one; the first failure stops all."""
    lock, stop, idle = threading.Lock(), threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                progress(task())
        except BaseException as error:  # carried to the caller's thread, whatever it is
            failures.append(error)
            stop.set()
        finally:
            idle.set()

    workers: list[threading.Thread] = []
    try:
        while len(workers) < jobs:
            workers.append(threading.Thread(target=work, daemon=True))
            try:
                workers[-1].start()
            except RuntimeError:  # the system has no more threads: those that run do all the work
                workers.pop()
                if not workers:
                    raise
                break
        while any(worker.is_alive() for worker in workers) and not failures:
            idle.wait(TICK_SECONDS)
            idle.clear()
            beside()
    finally:
        stop.set()
        _join(workers)
    if failures:
        raise failures[0]


def begun(work: Callable[[], object]) -> "Future[object]":
    """What `work` returns or raises, from a thread of its own; from this one where the system has
    no more threads."""
    found: Future[object] = Future()

    def carry() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # told to whoever asks, whatever it is
            found.set_exception(error)

    try:
        threading.Thread(target=carry, daemon=True).start()
    except RuntimeError:
        carry()
    return found


def _join(workers: Sequence[threading.Thread]) -> None:
    """Waits for all, however often the user interrupts: a worker that outlives the files it writes
    to would write into whatever takes their descriptors."""
    for worker in workers:
        while worker.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                worker.join()


@contextlib.contextmanager
def one_arithmetic_thread() -> Iterator[None]:
    """One torch thread in this one: workers are the parallelism, the bytes of a product do not
    depend on their number, and no idle thread of a pool spins beside small matrices."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
