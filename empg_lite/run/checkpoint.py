"""Saving, finding and restoring checkpoints.

``step-NNNNNN/`` contains the adapter (plain PEFT), the optimizer moments by parameter *name* (indices shift
when parameters change), every random generator, and ``state.json``: step, data position, counters and the
byte lengths of the logs. Only safetensors and JSON, published with one rename.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from empg_lite.core.errors import CheckpointError, DataError
from empg_lite.core.slots import Slot
from empg_lite.policy.adapter import MAX_HEADER, WEIGHTS, adapter_files, load_adapter_bytes, read_tensors
from empg_lite.run import store

if TYPE_CHECKING:
    from empg_lite.policy.policy import Policy

OPTIMIZER, RNG = "optimizer.safetensors", "rng.safetensors"
#: Size limit of ``state.json`` in bytes.
MAX_STATE = 1 << 20
_NAME = re.compile(r"step-(\d{6,})")
#: Adam state with the parameter's shape, under torch's names and bitsandbytes'.
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")


@dataclass(slots=True)
class TrainState:
    """Training progress between two steps. ``--resume`` restores all of it.

    Attributes:
        step: completed steps (E-step + M-step, with or without an update).
        policy_step: completed optimizer steps.
        position: problems drawn from the stream.
        slots: under ``sampler.tries`` the problem that each slot holds; else empty.
        first_step: the step this run started at: 0, or the step of the checkpoint given to ``fit --from``.
        num_tokens: completion tokens sampled so far.
        no_signal: consecutive steps up to now with all weights 0; ``steps_without_update`` is the total.
        skipped_nonfinite: passes discarded for a non-finite gradient; ``nonfinite_in_a_row`` up to now.
        micro_batch_tokens, batch_rows: sizes after out-of-memory back-off; 0 means the recipe's.
        pending: metrics of the step just fitted, until they are validated and logged.
        seconds: training time, excluding setup and evaluation.
        best_accuracy, best_step: best validation accuracy so far, and its step.
    """

    step: int = 0
    policy_step: int = 0
    position: int = 0
    first_step: int = 0
    num_tokens: int = 0
    no_signal: int = 0
    steps_without_update: int = 0
    skipped_nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    micro_batch_tokens: int = 0
    batch_rows: int = 0
    pending: dict[str, Any] | None = None
    seconds: float = 0.0
    best_accuracy: float | None = None
    best_step: int | None = None
    slots: tuple[Slot, ...] = ()


def checkpoint_path(run: Path, step: int) -> Path:
    """``RUN/checkpoints/step-NNNNNN``."""
    return run / "checkpoints" / f"step-{step:06d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Published checkpoints, valid or not, oldest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_valid(run: Path, *, on_invalid: Callable[[Path, str], object] = lambda *_: None) -> Path | None:
    """The newest valid checkpoint; None if there are no checkpoints.

    Args:
        on_invalid: called with (path, reason) for each newer, invalid one.

    Raises:
        CheckpointError: checkpoints exist but none is valid.
    """
    found = list_checkpoints(run)
    reasons = []
    for path in reversed(found):
        reason = store.verify_dir(path)
        if reason is None:
            return path
        reasons.append(f"{path.name}: {reason}")
        on_invalid(path, reason)
    if found:
        raise CheckpointError(
            f"none of {len(found)} checkpoints is valid ({reasons[0]})", str(run / "checkpoints")
        )
    return None


def require_valid(path: Path) -> Path:
    """``path``, if it is a valid checkpoint; a named checkpoint is never replaced by another.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    reason = store.verify_dir(path)
    if reason is not None:
        raise CheckpointError(reason, str(path), "name another checkpoint")
    return path


def save_checkpoint(
    run: Path,
    policy: Policy,
    optimizer: Any,
    scaler: Any,
    state: TrainState,
    *,
    logs: Mapping[str, int],
    keep: int,
) -> Path:
    """Publish the checkpoint of ``state.step`` and prune older ones down to ``keep``.

    Args:
        logs: current byte length of each log file; on resume they are cut back to it.

    Raises:
        StorageError: nothing was published.
    """
    path = checkpoint_path(run, state.step)
    if path.exists():  # the run stopped after this step's checkpoint and before its log entry
        return path
    record = {
        "format": 1,
        "state": dataclasses.asdict(state),
        "logs": dict(logs),
        "scaler": _scaler_state(scaler),
    }
    files = adapter_files(policy) | {
        OPTIMIZER: _optimizer_bytes(policy, optimizer),
        RNG: _rng_bytes(),
        "state.json": json.dumps(record, indent=1).encode(),
    }
    store.write_dir(path, files)
    for old in list_checkpoints(run)[:-keep]:
        store.remove_dir(old)
    return path


def stored_state(path: Path) -> TrainState:
    """The state in a checkpoint, without loading weights.

    Raises:
        CheckpointError: it is damaged, incomplete or of another format.
    """
    require_valid(path)
    return _read_state(path)[0]


def _read_state(path: Path) -> tuple[TrainState, dict[str, Any]]:
    """The state, and the whole content of ``state.json``.

    Raises:
        CheckpointError: it is not what ``save_checkpoint`` writes.
    """
    try:
        record = json.loads(store.read_regular(path / "state.json", MAX_STATE))
        TrainState(**record["state"])  # refuses unknown keys; types are checked next
        state = TypeAdapter(TrainState).validate_json(json.dumps(record["state"]), strict=True)
        if state.step != int(path.name[5:]) or min(state.step, state.policy_step, state.position) < 0:
            raise ValueError(f"it belongs to step {state.step}")
        if not all(s.position >= 0 <= s.tries and 0 <= s.credit < 1 for s in state.slots):
            raise ValueError("slots must hold open problems")
        if not isinstance(record["logs"], dict) or not all(type(n) is int for n in record["logs"].values()):
            raise ValueError("logs must be byte lengths")
        return state, record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"state.json cannot be read ({reason})", str(path)) from error


def load_checkpoint(
    path: Path, policy: Policy, optimizer: Any, scaler: Any
) -> tuple[TrainState, dict[str, int]]:
    """Restore policy, optimizer, loss scaler and random generators from a checkpoint.

    Returns:
        The state, and the byte lengths of the logs.

    Raises:
        CheckpointError: it is damaged, incomplete, or does not fit this model and recipe.
    """
    require_valid(path)
    state, record = _read_state(path)
    files = {name: path / name for name in (WEIGHTS, OPTIMIZER, RNG)}
    try:
        numbers = sum(p.numel() for p in policy.trainable().values())
        # Adam: two moments and quantization codes; a CUDA generator state takes 16 bytes
        most = {WEIGHTS: 8 * numbers, OPTIMIZER: 16 * numbers, RNG: 0}
        data = {n: store.read_regular(file, most[n] + 2 * MAX_HEADER) for n, file in files.items()}
        load_adapter_bytes(policy, data[WEIGHTS], str(files[WEIGHTS]))
        _load_optimizer(policy, optimizer, read_tensors(data[OPTIMIZER], str(files[OPTIMIZER])))
        _load_rng(read_tensors(data[RNG], str(files[RNG])))
        if scaler is not None and record["scaler"] is not None:
            scaler.load_state_dict(record["scaler"])
    except (DataError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"checkpoint cannot be restored ({error})", str(path)) from error
    return state, {str(k): int(v) for k, v in record["logs"].items()}


def _scaler_state(scaler: Any) -> dict[str, Any] | None:
    return scaler.state_dict() if scaler is not None else None


def _optimizer_bytes(policy: Policy, optimizer: Any) -> bytes:
    """Adam's moments as ``<parameter>/<moment>``; those in 8 bits with their scales and codes."""
    import torch
    from safetensors.torch import save

    tensors = {  # clones: bitsandbytes' matrices share their codes
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().clone()
        for name, parameter in policy.trainable().items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return save(tensors)


def _load_optimizer(policy: Policy, optimizer: Any, tensors: Mapping[str, Any]) -> None:
    parameters = policy.trainable()
    unknown = {key.rsplit("/", 1)[0] for key in tensors} - parameters.keys()
    if unknown:
        raise ValueError(f"optimizer state for {sorted(unknown)[0]}, which is not a trainable parameter")
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        parameter = parameters[name]
        if not bool(value.double().isfinite().all()):
            raise ValueError(f"{key} holds NaN or infinity")
        if moment in MOMENTS and value.shape != parameter.shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, the parameter has {tuple(parameter.shape)}"
            )
        state = optimizer.state[parameter]
        if moment != "step":
            state[moment] = value.to(parameter.device)
        else:  # torch keeps a CPU tensor, bitsandbytes an int
            state[moment] = int(value) if f"{name}/state1" in tensors else value


def _rng_bytes() -> bytes:
    import torch
    from safetensors.torch import save

    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return save(states)


def _load_rng(states: Mapping[str, Any]) -> None:
    import torch

    for name, state in states.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
