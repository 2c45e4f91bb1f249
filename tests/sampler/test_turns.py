"""Slots that draw one sample after another: the same samples whatever the engine, rows, order and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_model import load_fixture_policy
from fixture_recipe import write_recipe
from little_memory import rows_at_once
from turns import Quiz, Shared

from empg_lite.core.errors import OutOfMemory
from empg_lite.policy.policy import Policy
from empg_lite.sampler import Decoding
from empg_lite.sampler.decoder import Decoder
from empg_lite.sampler.generate import GenerateSampler
from empg_lite.sampler.graphs import Graphs
from empg_lite.sampler.native import NativeSampler

SLOTS, DRAWS, DECODING = 40, 3, Decoding(10)
Drawn = dict[tuple[int, int], Any]


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Policy:
    """The fixture policy; capital letters end its samples, so that their lengths differ."""
    folder = tmp_path_factory.mktemp("stops")
    write_recipe(folder, model_dir)
    return load_fixture_policy(model_dir, prompt=str(folder / "capitals.yaml"))


@pytest.fixture(scope="module")
def by_waves(stops: Policy) -> Drawn:
    """What the reference engine draws."""
    quiz, sampler = Quiz(stops, SLOTS, DRAWS), GenerateSampler(stops)
    sampler.take_turns(quiz, DECODING)
    return quiz.drawn


def test_the_quiz_is_worth_asking(by_waves: Drawn) -> None:
    assert len(by_waves) == SLOTS * DRAWS
    rows = list(by_waves.values())
    assert 20 < sum(right for *_, right in rows) < 80
    assert {tries for _, tries, _, _ in rows} == {1, 2, 3} and max(q for q, *_ in rows) >= 2 * SLOTS
    lengths = [len(ids) for _, _, ids, _ in rows]
    assert min(lengths) < 3 and lengths.count(10) > 10
    assert len({ids for _, _, ids, _ in rows}) > 100


@pytest.mark.parametrize(
    ("batch_rows", "merged", "late"),
    [(8, True, 0), (24, False, 0), (None, True, 0), (8, True, 5), (None, False, 30)],
)
def test_native_draws_what_waves_draw(
    stops: Policy, by_waves: Drawn, batch_rows: int | None, merged: bool, late: int
) -> None:
    quiz = Quiz(stops, SLOTS, DRAWS, late)
    sampler = NativeSampler(stops, batch_rows, merged)
    sampler.take_turns(quiz, DECODING)
    assert quiz.drawn == by_waves
    assert (quiz.waits > 20) == (late > 0), "verdicts did arrive late"
    assert sampler._copy is None
    asked = {(slot, question) for (slot, _), (question, *_) in quiz.drawn.items()}
    assert sampler.work.prompt_tokens == sum(len(quiz.prompt(q)) for _, q in asked), "no prompt runs twice"
    assert len(asked) < SLOTS * DRAWS - 20
    assert sampler.work.tokens == sum(len(ids) for _, _, ids, _ in quiz.drawn.values())


def test_waves_of_fewer_rows_draw_the_same(stops: Policy, by_waves: Drawn) -> None:
    quiz = Quiz(stops, SLOTS, DRAWS)
    GenerateSampler(stops, 24).take_turns(quiz, DECODING)
    assert quiz.drawn == by_waves


def test_a_rule_that_looks_at_the_clock_is_seen(stops: Policy) -> None:
    """The negative control: with one stream for all, what a slot asks depends on who ends first."""
    found = []
    for batch_rows in (8, None):
        quiz = Shared(stops, SLOTS, DRAWS)
        NativeSampler(stops, batch_rows).take_turns(quiz, DECODING)
        found.append(quiz.drawn)
    assert found[0].keys() == found[1].keys() and found[0] != found[1]


def test_out_of_memory_changes_no_sample(
    stops: Policy, by_waves: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "__init__", rows_at_once(12))
    quiz, sampler = Quiz(stops, SLOTS, DRAWS), NativeSampler(stops)
    sampler.take_turns(quiz, DECODING)
    assert quiz.drawn == by_waves and sampler.batch_rows == 10
    monkeypatch.setattr(Decoder, "__init__", rows_at_once(4))
    with pytest.raises(OutOfMemory, match=f"8 rows of {max(map(len, quiz.prompts)) + 10} tokens do not fit"):
        sampler.take_turns(Quiz(stops, SLOTS, DRAWS), DECODING)


def test_waves_that_run_out_of_memory_change_no_sample(
    stops: Policy, by_waves: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = GenerateSampler._generate, []

    def generate(self: GenerateSampler, rows: Any, *rest: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 12 or len(sizes) == 6:  # the sixth in the middle of a wave
            raise torch.OutOfMemoryError("pretended")
        return real(self, rows, *rest)

    monkeypatch.setattr(GenerateSampler, "_generate", generate)
    quiz, sampler = Quiz(stops, SLOTS, DRAWS), GenerateSampler(stops)
    sampler.take_turns(quiz, DECODING)
    assert quiz.drawn == by_waves
    assert sizes[:6] == [40, 20, 10, 10, 10, 10] and sampler.batch_rows == 8


def test_out_of_memory_midway_draws_nothing_twice(
    stops: Policy, by_waves: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that ended are kept; ``ended`` is not called again for them."""
    real, calls = Decoder.restart, []

    def restart(self: Decoder, *given: Any) -> None:
        calls.append(len(self.tokens))
        if len(calls) in (3, 9):
            raise torch.OutOfMemoryError("pretended")
        real(self, *given)

    monkeypatch.setattr(Decoder, "restart", restart)
    ended: list[int] = []

    class Counted(Quiz):
        def ended(self, slot: int, completion: Any) -> None:
            ended.append(slot)
            super().ended(slot, completion)

    quiz, sampler = Counted(stops, SLOTS, DRAWS), NativeSampler(stops)
    sampler.take_turns(quiz, DECODING)
    assert quiz.drawn == by_waves and len(ended) == SLOTS * DRAWS
    assert set(calls) == {40, 20, 10} and sampler.batch_rows == 10


def test_captured_steps_draw_the_same(
    stops: Policy, by_waves: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart writes where the graphs read; the captures themselves need a GPU."""

    class Replayed:
        def __init__(self, graphs: Graphs, work: Any) -> None:
            self.replay = work

    monkeypatch.setattr(NativeSampler, "_captures", True)
    monkeypatch.setattr(Graphs, "_capture", lambda self, work: Replayed(self, work))
    sampler = NativeSampler(stops)
    for _ in range(2):  # the second time in the cache that the first has left
        quiz = Quiz(stops, SLOTS, DRAWS)
        sampler.take_turns(quiz, DECODING)
        assert quiz.drawn == by_waves
    assert sampler.work.graphs_replayed > 0 == sampler.work.eager_steps


# --- the decoder --------------------------------------------------------------------------------------

PROMPTS = [(1, 2, 3, 4, 5, 6, 7), (9, 8), (5,), (20, 21, 22)]


def decoder_of(policy: Policy, cache_len: int = 30) -> Decoder:
    return Decoder(policy.network, policy.head_weight, torch.float32, Decoding(20), 10, cache_len)


def tokens_of(decoder: Decoder, rows: list[int], n: int, context: int, drawn: int) -> tuple[list[Any], Any]:
    """So many tokens of these rows with their log-probabilities; ``drawn`` of them are there already."""
    tokens, logprobs = [], []
    for step in range(n):
        if step >= drawn:
            decoder.step(10, context + step)
        tokens.append(decoder.tokens[rows].tolist())
        logprobs.append(decoder.logprobs[rows].clone())
    return tokens, torch.stack(logprobs)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [(), tuple(range(30, 50))])
def test_a_restarted_row_draws_what_a_fresh_one_does(stops: Policy, prefix: tuple[int, ...]) -> None:
    """The fresh one has the whole prompts in its slots, the other one what follows the prefix."""
    fresh, used = decoder_of(stops, 50), decoder_of(stops)
    prompts, seen = [prefix + prompt for prompt in PROMPTS], len(prefix) + 8
    rows, keys = list(range(4)), [31, 32, 33, 34]
    fresh.prefill(prompts, rows, keys, rows)
    expected = tokens_of(fresh, rows, 8, seen, 1)
    used.begin(prefix, in_slots=False)
    used.prefill(prompts, rows, [11, 12, 13, 14], rows)
    first, _ = tokens_of(used, rows, 6, seen, 1)
    assert first != expected[0][:6]
    used.restart(rows, prompts, keys)
    found = tokens_of(used, rows, 8, seen, 0)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
    assert used.lengths[:4].tolist() == [len(p) + 7 for p in prompts] == fresh.lengths[:4].tolist()


@torch.no_grad()
def test_a_row_restarts_while_its_neighbors_go_on(stops: Policy) -> None:
    fresh, used = decoder_of(stops), decoder_of(stops)
    for decoder in (fresh, used):
        decoder.prefill(PROMPTS, range(4), [11, 12, 13, 14], range(4))
    undisturbed = tokens_of(fresh, [0, 2, 3], 9, 8, 1)
    before = tokens_of(used, [0, 2, 3], 4, 8, 1)
    used.restart([1], [PROMPTS[1]], [12])  # the same numbers again: the same tokens again
    after = tokens_of(used, [0, 2, 3], 5, 12, 0)
    assert before[0] + after[0] == undisturbed[0]
    again = decoder_of(stops)
    again.prefill(PROMPTS, range(4), [11, 12, 13, 14], range(4))
    expected = tokens_of(again, [1], 5, 8, 1)[0][-1]
    assert used.tokens[[1]].tolist() == expected


@torch.no_grad()
def test_a_restart_needs_the_last_token_of_its_own_prompt(stops: Policy) -> None:
    """The negative control: with another prompt's length or token the numbers are others."""
    fresh = decoder_of(stops)
    fresh.prefill(PROMPTS, range(4), [31] * 4, range(4))
    expected = fresh.logprobs[:4].clone()
    for wrong in ([p[:-1] for p in PROMPTS[:1]], [(*PROMPTS[0][:-1], 99)]):
        used = decoder_of(stops)
        used.prefill(PROMPTS, range(4), [31] * 4, range(4))
        used.restart([0], wrong, [31])
        used.step(10, 9)
        assert abs(float(used.logprobs[0] - expected[0])) > 1e-3


@torch.no_grad()
def test_scattered_rows_are_as_good_as_consecutive_ones(stops: Policy) -> None:
    rows, keys = [7, 1, 4, 9], [31, 32, 33, 34]
    plain, scattered = decoder_of(stops), decoder_of(stops)
    plain.prefill(PROMPTS, range(4), keys, range(4))
    scattered.prefill([(40, 41, 42, 43)] * 2, [0, 1], [1, 2], [0, 4])  # what ended in row 4 leaves no trace
    for _ in range(3):
        scattered.step(10, 9)
    neighbor = scattered.tokens[0].item(), scattered.lengths[0].item()
    scattered.prefill(PROMPTS, range(4), keys, rows)
    assert neighbor == (scattered.tokens[0].item(), scattered.lengths[0].item())
    expected, found = tokens_of(plain, [0, 1, 2, 3], 8, 8, 1), tokens_of(scattered, rows, 8, 8, 1)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
