"""Every deliberate way empg-lite stops: one line for a person, one exit code for a script.

An error says *what* is wrong, *where*, and *what to do*. The command line prints
``error: what · where · what to do`` as its last line on stderr and exits with ``exit_code``
(sysexits numbers where they fit).
"""

from __future__ import annotations

from typing import Any


class EmpgError(Exception):
    """Base of all expected failures.

    Args:
        what: the problem, in the user's terms.
        where: file:line, field, folder or command; may be empty.
        todo: what to type or change next; may be empty.
    """

    exit_code = 70
    #: Raised by all processes of a launch alike (see ``run.parallel``).
    shared = False
    #: The optimizer has changed nothing since the last step, so a checkpoint may be saved.
    between_steps = True

    def __init__(self, what: str, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = what, where, todo
        super().__init__(" · ".join(part for part in (what, where, todo) if part))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes; subclasses differ in arguments, so restore the attributes."""
        return _rebuilt, (type(self), str(self)), self.__dict__


class CheckFailed(EmpgError):
    """A requested check did not pass."""

    exit_code = 1


class UsageError(EmpgError):
    """The command line is wrong."""

    exit_code = 2


class RecipeError(EmpgError):
    """A recipe is unreadable or invalid."""

    exit_code = 65


class DataError(EmpgError):
    """A row of a data or rollout file is unusable."""

    exit_code = 65


class MissingInput(EmpgError):
    """A file, model or dataset does not exist or cannot be reached."""

    exit_code = 66


class ModelUnusable(MissingInput):
    """A base model is damaged, incomplete, contains code, or has an untested architecture."""


class GraderUnusable(EmpgError):
    """The grader cannot start, or fails so often that its rewards are noise."""

    exit_code = 69


class OutOfMemory(EmpgError):
    """Out of memory at the smallest batch size."""

    exit_code = 71


class RunInUse(EmpgError):
    """Another process is using the run directory."""

    exit_code = 73


class StorageError(EmpgError):
    """Writing failed: disk full, read-only, I/O error."""

    exit_code = 74


class NumericalStop(EmpgError):
    """Too many consecutive non-finite steps."""

    exit_code = 75


class CheckpointError(EmpgError):
    """Checkpoints exist but none is valid, or the named one is not."""

    exit_code = 76


class NoSignal(EmpgError):
    """Training cannot learn with these settings: there is no reward signal."""

    exit_code = 77


class Interrupted(EmpgError):
    """A signal arrived and progress is saved. ``exit_code`` is 128 + the signal number."""

    def __init__(self, signum: int, what: str, where: str = "", todo: str = "") -> None:
        super().__init__(what, where, todo)
        self.exit_code = 128 + signum


def _rebuilt(kind: type[EmpgError], text: str) -> EmpgError:
    return kind.__new__(kind, text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises its own class on a GPU, but a RuntimeError on a CPU and in cuBLAS.

    During CUDA graph capture it is followed by an error about the capture, so the error's cause counts too.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
        return True
    before = error.__cause__ or error.__context__
    return isinstance(error, RuntimeError) and before is not None and is_out_of_memory(before)


def forget_frames(error: BaseException) -> None:
    """Drop the traceback frames of an error, and with them every tensor they reference.

    Call before retrying after out-of-memory: a live exception keeps what did not fit.
    """
    at: BaseException | None = error
    while at is not None:
        at.__traceback__ = None
        at = at.__cause__ or at.__context__


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def explained(error: BaseException) -> EmpgError:
    """Convert any exception to an EmpgError, with the messages and exit codes of this module."""
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
