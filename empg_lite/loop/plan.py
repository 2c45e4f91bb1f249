"""The memory plan of a recipe: what ``auto`` becomes, whether it fits, and what to change if it does not.

``train`` and the command ``plan`` both take their sizes from here, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import OutOfMemory
from empg_lite.core.sizes import MIN_ROWS
from empg_lite.policy.adapter import read_adapter_config
from empg_lite.policy.memory.terms import FP32, Settings, held_by_sampler, phases, stays
from empg_lite.recipe.schema import Recipe, choose_engine

if TYPE_CHECKING:
    from empg_lite.policy.memory.machine import Machine
    from empg_lite.policy.memory.shape import Shape

#: Share of the free memory to plan with; the allocator's rounding and fragmentation need the rest.
SHARE = 0.9
#: Where the C library keeps freed blocks, resident memory was up to 1.5 times what is live (docs/memory.md).
#: Freed blocks are returned when the peak exceeds 1/``ROOM`` of the free memory.
ROOM = 2
#: Tokens of a micro-batch. More than the maximum gains nothing, and costs time on a CPU (docs/LOG.md).
MIN_TOKENS, MAX_TOKENS = 256, {"cpu": 1024, "cuda": 16_384}
#: Rows sampled at once. A CPU gains little beyond its maximum, and the first answers take twice as long:
#: SmolLM2-135M with 384 tokens of context, one core: 40, 98, 112, 129 tokens/s with 8, 32, 64, 128 rows. A
#: step's samples are drawn at once all the same, up to a GPU's maximum.
MAX_ROWS = {"cpu": 64, "cuda": 512}
#: Smaller micro-batches unpack the NF4 weights too often; gradient checkpointing is cheaper.
ENOUGH_TOKENS = 4096

#: A term of the M-step when the sampler's buffers stay allocated.
KEPT = "kept by the sampler"

#: Setting -> recipe key.
KEYS = {
    "merged": "sampler.merged",
    "batch_rows": "sampler.batch_rows",
    "micro_batch_tokens": "optim.micro_batch_tokens",
    "checkpointing": "optim.gradient_checkpointing",
    "four_bit": "model.load_in_4bit",
    "new_tokens": "sampler.max_new_tokens",
    "prompt_tokens": "data.max_prompt_tokens",
}
Change = dict[str, Any]
#: Whether changed settings are allowed: they fit, or fit beside the sampler's buffers.
Able = Callable[..., bool]
#: The lowest values that advice goes down to, most important first.
_LEAST: Change = {
    "prompt_tokens": 128,
    "new_tokens": 128,
    "four_bit": True,
    "checkpointing": True,
    "micro_batch_tokens": MIN_TOKENS,
    "batch_rows": MIN_ROWS,
    "merged": False,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory a recipe needs, in bytes.

    Attributes:
        settings: every ``auto`` decided.
        stays: terms common to all phases.
        phases: phase -> its own terms at its peak.
    """

    shape: Shape
    machine: Machine
    settings: Settings
    stays: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        """Phase -> everything alive at its peak."""
        kept = sum(self.stays.values())
        return {name: kept + sum(terms.values()) for name, terms in self.phases.items()}

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.totals.values())

    @property
    def keeps_sampler(self) -> bool:
        """Whether the sampler's buffers may stay allocated during the M-step."""
        return KEPT in self.phases["M-step"]

    @property
    def largest(self) -> tuple[str, str]:
        """The phase of the peak, and the largest term alive in it."""
        phase = max(self.totals, key=lambda name: self.totals[name])
        terms = self.stays | self.phases[phase]
        return phase, max(terms, key=lambda name: terms[name])

    def facts(self) -> dict[str, Any]:
        """The plan as one JSON object, in bytes; ``settings`` has what ``auto`` became."""
        phase, term = self.largest
        return {
            "fits": self.fits,
            "device": self.machine.device,
            "free": self.machine.free,
            "usable": int(SHARE * self.machine.free),
            "peak": self.peak,
            "phase": phase,
            "largest": term,
            "stays": self.stays,
            "phases": self.phases,
            "totals": self.totals,
            "settings": {KEYS[name]: getattr(self.settings, name) for name in KEYS},
        }

    @property
    def is_tight(self) -> bool:
        """On a CPU, whether returning freed blocks is worth the time it takes."""
        return self.machine.device == "cpu" and ROOM * self.peak > self.machine.free

    @property
    def fits(self) -> bool:
        """Whether the peak is within ``SHARE`` of the free memory."""
        return self.peak <= SHARE * self.machine.free


def predict(shape: Shape, settings: Settings, machine: Machine) -> Plan:
    """The terms of these settings; on a GPU with the sampler's buffers, if the M-step fits beside them."""
    plan = Plan(shape, machine, settings, stays(shape, settings), dict(phases(shape, settings)))
    held = held_by_sampler(shape, settings)
    if not held:
        return plan
    fitting = plan.phases["M-step"] | {KEPT: held}
    keeping = replace(plan, phases=plan.phases | {"M-step": fitting})
    return keeping if keeping.fits else plan


def plan_recipe(recipe: Recipe, shape: Shape, machine: Machine) -> Plan:
    """A recipe's plan, every ``auto`` decided for this machine.

    Recapturing CUDA graphs at every step costs seconds, so sizes that let the sampler stay allocated during
    the M-step are preferred, at the price of at most half the rows, recomputed activations, and micro-batches
    of at least ``ENOUGH_TOKENS``. If that does not fit, each phase takes the whole card.

    Raises:
        MissingInput, DataError: ``model.adapter`` is not an adapter.
    """
    recipe, auto = recipe.resolved(), _auto_fields(recipe)
    s, most = _least(recipe, machine), MAX_TOKENS[machine.device]
    enough = min(ENOUGH_TOKENS, most) if "micro_batch_tokens" in auto else s.micro_batch_tokens
    needed = _power_of_two(s.problems * s.samples)  # rows beyond a step's samples only speed up evaluation
    top = min(max(needed, MAX_ROWS[machine.device]), max(MAX_ROWS.values()))

    # Each choice assumes the minimum for everything decided after it.
    def fits(**changes: Any) -> bool:
        return predict(shape, replace(s, **changes), machine).fits

    def can_stay(**changes: Any) -> bool:
        """Whether the sampler could stay allocated, with large enough micro-batches."""
        return predict(shape, replace(s, **{"micro_batch_tokens": enough} | changes), machine).keeps_sampler

    def rows(able: Able, **changes: Any) -> int:
        if "batch_rows" not in auto:
            return s.batch_rows
        return _largest(MIN_ROWS, top, lambda n: able(batch_rows=n, **changes))

    def rows_and_rule(merged: bool) -> tuple[int, Able]:
        """The most rows decoded at once, and the rule for all later choices."""
        staying, fitting = rows(can_stay, merged=merged), rows(fits, merged=merged)
        if can_stay(batch_rows=staying, merged=merged) and 2 * staying >= fitting:
            return staying, can_stay
        return fitting, fits

    if "merged" in auto:
        with_copy, without = (min(rows_and_rule(merged)[0], needed) for merged in (True, False))
        # A decoding step reads 2 bytes per weight, 4.5 from NF4: worth up to half of the rows.
        s = replace(s, merged=fits(merged=True) and 2 * with_copy >= without)
    most_rows, able = rows_and_rule(s.merged)
    if "checkpointing" in auto and most_rows > needed:  # not worth recomputing activations
        roomy = rows(able, checkpointing=False, micro_batch_tokens=enough)
        most_rows = max(needed, min(most_rows, roomy))
    s = replace(s, batch_rows=most_rows if "batch_rows" in auto else s.batch_rows)
    if "checkpointing" in auto:
        s = replace(s, checkpointing=not able(checkpointing=False, micro_batch_tokens=enough))
    if "micro_batch_tokens" in auto:
        tokens = _largest(MIN_TOKENS, most, lambda n: able(micro_batch_tokens=n))
        s = replace(s, micro_batch_tokens=tokens)
    return predict(shape, s, machine)


def with_sizes(recipe: Recipe, s: Settings) -> Recipe:
    """The recipe with a plan's sizes filled in."""
    sampler = recipe.sampler.model_copy(update={"batch_rows": s.batch_rows, "merged": s.merged})
    optim = {"micro_batch_tokens": s.micro_batch_tokens, "gradient_checkpointing": s.checkpointing}
    return recipe.model_copy(update={"sampler": sampler, "optim": recipe.optim.model_copy(update=optim)})


def refuse_unfit(plan: Plan) -> None:
    """Refuse a plan that does not fit, before anything is loaded.

    Raises:
        OutOfMemory: naming the phase, the term and what to set.
    """
    if not plan.fits:
        phase, term = plan.largest
        need, free = plan.peak / 1e9, plan.machine.free / 1e9
        raise OutOfMemory(
            f"the {phase} needs {need:.1f} GB and {free:.1f} GB are free; the largest term is {term}",
            "memory plan",
            f"{advice_text(advise(plan))}; --force tries anyway",
        )


# --- what to change -------------------------------------------------------------------------------


def advise(plan: Plan) -> Change | None:
    """The smallest change of settings that fits; {} if none is needed, None if nothing fits.

    Starts from the minimum of everything and restores each setting where possible, most important first:
    prompt and answer length, the base model's precision, then settings that never change the math.
    """
    if plan.fits:
        return {}
    change = {name: least for name, least in _LEAST.items() if getattr(plan.settings, name) != least}
    for name in ("prompt_tokens", "new_tokens", "batch_rows", "micro_batch_tokens"):
        if getattr(plan.settings, name) < _LEAST[name]:
            change.pop(name, None)

    def fits(tried: Change) -> bool:
        return predict(plan.shape, replace(plan.settings, **tried), plan.machine).fits

    if not fits(change):
        return None
    for name in [*change, *change]:  # twice: restoring one may have made room for another
        if name not in change:
            continue
        rest = {other: value for other, value in change.items() if other != name}
        values = [] if isinstance(change[name], bool) else _halved(getattr(plan.settings, name), change[name])
        change = (
            rest if fits(rest) else next((tried for n in values if fits(tried := change | {name: n})), change)
        )
    return change


def as_overrides(change: Change) -> list[str]:
    """``SECTION.KEY=VALUE`` for each changed setting."""
    return [f"{KEYS[name]}={str(value).lower()}" for name, value in change.items()]


def advice_text(change: Change | None) -> str:
    """A change as command-line options."""
    if change is None:
        return "use a larger card or a smaller model"
    return " ".join(f"--set {override}" for override in as_overrides(change))


def _power_of_two(value: int) -> int:
    """The smallest power of two >= ``value``."""
    return 1 << (value - 1).bit_length()


def _halved(value: int, least: int) -> Iterator[int]:
    """Powers of two below ``value``, down to ``least``."""
    n = _power_of_two(value) // 2
    while n >= least:
        yield n
        n //= 2


# --- settings -------------------------------------------------------------------------------------


def _auto_fields(recipe: Recipe) -> set[str]:
    """Sizes the recipe leaves to the plan. Only ``native`` samples from a merged copy."""
    given = {
        "merged": recipe.sampler.merged,
        "batch_rows": recipe.sampler.batch_rows,
        "micro_batch_tokens": recipe.optim.micro_batch_tokens,
        "checkpointing": recipe.optim.gradient_checkpointing,
    }
    if choose_engine(recipe.sampler.engine) != "native":
        del given["merged"]
    return {name for name, value in given.items() if value == "auto"}


def _least(recipe: Recipe, machine: Machine) -> Settings:
    """The recipe's settings, with each ``auto`` at its minimum."""
    model, sampler, optim = recipe.model, recipe.sampler, recipe.optim
    auto = _auto_fields(recipe)
    cuda, engine = machine.device == "cuda", choose_engine(recipe.sampler.engine)
    dtype = model.dtype if model.dtype != "auto" else "bfloat16" if cuda else "float32"
    rank = read_adapter_config(Path(model.adapter))["lora_r"] if model.adapter else model.lora_r
    return Settings(
        itemsize=FP32 if dtype == "float32" else 2,
        four_bit=model.load_in_4bit,
        lora_r=rank,
        adam_8bit=optim.adam_8bit,
        # Under ``tries`` each of a step's rationales may answer another problem.
        problems=sampler.problems_per_step * (sampler.samples_per_problem if sampler.tries else 1),
        samples=1 if sampler.tries else sampler.samples_per_problem,
        prompt_tokens=int(recipe.data.max_prompt_tokens or 0),
        new_tokens=sampler.max_new_tokens,
        batch_rows=MIN_ROWS if "batch_rows" in auto else int(sampler.batch_rows),
        merged=sampler.merged is True and engine == "native",
        micro_batch_tokens=MIN_TOKENS if "micro_batch_tokens" in auto else int(optim.micro_batch_tokens),
        checkpointing="checkpointing" in auto or bool(optim.gradient_checkpointing),
        evaluates=recipe.run.eval_every > 0,
        device=machine.device,
        engine=engine,
        # A card known only by its size counts as older than sm80 if the recipe computes in fp16.
        expands_keys=cuda and not (dtype != "float16" if machine.sm80 is None else machine.sm80),
    )


def _largest(least: int, most: int, fits: Any) -> int:
    """The largest power of two that fits; ``least`` if none does."""
    sizes = takewhile(
        lambda n: n == least or fits(n), (least << i for i in range((most // least).bit_length()))
    )
    return max(sizes)
