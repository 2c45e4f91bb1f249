"""Data parallelism: each process of a launch samples and fits a share, and all reach the same result.

``accelerate launch --num_processes N`` starts the same command N times. Everything that depends on all
samples (weights, the denominator, metrics, every decision) is computed by every process from the same
gathered values, so only the speed depends on N. A single process is a world of size one:
all of this is free.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from empg_lite.core.errors import EmpgError, explained
from empg_lite.run import store

if TYPE_CHECKING:
    from torch import Tensor

#: Seconds that other processes wait before exiting on an error: the launcher kills all once one has failed,
#: and the main process must print its message first.
GRACE = 2.0

A = TypeVar("A")
B = TypeVar("B")


def processes() -> int:
    """Number of processes in the launch; 1 without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def speaks() -> bool:
    """Whether this process talks to the user; exactly one per launch does."""
    return processes() == 1 or int(os.environ["RANK"]) == 0


@dataclass(frozen=True, slots=True)
class World:
    """The processes that share one run; this one is ``rank`` of ``size``.

    The base class is a world of size one; ``join`` yields the world of a launched process. Collective methods
    must be called by all processes in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """The process that writes and talks to the user."""
        return self.rank == 0

    def mine(self, items: Sequence[A]) -> Sequence[A]:
        """This process's share of the items, dealt in turn."""
        return items[self.rank :: self.size]

    def gather(self, value: A) -> list[A]:
        """The values of all processes, by rank, exchanged as pickles within the launch.

        Raises:
            EmpgError: another process failed; this is its error.
        """
        return [value]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes; None counts as zeros."""

    def share(self, items: Sequence[A], work: Callable[[Sequence[A]], Sequence[B]]) -> list[B]:
        """Apply ``work`` to this process's share; returns all results in the order of the items."""
        results: list[B | None] = [None] * len(items)
        done = work(self.mine(items))
        for rank, part in enumerate(self.gather(done)):
            results[rank :: self.size] = part
        return results  # type: ignore[return-value]

    def once(self, work: Callable[[], A]) -> A:
        """Run ``work`` in the main process; every process gets its result."""
        return self.gather(work() if self.main else None)[0]  # type: ignore[return-value]

    def first(self, value: A | None) -> A | None:
        """The first value, by rank, that is not None."""
        return next((found for found in self.gather(value) if found is not None), None)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        return any(self.gather(flag))


#: The world of a single process.
SINGLE = World()


class _Launched(World):
    """Several processes, connected through Accelerate."""

    __slots__ = ()

    def gather(self, value: A) -> list[A]:
        return self._exchange(value, None)

    def fail(self, error: EmpgError) -> EmpgError:
        """Tell the others, at their next gather, that this process failed; returns the error to exit with."""
        try:
            self._exchange(None, error)
        except EmpgError as shared:
            return shared
        raise AssertionError("an exchanged error is raised")

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """See ``World``. One message suffices: the adapter's gradients are small."""
        import torch
        from accelerate.utils import reduce

        parameters = list(parameters)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        total = reduce(torch.cat([g.flatten() for g in grads]), "sum")
        parts = total.split([g.numel() for g in grads])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)

    def _exchange(self, value: A | None, error: EmpgError | None) -> list[A]:
        """All values; or, if any process has an error, the first by rank, raised in every process."""
        from accelerate.utils import gather_object

        try:
            found = gather_object([(value, error)])
        except RuntimeError as lost:  # the connection to a process that died silently
            what, where = "another process of the launch died", f"process {self.rank} of {self.size}"
            todo = "see its output and the launcher's, then repeat the command with --resume"
            raise _shared(EmpgError(what, where, todo)) from lost
        for _, failed in found:
            if failed is not None:
                raise _shared(failed)
        return [found_value for found_value, _ in found]


def _shared(error: EmpgError) -> EmpgError:
    """Mark an error as known to all processes."""
    error.shared = True
    return error


def leave(code: int) -> NoReturn:
    """Exit a launched process at once: torch's teardown may abort it when the others are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def join() -> Iterator[World]:
    """The world of this process while the block runs. Within it only the main process writes to disk.

    An error in one process ends all: the others raise it at their next gather or at the end of the block.

    Raises:
        EmpgError: the error of this or another process, the same in all of them.
    """
    if processes() == 1:
        yield SINGLE
        return
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    world = _Launched(state.process_index, state.num_processes)
    try:
        with store.reading_only(not world.main):
            try:
                yield world
                world.gather(None)  # the main process may still be writing, and fail
            except Exception as error:
                known = explained(error)
                raise (known if known.shared else world.fail(known)) from error
    finally:
        state.destroy_process_group()
