"""Everything that is to be measured on a GPU, in one command; random weights, nothing is downloaded.

    python benchmarks/gpu.py [--out gpu.json] [--parts decode,m-step,...] [--shapes 0.5B,1.5B] [--minutes 9]
    python benchmarks/gpu.py --rehearse       the same code on a CPU, with a small shape

Models of Qwen2.5's shapes, NF4 with a LoRA of rank 16, prompts of 150 tokens, completion lengths from a
table (lognormal, mean 180, at most 512), 16 problems x 8 rows. Every rival has a process of its own. What
fails reports its error in its row, and the rest goes on; what the time does not allow is named. The JSON is
written anew after each process, so that a killed run leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from forced import draw_lengths
from gpu_work import Job, work, write
from shapes import SHAPES, Shape
from timing import circumstances, table

PARTS = ("floor", "decode", "m-step", "step", "logprobs", "caps")
#: Which figures belong to whom; the order is that of importance.
RIVALS = {
    "empg": ("decode", "m-step", "step", "logprobs"),
    "hf": ("decode", "m-step"),
    "unsloth": ("decode", "m-step", "step", "logprobs"),
    "trl": ("m-step", "step"),
    "unsloth-trl": ("step",),
}
#: Card (GB, 1e9) and the shapes that have to run a whole step in it.
CAPS = ((8.0, ("0.5B", "1.5B", "3B")), (12.0, ("3B", "7B")), (16.0, ("7B",)), (24.0, ("7B",)))
Row = dict[str, Any]


def jobs(parts: Sequence[str], shapes: Sequence[str], small: bool) -> Iterator[Job]:
    """The processes to start, the most wanted first."""
    measured = [p for p in parts if p not in ("floor", "caps")]
    if "floor" in parts:
        yield Job("device", shapes[0], "", ("floor",))
    for n, shape in enumerate(shapes):
        for rival, able in RIVALS.items():
            figures = tuple(f for f in able if f in measured and (n == 0 or f in ("decode", "step")))
            if figures:
                yield Job(rival, shape, "", figures)
    if "caps" in parts:
        caps = ((8.0, (shapes[0],)),) if small else CAPS
        for gigabytes, fitting in caps:
            for shape in fitting:
                yield Job("empg", shape, "", ("step",), problems=(16,), repeats=1, cap_gb=gigabytes)


def shortened(job: Job) -> Job:
    """The same for a CPU: few and short rows."""
    sizes = tuple(n // 4 for n in job.problems)
    return replace(job, problems=sizes, samples=2, prompt=40, mean=8.0, cap=12, repeats=1)


# --- processes ---------------------------------------------------------------------------------------


def run(job: Job, timeout: float) -> list[Row]:
    """The rows that a job's process told, and one for how it ended where that was not well."""
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=timeout, check=False).returncode
            why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, why = -1, f"stopped after {timeout:.0f} s"
        out.seek(0)
        err.seek(0)
        rows = told(out.read())
        if code:
            last = ([line for line in err.read().splitlines() if line.strip()] or [""])[-1]
            rows += unheard(job, rows, f"{why}: {last[:300]}")
    return rows


def told(text: str) -> list[Row]:
    """The lines that are rows; libraries print too."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "figure" in row:
            rows.append(row)
    return rows


def unheard(job: Job, rows: Sequence[Row], why: str) -> list[Row]:
    """A row with an error for each figure that a job has not told."""
    heard = {row["figure"] for row in rows}
    facts = {"rival": job.rival, "shape": job.shape, "cap_gb": job.cap_gb, "error": why}
    return [{**facts, "figure": figure} for figure in job.figures if figure not in heard]


# --- what the device could do ------------------------------------------------------------------------


def decode_floor(shape: Shape, lengths: Sequence[int], prompt: int, bandwidth: float, matmul: float) -> float:
    """Seconds that decoding needs at the least: rows leave when they are done, weights are 16 bits.

    For every token position the greater of two times: reading all linears, the head and the caches of the
    living rows at ``bandwidth`` (bytes/s), and their products at ``matmul`` (FLOP/s). The prompts' own
    forward pass is left out.
    """
    weights = shape.linear_parameters + shape.head_parameters
    total = 0.0
    for position in range(max(lengths)):
        alive = sum(length > position for length in lengths)
        cache = alive * (prompt + position) * shape.cache_bytes(2)
        total += max((2 * weights + cache) / bandwidth, 2 * weights * alive / matmul)
    return total


def fit_flops(shape: Shape, lengths: Sequence[int], prompt: int, samples: int) -> float:
    """FLOP that an M-step needs: forward, and as much backward, because only LoRA has a gradient of its own.

    Each prompt once for its ``samples`` rows, the head at completion tokens only; attention (a few percent)
    is left out.
    """
    tokens = sum(lengths) + prompt * len(lengths) // samples
    return 2 * 2 * (shape.linear_parameters * tokens + shape.head_parameters * sum(lengths))


def against_floor(rows: Sequence[Row], small: bool) -> None:
    """Add to each row what share of the device it used: ``of_floor``."""
    floor = next((r for r in rows if r["figure"] == "floor" and "bandwidth" in r), None)
    for row in rows:
        if floor is None or "error" in row or row["figure"] not in ("decode", "m-step") or row["cap_gb"]:
            continue
        job = Job(row["rival"], row["shape"], "", ())
        job = shortened(job) if small else job
        shape = SHAPES[row["shape"]]
        lengths = draw_lengths(row["rows"], mean=job.mean, cap=job.cap)
        if row["figure"] == "decode":
            least = decode_floor(shape, lengths, job.prompt, floor["bandwidth"], floor["matmul"])
        else:
            least = fit_flops(shape, lengths, job.prompt, job.samples) / floor["matmul"]
        row["of_floor"] = least / row["seconds"]


# --- log-probabilities -------------------------------------------------------------------------------


def agreement(rows: Sequence[Row]) -> list[Row]:
    """How far log-probabilities lie apart (nats): each path against the plain one's rows taken one by one."""
    scored = {r["rival"]: r for r in rows if r["figure"] == "logprobs" and "alone" in r}
    plain = scored.get("empg")
    found = []
    for rival, row in scored.items() if plain else ():
        for way in ("right", "left", "alone"):
            pairs = zip(_flat(row[way]), _flat(plain["alone"]), strict=True)
            off = [abs(a - b) for a, b in pairs]
            found.append({"path": rival, "padding": way, "mean": fmean(off), "most": max(off)})
    return found


def _flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [x for row in rows for x in row]


# --- the table ---------------------------------------------------------------------------------------


def show(rows: Sequence[Row]) -> str:
    """What was timed, ratios to ours beside it."""
    head = ("figure", "shape", "rows", "rival", "seconds", "tok/s", "of floor", "ours is", "peak GB")
    ours = {_kind(r): r["seconds"] for r in rows if r["rival"] == "empg" and "seconds" in r}
    lines = []
    for r in rows:
        if "seconds" not in r:
            continue
        faster = r["seconds"] / ours[_kind(r)] if _kind(r) in ours and r["rival"] != "empg" else 0.0
        lines.append(
            (
                r["figure"] + (f" in {r['cap_gb']:g} GB" if r["cap_gb"] else ""),
                r["shape"],
                str(r.get("rows", "")),
                r["rival"],
                f"{r['seconds']:.3f} ({r['least']:.3f}-{r['most']:.3f})",
                f"{r['tokens_per_second']:.0f}" if "tokens_per_second" in r else "",
                f"{r['of_floor']:.1%}" if "of_floor" in r else "",
                f"{faster:.2f}x" if faster else "",
                f"{r['peak_gb']:.2f}" if "peak_gb" in r else "",
            )
        )
    return table(head, lines)


def _what(row: Row) -> str:
    card = f"in {row['cap_gb']:g} GB" if row["cap_gb"] else ""
    words = ("not measured:", row["rival"], row["shape"], row["figure"], str(row.get("rows", "")), card)
    return " ".join(filter(None, words))


def _kind(row: Row) -> tuple[Any, ...]:
    return row["figure"], row["shape"], row.get("rows"), row["cap_gb"]


def report(rows: Sequence[Row]) -> str:
    """What a person reads."""
    floor = next((r for r in rows if r["figure"] == "floor" and "bandwidth" in r), None)
    lines = [show(rows)]
    if floor:
        measured = (
            f"{floor['bandwidth'] / 1e9:.0f} GB/s copied, {floor['matmul'] / 1e12:.2f} TFLOP/s multiplied"
        )
        lines.insert(0, f"{floor['device']}: {measured}")
    apart = agreement(rows)
    if apart:
        head = ("log-probs of", "padding", "mean |difference|", "most")
        cells = [(r["path"], r["padding"], f"{r['mean']:.2e}", f"{r['most']:.2e}") for r in apart]
        lines.append("Against the plain path, rows one by one, in nats:\n" + table(head, cells))
    lines += [f"{_what(r)}: {r['error']}" for r in rows if "error" in r]
    return "\n\n".join(lines)


# --- the command -------------------------------------------------------------------------------------


def measure(todo: Sequence[Job], small: bool, minutes: float, out: Path, where: dict[str, Any]) -> list[Row]:
    """Do the jobs in order while there is time; ``out`` is written anew after each."""
    rows: list[Row] = []
    ends = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as work_folder:
        for n, job in enumerate(todo, 1):
            left = ends - time.monotonic()
            if left < 5:
                rows += unheard(job, (), "not begun: out of time")
                continue
            print(f"[{n}/{len(todo)}] {job.name}: {', '.join(job.figures)}", file=sys.stderr, flush=True)
            folder = Path(work_folder) / job.shape
            rows += run(replace(shortened(job) if small else job, folder=str(folder)), left)
            against_floor(rows, small)
            whole = {"machine": where, "rows": rows, "logprobs": agreement(rows)}
            out.write_text(json.dumps(whole, indent=1), "utf-8")
    return rows


def child(text: str) -> None:
    """One job, in this process."""
    fields = json.loads(text)
    job = Job(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    if not Path(job.folder).exists() and "floor" not in job.figures:
        if job.rival.startswith("unsloth"):  # it has to come before transformers
            from empg_lite.policy.backends import choose_backend, import_unsloth

            choose_backend("unsloth")
            import_unsloth()
        write(Path(job.folder), job.shape)
    work(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the figures (gpu.json)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--shapes", help=f"some of {','.join(SHAPES)}; 0.5B,1.5B if left out")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing after so long (9)")
    parser.add_argument("--rehearse", action="store_true", help="a small shape and few short rows, on a CPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        child(arguments.job)
        return
    small = arguments.rehearse
    if small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parts = arguments.parts.split(",")
    shapes = (arguments.shapes or ("tiny" if small else "0.5B,1.5B")).split(",")
    for known, given in ((PARTS, parts), (tuple(SHAPES), shapes)):
        if odd := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(odd)} (there are {', '.join(known)})")
    where = circumstances("transformers", "peft", "trl", "bitsandbytes", "unsloth")
    todo = list(jobs(parts, shapes, small))
    rows = measure(todo, small, arguments.minutes, arguments.out, where)
    print(" · ".join(f"{name} {value}" for name, value in where.items()))
    print(report(rows))


if __name__ == "__main__":
    main()
