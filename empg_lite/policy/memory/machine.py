"""How much memory is available, without torch where possible."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from empg_lite.core.errors import UsageError

#: Bytes taken before a model is loaded: by torch, transformers and peft in the process; on a GPU by the CUDA
#: context and cuBLAS workspaces (an estimate).
LIBRARIES = 600_000_000
_UNITS = {"": 1e9, "g": 1e9, "gb": 1e9, "gib": 2**30, "m": 1e6, "mb": 1e6, "mib": 2**20}


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine to plan for.

    Attributes:
        device: ``cpu`` or ``cuda``.
        free: bytes available to the model and its work, with the libraries loaded.
        sm80: whether a GPU is of that generation (Ampere) or later; None if unknown.
    """

    device: str
    free: int
    sm80: bool | None = None


def card(text: str) -> Machine:
    """A GPU with this much memory, all of it free: ``8GB``, ``8``, ``7.5 GiB``, ``8000MB``.

    Raises:
        UsageError: not a size, or less than the libraries take.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise UsageError(f"{text!r} is not a memory size", "--gpu-memory", "write it like 8GB")
    size = int(float(found[1]) * unit)
    if size <= LIBRARIES:
        raise UsageError(
            f"{text} is less than CUDA itself needs", "--gpu-memory", "give the card's full memory, like 8GB"
        )
    return Machine("cuda", size - LIBRARIES)


def this_machine() -> Machine:
    """The first visible GPU with its free memory, else the CPU with the available RAM."""
    found = _first_gpu()
    if found is not None:
        free, sm80 = found
        return Machine("cuda", max(free - LIBRARIES, 0), sm80)
    return Machine("cpu", max(available_ram() - LIBRARIES, 0))


def available_ram() -> int:
    """Bytes of RAM that the kernel reports as available."""
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def resident_memory() -> int:
    """Bytes of RAM that this process holds."""
    return _proc_bytes("/proc/self/status", "VmRSS")


def _proc_bytes(file: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text("utf-8"), re.MULTILINE)
    assert found, f"{file} has no {name}"
    return int(found.group(1)) * 1024


def free_memory(device: Any) -> int:
    """Bytes available on a torch device."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return available_ram()


def return_freed_blocks() -> None:
    """Make glibc return blocks of 1 MB and more to the system as soon as they are freed.

    By default it raises that threshold, up to 32 MB, as large blocks are freed, and the process grows a third
    and more beyond its live memory. For small work the default is faster: each fresh page costs a fault.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _first_gpu() -> tuple[int, bool | None] | None:
    """Free bytes, and whether it is sm80 or later, from ``nvidia-smi``; None without a visible GPU."""
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if tool is None or visible in ("", "-1"):
        return None
    command = [tool, "--query-gpu=memory.free,compute_cap", "--format=csv,noheader,nounits", "-i", visible]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    free, _, capability = (word.strip() for word in found.partition(","))
    if not free.isdigit():
        return None
    known = re.fullmatch(r"(\d+)\.\d+", capability)  # old drivers report [N/A]
    return int(free) * 2**20, int(known[1]) >= 8 if known else None
