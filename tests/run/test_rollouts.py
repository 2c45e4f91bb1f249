"""The rollout file round-trips, and errors name the line and field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rationales import HEADER, rationale

from empg_lite.core.errors import DataError, MissingInput
from empg_lite.core.rationale import problem_id
from empg_lite.run.rollouts import Segment, check_scored, encode_rollouts, rationale_line, read_rollouts


@pytest.mark.parametrize(
    "text", ["", "\ud800 lone", "nul \x00", "line\u2028sep \r\n", "\x1b[2J", "½ ² €", "x" * 100_000]
)
def test_round_trip(tmp_path: Path, text: str) -> None:
    rows = [rationale(completion=text, sample_index=k, reward=1 / 3) for k in range(2)]
    path = tmp_path / "r.jsonl"
    path.write_text(encode_rollouts(HEADER, rows), "utf-8")
    (segment,) = read_rollouts(path)
    assert segment.header == HEADER
    assert list(segment.rationales) == rows


def test_segments_keep_their_headers(tmp_path: Path) -> None:
    other = dataclasses.replace(HEADER, adapter="d" * 64)
    path = tmp_path / "r.jsonl"
    path.write_text(
        encode_rollouts(HEADER, [rationale()]) + encode_rollouts(other, [rationale(step=9)]), "utf-8"
    )
    first, second = read_rollouts(path)
    assert (first.header, second.header) == (HEADER, other)
    assert (first.rationales[0].step, second.rationales[0].step) == (3, 9)


def test_external_text_needs_few_fields(tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    rows = [
        {"question": "1 + 1?", "completion": " #### 2", "reward": 1},
        {"question": "1 + 1?", "completion": "3"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    (segment,) = read_rollouts(path)
    first, second = segment.rationales
    assert first.problem_id == second.problem_id == problem_id("1 + 1?")
    assert (first.sample_index, second.sample_index) == (0, 1)
    assert first.completion_ids == () and first.policy_step == -1 and first.finish_reason == "stop"
    assert (first.reward, second.reward) == (1, None)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"completion_ids": [1, -2]}, ":2: completion_ids"),
        ({"prompt_ids": [1, True]}, ":2: prompt_ids"),
        ({"reward": 1.5}, ":2: reward"),
        ({"reward": "1"}, ":2: reward"),
        ({"step": True}, ":2: step"),
        ({"finish_reason": "eos"}, ":2: finish_reason"),
        ({"reason": "meh"}, ":2: reason"),
        ({"origin": "dreamt"}, ":2: origin"),
        ({"origin": 1}, ":2: origin"),
        ({"completion": None}, ":2: completion"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, object], where: str) -> None:
    record = json.loads(rationale_line(rationale())) | change
    path = tmp_path / "r.jsonl"
    path.write_text(encode_rollouts(HEADER, []) + json.dumps(record) + "\n", "utf-8")
    with pytest.raises(DataError) as raised:
        read_rollouts(path)
    assert str(path) + where in str(raised.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("{broken\n", ":1"),
        ("[1]\n", "not a JSON object"),
        ('{"format": "other"}\n', "format"),
        ('{"format": "empg-lite/rollouts", "version": 99}\n', "version 99"),
        ("[" * 100_000 + "\n", "not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=what):
        read_rollouts(path)
    with pytest.raises(MissingInput):
        read_rollouts(tmp_path / "absent.jsonl")


def test_an_incomplete_last_line_is_dropped_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(encode_rollouts(HEADER, [rationale(), rationale(sample_index=1)])[:-20], "utf-8")
    (segment,) = read_rollouts(path, torn_tail=True)
    assert [r.sample_index for r in segment.rationales] == [0]
    with pytest.raises(DataError, match=":3"):
        read_rollouts(path)


def test_unscored_rows_are_refused() -> None:
    """The advice is a command that works: a quoted path, and --reward where no header names one."""
    path = Path("my rows.jsonl")
    check_scored([Segment(HEADER, (rationale(),))], path)
    rows = (rationale(), rationale(reward=None))
    with pytest.raises(DataError, match=r"1 of 2.*empg-lite score 'my rows.jsonl' --reward NAME$"):
        check_scored([Segment(dataclasses.replace(HEADER, reward_name=None), rows)], path)
    with pytest.raises(DataError, match=r"empg-lite score 'my rows.jsonl'$"):
        check_scored([Segment(dataclasses.replace(HEADER, reward_name="math"), rows)], path)


def test_terms_and_meta_survive(tmp_path: Path) -> None:
    shaped = rationale(reward=0.9, terms={"correct": 1.0, "concise": 0.5}, meta={"level": "Level 5"})
    path = tmp_path / "r.jsonl"
    path.write_text(encode_rollouts(HEADER, [shaped]), "utf-8")
    assert read_rollouts(path)[0].rationales == (shaped,)


@pytest.mark.parametrize("bad", [2, -0.5, True, "1", None])
def test_a_term_outside_its_range_is_refused(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "r.jsonl"
    line = json.loads(rationale_line(rationale())) | {"terms": {"concise": bad}}
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"r.jsonl:1: terms.concise"):
        read_rollouts(path)


def test_origin_survives_and_older_files_have_none(tmp_path: Path) -> None:
    rows = [rationale(origin=origin) for origin in ("sampled", "text")]
    path = tmp_path / "r.jsonl"
    path.write_text(encode_rollouts(HEADER, rows), "utf-8")
    assert list(read_rollouts(path)[0].rationales) == rows
    older = json.loads(rationale_line(rows[1]))
    del older["origin"]
    path.write_text(json.dumps(older) + "\n")
    assert read_rollouts(path)[0].rationales[0].origin == "sampled"


def test_rows_drawn_in_turns_say_which_try_they_are(tmp_path: Path) -> None:
    rows = [rationale(position=n, tries=n + 1, sample_index=n) for n in (0, 7)]
    path = tmp_path / "r.jsonl"
    path.write_text(encode_rollouts(HEADER, rows), "utf-8")
    assert list(read_rollouts(path)[0].rationales) == rows
    record = json.loads(rationale_line(rows[1]))
    assert (record["position"], record["tries"]) == (7, 8)
    for name, bad in (("position", "7"), ("tries", 1.5), ("position", True)):
        path.write_text(json.dumps(record | {name: bad}) + "\n")
        with pytest.raises(DataError, match=f"r.jsonl:1: {name}"):
            read_rollouts(path)


def test_other_rows_are_stored_as_before() -> None:
    """Byte for byte what files looked like before rows could be drawn in turns."""
    assert rationale_line(rationale()) == (
        '{"problem_id": "p1", "question": "1 + 1?", "gold": "2", "prompt": "Question: 1 + 1?\\nAnswer:", '
        '"prompt_ids": [1, 2], "completion": " #### 2", "completion_ids": [3, 4, 0], '
        '"finish_reason": "stop", "step": 3, "policy_step": 2, "sample_index": 0, '
        '"reward": 1.0, "reason": "equal", "weight": 2.0, "extracted": "2", "rule": "hash", '
        '"terms": {}, "meta": {}, "origin": "sampled"}'
    )
