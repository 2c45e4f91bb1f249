"""The step that the speed benchmarks take: forced lengths, our way through it, a smaller card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import forced
import gpu
import gpu_checks
import gpu_parts
import gpu_work
import pytest
import setting
import torch
from gpu_parts import Job

from empg_lite.loop.learner import plan_here
from empg_lite.policy.memory import machine
from empg_lite.sampler import Decoding, make_sampler
from empg_lite.sampler import decoder as decoder_module


@pytest.fixture(scope="module")
def learner() -> Any:
    return setting.tiny_learner("sampler.max_new_tokens=12")


@pytest.fixture
def given(learner: Any) -> setting.Setting:
    return setting.tiny_setting(learner, problems=3, samples=4, mean=6.0)


def test_forced_lengths_lie_where_a_captured_graph_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays what it recorded: the same addresses, whatever is forced later."""
    right = decoder_module.draw
    logits, keys = torch.zeros(3, 5), torch.tensor([7, 5, 9])
    read: list[tuple[int, ...]] = []
    real = torch.searchsorted

    def searched(table: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        read.append((table.data_ptr(), len(table)))
        return real(table, *args, **more)

    with forced.forced_draws({5: 1, 7: 2, 9: 3}, 4, 0):
        captured = decoder_module.draw
        monkeypatch.setattr(torch, "searchsorted", searched)
        first = [captured(logits, keys, at, Decoding(9, 0.0))[0].tolist() for at in range(3)]
    with forced.forced_draws({5: 3, 7: 1, 9: 2, 11: 4}, 4, 0):
        second = [captured(logits, keys, at, Decoding(9, 0.0))[0].tolist() for at in range(3)]
    assert first == [[0, 4, 0], [4, 0, 0], [0, 0, 4]]
    assert second == [[4, 0, 0], [0, 0, 4], [0, 4, 0]]
    tables = {place for place in read if place[1] == forced.ROWS}
    assert len(tables) == 1 and decoder_module.draw is right


def test_no_other_stop_token_ends_a_row_early() -> None:
    """A model has several: Qwen2.5's end of text and end of turn. One in a thousand rows would be short."""
    logits, keys = torch.full((2, 6), -1.0), torch.tensor([7, 5])
    logits[:, 3] = 5.0
    with forced.forced_draws({5: 1, 7: 2}, 4, 0, others=(3, 4)):
        drawn = [decoder_module.draw(logits, keys, at, Decoding(9, 0.0))[0].tolist() for at in range(2)]
    assert drawn == [[0, 4], [4, 0]]
    rows = torch.tensor([[3, 3, 1], [2, 4, 3]])
    assert forced.end_rows(rows, [2, 3], 4, 0, (3,)).tolist() == [[0, 4, 4], [2, 0, 4]]


def test_a_key_that_has_no_length_is_never_ended() -> None:
    """An idle place of a decoder keeps a key of before: no index is beyond the table's end."""
    table = forced.Table(torch.device("cpu"))
    table.write({5: 1, 7: 1})
    keys = torch.tensor([torch.iinfo(torch.int64).max, 6, 7, torch.iinfo(torch.int64).min])
    assert table.ended(keys, 0).tolist() == [False, False, True, False]
    with pytest.raises(AssertionError):
        table.write(dict.fromkeys(range(forced.ROWS), 1))


@pytest.mark.parametrize("keeps", [True, False])
def test_our_step_is_the_learners_and_gives_memory_back_as_train_does(
    learner: Any, given: setting.Setting, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    from empg_lite.rewards import Grader

    order: list[str] = []
    monkeypatch.setattr(type(learner.planned), "keeps_sampler", property(lambda _: keeps))
    monkeypatch.setattr(
        type(learner), "sampler", lambda self: order.append("made") or make_sampler(self.policy)
    )
    with Grader() as grader:
        ours = setting.OurStep(learner, given, grader, silent=False)
        real, fit = ours.sampler.release, type(learner).fit
        monkeypatch.setattr(ours.sampler, "release", lambda: order.append("released") or real())
        monkeypatch.setattr(type(learner), "fit", lambda *a, **k: order.append("fit") or fit(*a, **k))
        before = learner.policy.adapter_sha256()
        ours.step()
    # Without graphs the engine releases after every draw by itself; what counts is that fitting comes after.
    assert order[0] == "made" and order[-1] == "fit"
    assert order.count("released") == 2 - keeps and ours.tokens == given.tokens
    assert learner.policy.adapter_sha256() != before


def test_a_smaller_card_is_what_the_plan_sees(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", machine.free_memory)  # put back afterwards
    recipe = learner.recipe.model_copy(
        update={"sampler": learner.recipe.sampler.model_copy(update={"batch_rows": "auto"})}
    )
    gpu_checks.shrink(8.0)
    large = plan_here(recipe, refuse=False)
    gpu_checks.shrink(0.66)
    small = plan_here(recipe, refuse=False)
    assert small.settings != large.settings and small.peak < large.peak


@pytest.mark.slow
def test_a_model_with_random_weights_writes_text(tmp_path: Path) -> None:
    """Else every reward of the two training steps would be 0, and nothing would be fitted."""
    job = gpu_parts.cut(Job("runs", "empg", ("train",), 60.0))
    work = gpu_work.Work(job, tmp_path, tmp_path / "rows")
    work.do()
    (row,) = gpu.told(tmp_path / "rows")
    assert row["checks"] == {"2 steps moved the weights": True}, row
    assert len(row["rewards"]) == 2 and min(row["rewards"]) > 0
    assert row["environment"]["engine"]["engine"] == "native" and "time/graphs_replayed" in row["last_step"]
