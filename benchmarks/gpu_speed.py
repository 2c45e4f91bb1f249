"""How fast the halves of a step and the whole are: our package's, and each rival's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from forced import forced_generate
from gpu_bench import Bench, Facts
from gpu_checks import engine_facts, without_graphs
from gpu_facts import plan_facts
from gpu_material import random_rows
from setting import OurStep, Setting, prompts_of, sample, weighed


class Speed(Bench):
    """The figures decode, decode-eager, m-step and step."""

    def decode(self, problems: int) -> Facts:
        """Tokens a second of sampling all rows at once, adapter on."""
        setting = self.setting(problems)
        ours = self.job.rival.startswith("empg")
        run, drawn = self._ours(setting) if ours else self._generate(setting)
        timed = self._timed(run, tokens=setting.tokens)
        assert drawn == list(setting.lengths), "lengths are not the table's"
        return self._with_floor("decode", timed, setting)

    def decode_eager(self, problems: int) -> Facts:
        """The same without graphs."""
        setting = self.setting(problems)
        with without_graphs():
            run, _ = self._ours(setting)
            return self._timed(run, tokens=setting.tokens, repeats=1)

    def _ours(self, setting: Setting) -> tuple[Callable[[], None], list[int]]:
        learner, drawn = self.learner(), list[int]()
        sampler = learner.sampler()

        def run() -> None:
            drawn[:] = [len(r.completion_ids) for r in sample(learner, sampler, setting)]
            self._facts["engine"] = {**engine_facts(sampler), "batch_rows": sampler.batch_rows}

        return run, drawn

    def _generate(self, setting: Setting) -> tuple[Callable[[], None], list[int]]:
        from hand_loop import generate

        policy, drawn = self.learner().policy, list[int]()
        prompts = [p.ids for p in prompts_of(policy, setting) for _ in p.keys]
        stop, plain = policy.tokenizer.eos_token_id, policy.model.generate

        def run() -> None:
            policy.model.generate = forced_generate(
                plain, setting.lengths, stop, setting.plain_id, policy.stop_ids
            )
            try:
                rows = generate(
                    policy, prompts, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                    repetition_penalty=1.0, max_new_tokens=setting.max_new_tokens,
                )  # fmt: skip
            finally:
                policy.model.generate = plain
            drawn[:] = [len(row) for row in rows]

        return run, drawn

    def m_step(self, problems: int) -> Facts:
        """Seconds of one optimizer step on all rows, none of them at weight 0, the tokens random."""
        from hand_loop import padded_step

        learner, setting = self.learner(), self.setting(problems)
        policy = learner.policy
        rows = weighed(random_rows(policy, setting), setting.rewards(False))
        if self.job.rival == "hf":  # 4 rows: more logits do not fit a small card
            timed = self._timed(lambda: padded_step(policy, learner.optimizer, rows, rows=4, rate=1e-6))
        else:
            timed = self._timed(lambda: learner.fit(rows))
        return self._with_floor("m-step", timed, setting)

    def step(self, problems: int) -> Facts:
        """Seconds of one step, prompts to updated weights; rewards from a table, none of them 0."""
        setting = self.setting(problems)
        if not self.job.rival.startswith("empg"):
            return self._rival_step(setting)
        from empg_lite.rewards import Grader

        learner = self.learner()
        with Grader() as grader:
            ours = OurStep(learner, setting, grader, silent=False)
            facts = {**plan_facts(learner), "policy": learner.engine_facts()}
            timed = self._timed(ours.step, tokens=setting.tokens, **facts)
        assert ours.tokens == setting.tokens, "lengths are not the table's"
        state = learner.state
        shrunk = {"batch_rows_after": ours.sampler.batch_rows, "budget_after": state.micro_batch_tokens}
        return {**timed, **shrunk, "engine": engine_facts(ours.sampler)}

    def _rival_step(self, setting: Setting) -> Facts:
        import trl_grpo

        learner = self.learner()
        if self.job.rival == "unsloth-trl":
            if not torch.cuda.is_available():
                return {"left_out": "Unsloth patches TRL's trainer on a GPU only"}
            from unsloth import FastLanguageModel, PatchFastRL

            PatchFastRL("GRPO", FastLanguageModel)
        prompts = [learner.policy.encode_prompt(p.question)[0] for p in setting.problems]
        trainer = trl_grpo.build(
            learner.policy, prompts, samples=setting.samples, max_new_tokens=setting.max_new_tokens,
            rows=min(8, setting.rows), rate=1e-6, rewards=setting.rewards(False),
        )  # fmt: skip
        steps = trl_grpo.Steps(trainer, learner.policy, setting.lengths, setting.plain_id)
        try:
            timed = self._timed(steps.step, tokens=setting.tokens)
        finally:
            steps.close()
        assert steps.tokens == setting.tokens, "lengths are not the table's"
        return timed
