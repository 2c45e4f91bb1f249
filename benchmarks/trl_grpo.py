"""TRL's GRPOTrainer as a rival: its own loop, one step at a time, over a policy of ours.

It gets what makes it fastest here: no KL term, no gradient checkpointing, no logging, micro-batches of the
size that was quickest. Lengths and rewards come from tables.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from forced import forced_generate
from torch.nn.utils.rnn import pad_sequence

from empg_lite.core.rationale import Rationale
from empg_lite.policy.policy import Policy


def build(
    policy: Policy,
    prompts: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    rows: int,
    rate: float,
    rewards: Sequence[float],
) -> Any:
    """A trainer whose every step draws ``samples`` completions of each of ``prompts``.

    Args:
        rows: of a micro-batch; divides len(prompts) * samples.
        rewards: one a row, prompt by prompt.
    """
    import trl
    from datasets import Dataset
    from transformers.utils import logging

    logging.set_verbosity_error()
    total = len(prompts) * samples
    assert total % rows == 0, f"micro-batches of {rows} do not fill {total} rows"
    known = trl.GRPOConfig.__dataclass_fields__
    wanted = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": policy.device.type == "cpu",
        "bf16": policy.dtype == torch.bfloat16,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 1_000_000,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": total // rows,
        "num_generations": samples,
        "max_completion_length": max_new_tokens,
        "max_prompt_length": None,  # gone in newer versions
        "gradient_checkpointing": policy.device.type == "cuda",
        "shuffle_dataset": False,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.GRPOTrainer(
            model=policy.model,
            processing_class=policy.tokenizer,
            reward_funcs=lambda completions, **_: list(rewards),
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
            args=trl.GRPOConfig(**{name: value for name, value in wanted.items() if name in known}),
        )


class _Closed(Exception):
    """Leaves TRL's loop."""


class Steps:
    """The trainer's own loop, held between two steps: ``step`` lets it do one, generation to optimizer.

    The loop runs in a thread of its own, because it cannot be left and entered again; only one of the two
    threads ever works.
    """

    def __init__(self, trainer: Any, policy: Policy, lengths: Sequence[int], plain_id: int) -> None:
        from transformers import TrainerCallback

        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[BaseException | None] = queue.Queue()
        go, done = self._go, self._done
        self.tokens = 0  # completion tokens of the last step
        self.trainer, self._model = trainer, policy.model
        stop_id = policy.tokenizer.eos_token_id
        self._generate = policy.model.generate
        policy.model.generate = forced_generate(self._generate, lengths, stop_id, plain_id)

        class Gate(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if not go.get():
                    raise _Closed

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                done.put(None)

        trainer.add_callback(Gate())
        compute = trainer.compute_loss
        self._seen = 0

        def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._seen += int(inputs["completion_mask"].sum())
            return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = counted
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
            self._done.put(None)
        except _Closed:
            pass
        except BaseException as error:  # told to whoever waits
            self._done.put(error)

    def step(self) -> None:
        """One step of the trainer.

        Raises:
            whatever the trainer raised.
        """
        self._seen = 0
        self._go.put(True)
        error = self._done.get()
        if error is not None:
            raise error
        self.tokens = self._seen

    def close(self) -> None:
        """End the loop, before its next step."""
        self._go.put(False)
        self._thread.join()
        self._model.generate = self._generate


def loss_step(
    trainer: Any,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rationales: Sequence[Rationale],
    *,
    rows: int,
    rate: float,
) -> None:
    """One optimizer step on given rows with TRL's own loss, the weights taken for advantages.

    Rows are padded as its own step does it: prompts on the left, completions on the right, to the longest.
    """
    from hand_loop import finish

    batch = loss_inputs(policy, rationales)
    total = batch["num_items_in_batch"]
    trainer.current_gradient_accumulation_steps = len(rationales) // rows
    optimizer.zero_grad(set_to_none=True)
    with policy.training():
        for start in range(0, len(rationales), rows):
            part = {k: v[start : start + rows] for k, v in batch.items() if v.ndim}
            with policy.autocast():
                loss = trainer.compute_loss(policy.model, part | {"num_items_in_batch": total})
            loss.backward()
        finish(policy, optimizer, rate, 1.0)


def loss_inputs(policy: Policy, rationales: Sequence[Rationale]) -> dict[str, torch.Tensor]:
    """What TRL's ``compute_loss`` takes: ids and masks (B, T), advantages (B,), the count of tokens."""
    prompts = [torch.tensor(r.prompt_ids) for r in rationales]
    completions = [torch.tensor(r.completion_ids) for r in rationales]
    padded = {
        "prompt_ids": pad_sequence(prompts, True, policy.pad_id, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], True, 0, padding_side="left"),
        "completion_ids": pad_sequence(completions, True, policy.pad_id),
        "completion_mask": pad_sequence([torch.ones_like(c) for c in completions], True, 0),
        "advantages": torch.tensor([r.weight or 0.0 for r in rationales]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    return {name: value.to(policy.device) for name, value in padded.items()}
