"""One training run of one method by one recipe: same sampler, data, reward and budget for all.

An arm of EM is the package itself: its weights, its M-step. The others take the same samples and rewards, and
make their own step (``baselines.py``) with the same optimizer, warm-up and gradient clipping.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import baselines
import torch
from memory import SuccessMemory
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from empg_lite.core.bundled import BUNDLED
from empg_lite.core.rationale import Group, Problem, Rationale, flatten, group_rationales
from empg_lite.core.view import View
from empg_lite.data.sources import ProblemStream, load_splits
from empg_lite.loop.batching import packed_batches
from empg_lite.loop.estep import reward_matrix, sample_rationales, weigh
from empg_lite.loop.evaluate import Evaluator
from empg_lite.loop.learner import Learner, build_learner
from empg_lite.loop.turns import Asking
from empg_lite.policy.policy import Policy
from empg_lite.recipe.file import load_recipe
from empg_lite.rewards import Grader
from empg_lite.rewards.scorer import Scorer, score
from empg_lite.sampler import Sampler

#: Arms of EM: name -> what they set in the recipe. Everything else is a baseline of ``baselines.py``.
EM_ARMS = {
    "empg": (),
    "empg-b.5": ("em.baseline=0.5",),
    "centered": ("em.weighting=centered",),
}
#: Training rows kept out of training, on which rates are chosen and the curves are measured.
VALIDATION = 300
CURVE = 100
#: Arms whose groups without signal are drawn again -> the method that fits the rest.
FILTERED = {"dr_grpo-dynamic": "dr_grpo", "grpo-dynamic": "grpo"}
#: Test problems that are also sampled, eight times each.
SAMPLED, SAMPLES = 128, 8


@dataclass(frozen=True)
class Setting:
    """Everything that decides a run. Rates are nominal: halving-like for more passes, as the package does it.

    Attributes:
        stale: E-steps between the policy that samples and the one that is fitted.
        noise: share of wrong answers that the verifier lets pass.
        pool: train on so many problems only, other ones for every seed; None: all.
        pool_steps: of those, take problems of so many arithmetic steps; None: any.
        tries: ask a problem until it is right, at most so often, in ``problems`` slots; None: fixed groups.
        warmup: steps; None: the recipe's.
        memory: right rationales kept of each problem; ``memory_weight``: each weighs ``one``, or all of a
            problem as much as those of a solved one (``group``).
        kl_stop: of the EM arms, nats a token; None leaves the package's default.
        test: evaluate on the test problems; False: on the validation rows, for choosing a rate.
        examined: steps after which the run is evaluated as at its end, and goes on; None: only at its end.
    """

    task: str
    arm: str
    rate: float
    seed: int
    passes: int = 1
    stale: int = 0
    steps: int = 40
    problems: int = 8
    samples: int = 8
    noise: float = 0.0
    kl_stop: float | None = None
    pool: int | None = None
    pool_steps: int | None = None
    memory: int = 0
    memory_weight: str = "group"
    test: bool = True
    tries: int | None = None
    warmup: int | None = None
    examined: int | None = None

    def overrides(self) -> list[str]:
        """What differs from the task's recipe."""
        kl_stop = () if self.kl_stop is None else (f"em.kl_stop={self.kl_stop}",)
        # What fits a model of a million parameters into a core's cache; neither changes the math.
        fits = ("optim.micro_batch_tokens=1024", "sampler.batch_rows=256")
        return [
            f"optim.learning_rate={self.rate}",
            f"em.passes={self.passes}",
            f"sampler.problems_per_step={self.problems}",
            f"sampler.samples_per_problem={self.samples}",
            f"sampler.tries={'null' if self.tries is None else self.tries}",
            "optim.decay_after=null",  # a constant rate for all, whatever the recipe has
            *(fits if self.task in BUNDLED else ()),
            *(() if self.warmup is None else (f"optim.warmup_steps={self.warmup}",)),
            *EM_ARMS.get(self.arm, ()),
            *kl_stop,
        ]


def train_arm(setting: Setting) -> dict[str, Any]:
    """Train once and measure.

    Seconds are CPU seconds of this process (one thread, nothing waits), or on a GPU those of the clock.

    Returns:
        The setting, its curve (a record a step; ``greedy`` on validation rows every ten), and the figures of
        the evaluation at the end; under ``examined`` those of the one on the way.
    """
    torch.set_num_threads(1)
    learner = _learner(setting)
    train, validation, test = _problems(setting.task)
    if setting.pool:
        steps = setting.pool_steps
        fitting = [p for p in train if steps is None or p.meta["steps"] == str(steps)]
        train = random.Random(setting.seed).sample(fitting, setting.pool)
    sampler = learner.sampler()
    clock = time.perf_counter if learner.policy.device.type == "cuda" else time.process_time
    worn: deque[list[Tensor]] = deque(maxlen=setting.stale + 1)  # the adapters of the last E-steps
    memory, curve, seconds, on_the_way = SuccessMemory(setting.memory), [], 0.0, {}
    with Grader() as grader:
        evaluator = Evaluator(learner, sampler, grader, View())
        e_step = EStep(setting, learner, sampler, grader, ProblemStream(train, setting.seed))

        def figures() -> dict[str, Any]:
            spent = {"seconds": seconds, "samples": e_step.samples, "seen": len(e_step.seen)}
            return spent | _examine(evaluator, test if setting.test else validation, setting.test)

        for step in range(1, setting.steps + 1):
            started = clock()
            worn.append(_adapter(learner.policy))
            with _wearing(learner.policy, worn[0]):
                groups = e_step.draw(step, policy_step=step - len(worn))
                if groups is None:  # the samples are used up
                    break
                old = None
                if setting.arm not in EM_ARMS and (setting.passes > 1 or setting.stale):
                    old = _logprobs(learner, flatten(groups))
            updates = _fit(learner, setting, groups, old, memory, step)
            seconds += clock() - started
            curve.append(_record(step, e_step.drawn, seconds, updates))
            if step % 10 == 0:
                curve[-1]["greedy"] = evaluator.evaluate(validation[:CURVE]).summary()["pass@1"]
            if step == setting.examined:
                on_the_way = {"examined": figures()}
        at_the_end = figures()
        if setting.pool:
            at_the_end["hardest"] = _hardest(learner, evaluator, train)
    return {"setting": asdict(setting), **at_the_end, **on_the_way, "curve": curve}


class EStep:
    """The samples of an arm, step by step, with the verdicts of its verifier.

    Attributes:
        drawn: all rows of the last step with their true verdicts, those thrown away included.
        samples: rows drawn so far.
        seen: problems drawn for so far.
    """

    def __init__(
        self, setting: Setting, learner: Learner, sampler: Sampler, grader: Grader, stream: ProblemStream
    ) -> None:
        self.setting, self.learner, self.sampler = setting, learner, sampler
        self.grader, self.stream = grader, stream
        self.drawn: list[Rationale] = []
        self.samples, self.position, self.seen = 0, 0, set[str]()
        self.slots = learner.recipe.tries.opened(0) if learner.recipe.tries else ()

    def draw(self, step: int, policy_step: int) -> list[Group] | None:
        """The groups of a step; None where a filtered step cannot be filled from the samples left."""
        if self.setting.tries:
            groups = self._in_turns(step)
        elif self.setting.arm in FILTERED:
            return self._filtered(step, policy_step)
        else:
            groups = self._groups(step, policy_step)
        self._note(self.drawn)
        return groups

    def _note(self, rows: Sequence[Rationale]) -> None:
        self.samples += len(rows)
        self.seen.update(r.problem_id for r in rows)

    def _groups(self, step: int, policy_step: int) -> list[Group]:
        draw = sample_rationales(
            self.learner.policy,
            self.sampler,
            self.stream.take(self.position, self.setting.problems),
            self.learner.decoding,
            samples=self.setting.samples,
            seed=self.setting.seed,
            step=step,
            policy_step=policy_step,
        )
        self.position += self.setting.problems
        self.drawn = score(flatten(draw.groups), self.grader, str(self.learner.recipe.data.reward))
        return group_rationales(_deceived(self.drawn, self.setting))

    def _in_turns(self, step: int) -> list[Group]:
        rule = self.learner.recipe.tries
        scorer = Deceived(self.grader, str(self.learner.recipe.data.reward), self.setting)
        assert rule is not None
        asking = Asking(self.learner, self.stream, scorer, range(len(self.slots)), self.slots, step)
        self.sampler.take_turns(asking, self.learner.decoding)
        rows = [r for drawn in asking.graded() for r in drawn]
        self.slots, _ = rule.after_step(self.slots, rows)
        self.drawn = scorer.true
        return group_rationales(rows)

    def _filtered(self, step: int, policy_step: int) -> list[Group] | None:
        """Dynamic sampling (arXiv 2503.14476, 3.2): groups without signal are drawn again, until P have one.

        What is thrown away counts: a run has as many samples as one without the filter.
        """
        budget = self.setting.steps * self.setting.problems * self.setting.samples
        kept, all_rows = list[Group](), list[Rationale]()
        while len(kept) < self.setting.problems:
            if self.samples >= budget:
                return None
            groups = self._groups(step, policy_step)
            self._note(self.drawn)
            all_rows += self.drawn
            kept += [g for g in groups if len({r.reward for r in g.rationales}) > 1]
        self.drawn = all_rows
        return kept[: self.setting.problems]


class Deceived(Scorer):
    """A scorer that lets a share of the wrong answers pass; ``true``: the rows as they are."""

    def __init__(self, grader: Grader, reward: str, setting: Setting) -> None:
        super().__init__(grader, reward)
        self.setting, self.true = setting, list[Rationale]()

    def scored(self, rationales: Sequence[Rationale]) -> list[Rationale]:
        rows = super().scored(rationales)
        self.true += rows
        return _deceived(rows, self.setting)


def _learner(setting: Setting) -> Learner:
    recipe = load_recipe(setting.task, setting.overrides(), setting.seed).resolved()
    return build_learner(recipe)


@lru_cache(maxsize=2)
def _problems(task: str) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """(training, validation, test) problems; the same for every seed."""
    splits = load_splits(load_recipe(task, ["data.validation=0"]).resolved())
    return list(splits.train[:-VALIDATION]), list(splits.train[-VALIDATION:]), list(splits.evaluation)


def _recalled(memory: SuccessMemory, groups: Sequence[Group], setting: Setting) -> list[Rationale]:
    """Weighed rows of the memory for problems that ``groups`` do not solve; it then takes ``groups`` in."""
    rows = flatten(memory.recall(groups))
    memory.keep(groups)
    a_problem = Counter(r.problem_id for r in rows)
    if setting.memory_weight == "one":
        return [replace(r, weight=1.0) for r in rows]
    return [replace(r, weight=setting.samples / a_problem[r.problem_id]) for r in rows]


def _fit(
    learner: Learner,
    setting: Setting,
    groups: Sequence[Group],
    old: dict[int, Tensor] | None,
    memory: SuccessMemory,
    step: int,
) -> int:
    """The M-step of the arm; optimizer steps taken."""
    if setting.arm in EM_ARMS:
        em = learner.recipe.em
        # with stale samples the package drops negative weights
        now = step - 1 if setting.stale else None
        rows = flatten(weigh(groups, weighting=em.weighting, baseline=em.baseline, current_step=now))
        updates = learner.fit([*rows, *_recalled(memory, groups, setting)]).updates
    else:
        updates = baseline_step(learner, FILTERED.get(setting.arm, setting.arm), groups, old)
    learner.state.step = step
    return updates


def baseline_step(
    learner: Learner, method: str, groups: Sequence[Group], old: dict[int, Tensor] | None
) -> int:
    """Optimizer steps of a baseline on one E-step's samples, all rows together in each.

    Args:
        old: log-probs of every row under the policy that sampled it; None: under the policy as it is.
    """
    rewards, _ = reward_matrix(groups)
    advantages = baselines.advantages(method, rewards).flatten().float()
    rows, settings = flatten(groups), learner.fit_settings()
    kept = {i: _size(r) for i, r in enumerate(rows) if advantages[i] != 0}
    if not kept:
        return 0
    parameters = list(learner.policy.trainable().values())
    with learner.policy.training():
        for _ in range(settings.passes):
            learner.optimizer.zero_grad(set_to_none=True)
            for batch in packed_batches(kept, settings.micro_batch_tokens):
                logprobs, mask = _in_rows(_completion_logprobs(learner.policy, rows, batch))
                loss = baselines.policy_loss(
                    method,
                    logprobs,
                    logprobs.detach() if old is None else _in_rows([old[i] for i in batch])[0],
                    mask,
                    advantages[batch].to(logprobs.device),
                    rows=len(rows),
                    max_new_tokens=settings.max_new_tokens,
                )
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            for group in learner.optimizer.param_groups:
                group["lr"] = settings.learning_rate
            learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    return settings.passes


def _size(row: Rationale) -> tuple[tuple[int, ...], int]:
    return row.prompt_ids, len(row.completion_ids)


def _completion_logprobs(policy: Policy, rows: Sequence[Rationale], batch: Sequence[int]) -> list[Tensor]:
    """As the M-step of EM computes them: every prompt once, no padding."""
    return policy.completion_logprobs([(rows[i].prompt_ids, rows[i].completion_ids) for i in batch])


@torch.no_grad()
def _logprobs(learner: Learner, rows: Sequence[Rationale]) -> dict[int, Tensor]:
    """Trainer log-probs of every row's completion under the policy as it is: {row: (T,)}."""
    sizes, found = {i: _size(r) for i, r in enumerate(rows)}, {}
    for batch in packed_batches(sizes, learner.fit_settings().micro_batch_tokens):
        found |= dict(zip(batch, _completion_logprobs(learner.policy, rows, batch), strict=True))
    return found


def _in_rows(logprobs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of their own length, padded to ``(B, T)``, and which places are real."""
    padded = pad_sequence(list(logprobs), batch_first=True)
    lengths = torch.tensor([len(row) for row in logprobs], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


# --- what the arms have in common -----------------------------------------------------------------


def _deceived(rows: Sequence[Rationale], setting: Setting) -> list[Rationale]:
    """The rows as a verifier sees them that lets a share of the wrong answers pass."""

    def passes(r: Rationale) -> bool:
        rng = random.Random(f"{setting.seed}/{r.step}/{r.problem_id}/{r.sample_index}")
        return r.reward == 0 and r.finish_reason == "stop" and rng.random() < setting.noise

    return [replace(r, reward=1.0) if passes(r) else r for r in rows]


def _adapter(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.trainable().values()]


@contextmanager
def _wearing(policy: Policy, adapter: Sequence[Tensor]) -> Iterator[None]:
    """The policy as it was, for sampling."""
    now = _adapter(policy)
    _put_on(policy, adapter)
    yield
    _put_on(policy, now)


def _put_on(policy: Policy, adapter: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(policy.trainable().values(), adapter, strict=True):
            parameter.copy_(value)


def _record(step: int, rows: Sequence[Rationale], seconds: float, updates: int) -> dict[str, Any]:
    """A point of the curve, from the samples of the step: true rewards, whatever the verifier said."""
    lengths = [len(r.completion_ids) for r in rows]
    right = [n for r, n in zip(rows, lengths, strict=True) if r.right]
    return {
        "step": step,
        "reward": len(right) / len(rows),
        "length": sum(lengths) / len(rows),
        "length_right": sum(right) / len(right) if right else None,
        "worked": sum(" = " in r.completion for r in rows) / len(rows),
        "seconds": round(seconds, 3),
        "updates": updates,
    }


def _hardest(learner: Learner, evaluator: Evaluator, problems: Sequence[Problem]) -> dict[str, float]:
    """Shares of right answers on the quarter of the problems that the base model's samples solve least."""
    n = len(problems) // 4
    with learner.policy.reference():
        base = evaluator.evaluate(problems, samples=2 * SAMPLES).sampled
    solved = {rows[0].problem_id: sum(r.right for r in rows) / len(rows) for rows in base}
    hardest = sorted(problems, key=lambda p: (solved[p.id], p.id))[:n]
    tuned = evaluator.evaluate(hardest, samples=4 * SAMPLES)
    return {
        "base_t1": sum(solved[p.id] for p in hardest) / n,
        "greedy": tuned.summary()["pass@1"],
        "t1": tuned.summary()["t1_accuracy"],
    }


def _examine(evaluator: Evaluator, problems: Sequence[Problem], full: bool) -> dict[str, Any]:
    """Greedy figures; in full also those of samples at temperature 1."""
    summary = evaluator.evaluate(problems).summary()
    kept = ("n", "pass@1", "mean_length", "mean_length_right", "truncated", "behaviors")
    figures = {name: summary[name] for name in kept}
    if full:
        sampled = evaluator.evaluate(problems[:SAMPLED], samples=SAMPLES)
        figures |= {name: sampled.summary()[name] for name in ("t1_accuracy", f"pass@{SAMPLES}")}
        rows = [r for answers in sampled.sampled for r in answers]
        figures["t1_worked"] = sum(" = " in r.completion for r in rows) / len(rows)
        figures["t1_length"] = sum(len(r.completion_ids) for r in rows) / len(rows)
    return figures
