"""Every way empg-lite stops on purpose: one line for a person, one exit code for a script.

An error says *what* is wrong, *where*, and *what to do*. The command line prints
``error: what · where · what to do`` as its last line on stderr and exits with ``exit_code``
(sysexits numbers where one fits).
"""

from __future__ import annotations

from typing import Any


class EmpgError(Exception):
    """Base of all expected failures.

    Args:
        what: the fault, in words a user knows.
        where: file:line, field, folder or command it was found in; may be empty.
        todo: the next thing to type or change; may be empty.
    """

    exit_code = 70
    #: All processes of a launch raise it alike (see ``parallel``).
    shared = False
    #: The optimiser has not moved anything since the last step: a checkpoint may be made.
    between_steps = True

    def __init__(self, what: str, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = what, where, todo
        super().__init__(" · ".join(part for part in (what, where, todo) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes; the subclasses' arguments differ, their attributes say it all."""
        return _rebuilt, (type(self), str(self)), self.__dict__


class CheckFailed(EmpgError):
    """What was made, or asked about, is not as it should be."""

    exit_code = 1


class UsageError(EmpgError):
    """The command line itself is wrong."""

    exit_code = 2


class RecipeError(EmpgError):
    """A recipe cannot be read, or says something that cannot be."""

    exit_code = 65


class DataError(EmpgError):
    """A row of a data or rollout file is unusable."""

    exit_code = 65


class MissingInput(EmpgError):
    """A file, model or dataset is not there (offline included)."""

    exit_code = 66


class ModelUnusable(MissingInput):
    """A base model's files are damaged, incomplete, bring code, or are of an architecture without tests."""


class GraderUnusable(EmpgError):
    """The grader cannot start, or fails so often that its rewards are noise."""

    exit_code = 69


class OutOfMemory(EmpgError):
    """Nothing smaller is left to try."""

    exit_code = 71


class RunInUse(EmpgError):
    """Another process holds the run directory."""

    exit_code = 73


class StorageError(EmpgError):
    """Writing failed: disk full, read-only, I/O error."""

    exit_code = 74


class NumericalStop(EmpgError):
    """Too many steps in a row were not finite."""

    exit_code = 75


class CheckpointError(EmpgError):
    """Checkpoints exist and none is valid, or the one named is not."""

    exit_code = 76


class NoSignal(EmpgError):
    """Training cannot learn anything with these settings."""

    exit_code = 77


class Interrupted(EmpgError):
    """A signal arrived; what was reached is saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, signum: int, what: str, where: str = "", todo: str = "") -> None:
        super().__init__(what, where, todo)
        self.exit_code = 128 + signum


def _rebuilt(kind: type[EmpgError], text: str) -> EmpgError:
    return kind.__new__(kind, text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch says so in its own class on a card, in words on a CPU and in cuBLAS.

    Inside the capture of a CUDA graph it is followed by an error about the capture: what came before counts.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
        return True
    before = error.__cause__ or error.__context__
    return isinstance(error, RuntimeError) and before is not None and is_out_of_memory(before)


def forget_frames(error: BaseException) -> None:
    """Let go of the frames that an error came through, and so of every tensor in them.

    Before a retry after running out of memory: an error that is still held keeps what did not fit.
    """
    at: BaseException | None = error
    while at is not None:
        at.__traceback__ = None
        at = at.__cause__ or at.__context__


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def explained(error: BaseException) -> EmpgError:
    """Any error as one of ours: what libraries and the system raise, in the words and codes of this page."""
    if isinstance(error, EmpgError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(2, "interrupted")
    if is_out_of_memory(error):
        return OutOfMemory(
            "out of memory",
            "",
            "lower sampler.batch_rows or optim.micro_batch_tokens, or use a smaller model",
        )
    if isinstance(error, OSError):
        return StorageError(error.strerror or str(error), str(error.filename or ""))
    return EmpgError(
        f"internal error: {type(error).__name__}: {error}", "", "repeat with --debug and report the traceback"
    )
