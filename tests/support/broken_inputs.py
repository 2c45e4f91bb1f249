"""Broken recipes and data files: one line with file, line and field, code 65, fast and without torch.

``BROKEN`` holds (name, files, overrides, fragments of the message). ``recipe.yaml`` and ``rows.jsonl`` are
sound unless a case brings its own.
"""

from __future__ import annotations

import gzip
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_lite.core.errors import EmpgError
from empg_lite.data.sources import load_splits
from empg_lite.recipe.file import load_recipe

#: What takes longer hangs: a limit for aliases of aliases, and not for a busy machine.
SECONDS = 30.0
ROW = '{"question": "What is %d + 1?", "answer": "%d"}\n'
ROWS = "".join(ROW % (i, i + 1) for i in range(20))
HEAD = "model:\n  name: tiny\ndata:\n  source: local\n  path: rows.jsonl\n"  # lines 1 to 5
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TWO_FILES = {
    "recipe.yaml": HEAD.replace("rows.jsonl", "d"),
    "d/train.jsonl": ROWS,
    "d/train.csv": "question,answer\n1,1\n",
}
Files = Mapping[str, str | bytes]


def recipe(tail: str, head: str = HEAD) -> Files:
    return {"recipe.yaml": head + tail}


def rows(text: str | bytes) -> Files:
    """Three sound rows (lines 1 to 3), then ``text``."""
    sound = "".join(ROW % (i, i + 1) for i in range(3))
    return {"rows.jsonl": sound.encode() + (text if isinstance(text, bytes) else text.encode())}


def data(name: str, content: str | bytes, source: str = "local") -> Files:
    """A data file of another name or kind."""
    head = HEAD.replace("rows.jsonl", name).replace("source: local", f"source: {source}")
    return {"recipe.yaml": head, name: content}


def parquet(table: dict[str, list[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), out)
    return out.getvalue()


Case = tuple[str, Files, Sequence[str], Sequence[str]]

# fmt: off
RECIPES: list[Case] = [
    ("misspelt-key", recipe("optim:\n  learning_rat: 1e-5\n"),
     (), ["recipe.yaml:7: optim.learning_rat", "did you mean optim.learning_rate?"]),
    ("misspelt-section", recipe("smapler:\n  top_k: 0\n"),
     (), ["recipe.yaml:6: smapler", "did you mean sampler?"]),
    ("key-of-another-section", recipe("em:\n  learning_rate: 1e-5\n"),
     (), ["recipe.yaml:7: em.learning_rate", "did you mean optim.learning_rate?"]),
    ("key-of-a-peer", recipe("optim:\n  lr: 1e-5\n"),
     (), ["recipe.yaml:7: optim.lr", "did you mean optim.learning_rate?"]),
    ("key-outside-its-section", recipe("learning_rate: 1e-5\n"),
     (), ["recipe.yaml:6: learning_rate", "optim.learning_rate"]),
    ("dotted-key", recipe("em.passes: 2\n"),
     (), ["recipe.yaml:6: em.passes", "nest it: em: {passes: ...}"]),
    ("quoted-number", recipe('run:\n  steps: "8"\n'),
     (), ["recipe.yaml:7: run.steps", 'expected whole number >= 1, got "8"', "without quotes"]),
    ("text-for-a-number", recipe("run:\n  steps: 8x\n"), (), ["recipe.yaml:7: run.steps", 'got "8x"']),
    ("fraction-for-a-count", recipe("run:\n  steps: 8.5\n"), (), ["recipe.yaml:7: run.steps", "got 8.5"]),
    ("bool-for-a-count", recipe("run:\n  steps: true\n"), (), ["recipe.yaml:7: run.steps", "got true"]),
    ("word-for-a-bool", recipe("", HEAD.replace("tiny\n", "tiny\n  load_in_4bit: no\n")),
     (), ["recipe.yaml:3: model.load_in_4bit", "expected true | false", 'got "no"']),
    ("zero-steps", recipe("run:\n  steps: 0\n"), (), ["recipe.yaml:7: run.steps", ">= 1, got 0"]),
    ("negative-rate", recipe("optim:\n  learning_rate: -1e-5\n"),
     (), ["recipe.yaml:7: optim.learning_rate", "> 0", "got -1e-05"]),
    ("nan-rate", recipe("optim:\n  learning_rate: .nan\n"),
     (), ["recipe.yaml:7: optim.learning_rate", "got NaN"]),
    ("infinite-norm", recipe("optim:\n  max_grad_norm: .inf\n"),
     (), ["recipe.yaml:7: optim.max_grad_norm", "got Infinity"]),
    ("overflowing-rate", recipe("optim:\n  learning_rate: 1e999\n"),
     (), ["recipe.yaml:7: optim.learning_rate", "got Infinity"]),
    ("endless-number", recipe("run:\n  seed: 0x" + "f" * 9000 + "\n"),
     (), ["recipe.yaml:7: run.seed", "too many digits"]),
    ("seed-too-large", recipe("run:\n  seed: 4294967296\n"),
     (), ["recipe.yaml:7: run.seed", ">= 0 and < 4294967296"]),
    ("share-over-one", recipe("em:\n  baseline: 1.5\n"),
     (), ["recipe.yaml:7: em.baseline", "<= 1", "got 1.5"]),
    ("misspelt-choice", recipe("em:\n  weighting: posterier\n"),
     (), ["recipe.yaml:7: em.weighting", "did you mean posterior?"]),
    ("misspelt-auto", recipe("optim:\n  micro_batch_tokens: aut\n"),
     (), ["recipe.yaml:7: optim.micro_batch_tokens", "did you mean auto?"]),
    ("list-for-a-text", recipe("", HEAD.replace("name: tiny", "name: [a, b]")),
     (), ["recipe.yaml:2: model.name", "got a list"]),
    ("number-for-a-text", recipe("", HEAD.replace("name: tiny", "name: 7")),
     (), ["recipe.yaml:2: model.name", "expected text, got 7"]),
    ("null-for-a-text", recipe("", HEAD.replace("name: tiny", "name:")),
     (), ["recipe.yaml:2: model.name", "got null"]),
    ("blank-text", recipe("", HEAD.replace("name: tiny", 'name: "  "')),
     (), ["recipe.yaml:2: model.name", "empty text"]),
    ("escape-in-a-text", recipe("", HEAD.replace("name: tiny", r'name: "a\eb"')),
     (), ["recipe.yaml:2: model.name", "control characters"]),
    ("surrogate-in-a-text", recipe("", HEAD.replace("name: tiny", r'name: "a\ud800b"')),
     (), ["recipe.yaml:2: model.name", "control characters"]),
    ("duplicate-key", recipe("run:\n  steps: 3\n  seed: 1\n  steps: 4\n"),
     (), ["recipe.yaml:9: run.steps", "first on line 7"]),
    ("duplicate-section", recipe("model:\n  name: tiny\n"),
     (), ["recipe.yaml:6: model", "first on line 1"]),
    ("alias", recipe("run:\n  steps: &n 3\n  seed: *n\n"),
     (), ["recipe.yaml:7: run.steps", "anchors and aliases"]),
    ("alias-bomb", {"recipe.yaml": BOMB}, (), ["recipe.yaml:1: a", "anchors and aliases"]),
    ("merge-key", recipe("run:\n  <<: {steps: 3}\n"), (), ["recipe.yaml:7: run.<<"]),
    ("tag", recipe("run:\n  steps: !!int '3'\n"), (), ["recipe.yaml:7: run.steps", "tags"]),
    ("python-tag", recipe("run: !!python/object/apply:os.system ['true']\n"),
     (), ["recipe.yaml:6: run", "tags"]),
    ("directive", recipe("", "%YAML 1.1\n---\n" + HEAD), (), ["recipe.yaml:", "directives"]),
    ("second-document", recipe("---\nrun:\n  steps: 3\n"), (), ["recipe.yaml:6", "second YAML document"]),
    ("tab", recipe("run:\n\tsteps: 3\n"), (), ["recipe.yaml:7", "not YAML"]),
    ("open-quote", recipe('run:\n  steps: "3\n'), (), ["recipe.yaml:", "not YAML"]),
    ("open-bracket", recipe("run: {steps: 3\n"), (), ["recipe.yaml:", "not YAML"]),
    ("bad-indentation", recipe("run:\n  steps: 3\n seed: 1\n"), (), ["recipe.yaml:8", "not YAML"]),
    ("control-character", recipe("run:\n  steps: 3 \x07\n"), (), ["recipe.yaml:7", "character"]),
    ("not-utf8", {"recipe.yaml": HEAD.encode() + b"# caf\xe9\n"}, (), ["recipe.yaml:6", "not UTF-8"]),
    ("utf16", {"recipe.yaml": HEAD.encode("utf-16")}, (), ["recipe.yaml:1", "not UTF-8"]),
    ("too-large", recipe("#" + "x" * 1_000_000), (), ["recipe.yaml:1", "larger than 1,000,000 bytes"]),
    ("too-many-values", recipe("run: [" + "1," * 300_000 + "]\n"),
     (), ["recipe.yaml:6: run", "too many values"]),
    ("too-deep", recipe("run: " + "[" * 400_000), (), ["recipe.yaml:6: run", "too deep"]),
    ("empty", {"recipe.yaml": ""}, (), ["recipe.yaml:1", "empty"]),
    ("only-comments", {"recipe.yaml": "# nothing\n"}, (), ["recipe.yaml:1", "empty"]),
    ("a-list", {"recipe.yaml": "- model\n"}, (), ["recipe.yaml:1", "sections"]),
    ("a-word", {"recipe.yaml": "model\n"}, (), ["recipe.yaml:1", "sections"]),
    ("section-is-a-word", recipe("run: fast\n"), (), ["recipe.yaml:6: run", 'got "fast"']),
    ("list-as-a-key", recipe("run:\n  ? [steps]\n  : 3\n"), (), ["recipe.yaml:7: run", "plain word"]),
    ("no-model", {"recipe.yaml": "data:\n  source: tiny\n"},
     (), ["recipe.yaml:1: model", "model is missing"]),
    ("no-source", {"recipe.yaml": "model:\n  name: tiny\ndata:\n  split: train\n"},
     (), ["recipe.yaml:3: data.source", "data.source is missing"]),
    ("one-sample-centered", recipe("sampler:\n  samples_per_problem: 1\nem:\n  weighting: centered\n"),
     (), ["recipe.yaml:9: em.weighting", "only one"]),
    ("baseline-of-loo", recipe("em:\n  weighting: loo\n  baseline: 0.5\n"),
     (), ["recipe.yaml:8: em.baseline", "posterior"]),
    ("tries-centered", recipe("sampler:\n  tries: 8\nem:\n  weighting: centered\n"),
     (), ["recipe.yaml:7: sampler.tries", "set em.weighting to posterior and em.baseline to 0"]),
    ("tries-with-a-baseline", recipe("em:\n  baseline: 0.5\nsampler:\n  tries: 8\n"),
     (), ["recipe.yaml:9: sampler.tries", "set em.weighting to posterior and em.baseline to 0"]),
    ("no-tries", recipe("sampler:\n  tries: 0\n"), (), ["recipe.yaml:7: sampler.tries", ">= 1", "got 0"]),
    ("set-tries-raw", recipe("em:\n  weighting: raw\n"),
     ["sampler.tries=8"], ["--set sampler.tries=8", "or tries to null"]),
    ("refill", recipe("sampler:\n  refill: 3\n"),
     (), ["recipe.yaml:7: sampler.refill", "refill was removed", "set sampler.tries instead"]),
    ("set-refill", {}, ["sampler.refill=3"], ["--set sampler.refill=3", "set sampler.tries instead"]),
    ("sequence-mean", recipe("em:\n  normalization: sequence_mean\n"),
     (), ["recipe.yaml:7: em.normalization", "collapses to short guesses"]),
    ("falls-before-it-has-risen", recipe("optim:\n  decay_after: 4\n"),
     (), ["recipe.yaml:7: optim.decay_after", "5 warmup steps", "at least 5"]),
    ("local-without-path", recipe("", HEAD.replace("  path: rows.jsonl\n", "")),
     (), ["recipe.yaml:3: data.path", "no path"]),
    ("tiny-with-path", recipe("", HEAD.replace("local", "tiny")),
     (), ["recipe.yaml:5: data.path", "set data.source to local"]),
    ("misspelt-source", recipe("", HEAD.replace("local", "gsm8")),
     (), ["recipe.yaml:4: data.source", "did you mean gsm8k?"]),
    ("source-is-a-file", recipe("", HEAD.replace("local", "mine/rows.jsonl")),
     (), ["recipe.yaml:4: data.source", "source: local"]),
    ("misspelt-prompt", recipe("", HEAD + "  prompt: qwen-box\n"),
     (), ["recipe.yaml:6: data.prompt", "did you mean qwen-boxed?"]),
    ("unknown-reward", recipe("", HEAD + "  reward: gsm9k\n"), (), ["recipe.yaml:6: data.reward", "gsm9k"]),
    ("broken-reward-pattern", recipe("", HEAD + "  reward: 'regex:('\n"),
     (), ["recipe.yaml:6: data.reward"]),
    ("config-without-hub", recipe("", HEAD + "  hub_config: main\n"),
     (), ["recipe.yaml:6: data.hub_config"]),
    ("same-split", recipe("", HEAD + "  eval_split: train\n"),
     (), ["recipe.yaml:6: data.eval_split", "same"]),
    ("same-column", recipe("", HEAD + "  question_column: a\n  answer_column: a\n"),
     (), ["recipe.yaml:7: data.answer_column", "same column"]),
    ("three-faults", recipe("em:\n  passes: 0\nrun:\n  steps: 0\n  keep: 0\n"),
     (), ["recipe.yaml:7: em.passes", "(and 2 more)"]),
    ("set-misspelt-key", {}, ["run.stepz=3"], ["--set run.stepz=3", "did you mean run.steps?"]),
    ("set-without-section", {}, ["steps=3"], ["--set steps=3", "did you mean run.steps?"]),
    ("set-wrong-type", {}, ["run.steps=many"], ["--set run.steps=many", 'got "many"']),
    ("set-None", {}, ["model.adapter=None"], ["--set model.adapter=None", "write null for none"]),
    ("None-in-the-file", recipe("", HEAD.replace("tiny\n", "tiny\n  adapter: None\n")),
     (), ["recipe.yaml:3: model.adapter", "write null for none"]),
    ("set-list", {}, ["run.steps=[1, 2]"], ["--set run.steps=[1, 2]", "got a list"]),
    ("set-without-value", {}, ["run.steps"], ["--set run.steps", "no ="]),
    ("set-null", {}, ["run.steps="], ["--set run.steps=", "got null"]),
    ("set-mapping", {}, ["run.steps=a: b"], ["--set run.steps=a: b", "got a mapping"]),
    ("set-alias", {}, ["run.steps=*x"], ["--set run.steps=*x", "anchors and aliases"]),
    ("set-contradiction", recipe("em:\n  weighting: loo\n"),
     ["em.baseline=0.5"], ["--set em.baseline=0.5", "posterior"]),
]

DATA: list[Case] = [
    ("broken-json", rows('\n\n{"question": "x", "answer": 3\n'), (), ["rows.jsonl:6", "not JSON"]),
    ("two-objects-a-line", rows(ROW.strip() % (7, 8) + ROW % (8, 9)), (), ["rows.jsonl:4", "not JSON"]),
    ("array-row", rows('["a", "b"]\n'), (), ["rows.jsonl:4", "object of columns"]),
    ("no-question", rows('{"answer": "3"}\n'),
     (), ["rows.jsonl:4: question", "columns here: 'answer'", "data.question_column"]),
    ("no-answer", rows('{"question": "x"}\n'), (), ["rows.jsonl:4: answer", "columns here: 'question'"]),
    ("empty-question", rows('{"question": " ", "answer": "3"}\n'), (), ["rows.jsonl:4: question", "empty"]),
    ("empty-answer", rows('{"question": "x", "answer": ""}\n'), (), ["rows.jsonl:4: answer", "empty"]),
    ("null-answer", rows('{"question": "x", "answer": null}\n'), (), ["rows.jsonl:4: answer", "missing"]),
    ("bool-answer", rows('{"question": "x", "answer": true}\n'),
     (), ["rows.jsonl:4: answer", "true or false"]),
    ("list-answer", rows('{"question": "x", "answer": ["3"]}\n'), (), ["rows.jsonl:4: answer", "a list"]),
    ("nan-answer", rows('{"question": "x", "answer": NaN}\n'), (), ["rows.jsonl:4: answer", "missing"]),
    ("infinite-answer", rows('{"question": "x", "answer": 1e999}\n'), (), ["rows.jsonl:4: answer", "inf"]),
    ("chat-question", rows('{"prompt": [{"role": "user"}], "answer": "3"}\n'),
     (), ["rows.jsonl:4: prompt", "a list"]),
    ("chat-of-two-turns", rows('{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", '
                               '"content": "b"}, {"role": "user", "content": "c"}], "answer": "3"}\n'),
     (), ["rows.jsonl:4: prompt", "a conversation of 3 turns", "a column of its own"]),
    ("chat-with-an-image",
     rows('{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "3"}\n'),
     (), ["rows.jsonl:4: prompt", "a list", "content as text"]),
    ("nested-answer", rows('{"question": "x", "label": {"value": "3", "style": "rule"}}\n'),
     (), ["rows.jsonl:4: answer", "'label.value'", "set data.answer_column"]),
    ("number-question", rows('{"question": 12, "answer": "3"}\n'),
     (), ["rows.jsonl:4: question", "12, not text"]),
    ("surrogate", rows('{"question": "x \\ud800", "answer": "3"}\n'),
     (), ["rows.jsonl:4: question", "surrogate"]),
    ("endless-integer", rows('{"question": "x", "answer": ' + "1" * 5000 + "}\n"),
     (), ["rows.jsonl:4", "too many digits"]),
    ("deep-json", rows('{"question": ' + "[" * 200_000 + "\n"), (), ["rows.jsonl:4", "not JSON"]),
    ("not-utf8-row", rows(b'{"question": "caf\xe9", "answer": "3"}\n'), (), ["rows.jsonl:4", "not UTF-8"]),
    ("two-answers", rows('{"question": "What is 1 + 1?", "answer": "3"}\n'),
     (), ["rows.jsonl:4: answer", "rows.jsonl:2"]),
    ("hash-without-answer", rows('{"question": "x", "answer": "so ####"}\n'),
     (), ["rows.jsonl:4: answer", "empty"]),
    ("solution-without-box", rows('{"problem": "x", "solution": "so it is 3."}\n'),
     (), ["rows.jsonl:4: solution", "\\boxed"]),
    ("solution-with-empty-box", rows('{"problem": "x", "solution": "\\\\boxed{}"}\n'),
     (), ["rows.jsonl:4: solution", "empty"]),
    ("gsm8k-prose-answer", data("g.jsonl", '{"question": "x", "answer": "First.\\nThen 3."}\n', "gsm8k"),
     (), ["g.jsonl:1: answer", "####"]),
    ("no-rows", {"rows.jsonl": ""}, (), ["rows.jsonl:1", "no rows"]),
    ("blank-rows", {"rows.jsonl": "\n\n"}, (), ["rows.jsonl:1", "no rows"]),
    ("one-row", {"rows.jsonl": ROW % (1, 2)},
     (), ["rows.jsonl", "one row is not enough", "add rows, or set data.eval_path"]),
    ("named-column", {}, ["data.answer_column=result"], ["rows.jsonl:1: answer", "no column result"]),
    ("too-much-validation", {},
     ["data.validation=18"], ["rows.jsonl: data.validation", "18 of 18 training rows"]),
    ("all-rows-evaluate", {"test.jsonl": ROWS},
     ["data.eval_path=test.jsonl"], ["rows.jsonl", "no training row is left"]),
    ("unknown-kind", data("rows.txt", ROWS), (), ["rows.txt", "unknown kind", ".parquet"]),
    ("two-files-of-a-split",
     TWO_FILES,
     (), ["/d", "train.jsonl and train.csv"]),
    ("json-object", data("rows.json", '{\n"question": "x"}'), (), ["rows.json:1", "not a list"]),
    ("json-object-of-lists", data("rows.json", '{\n"version": 2, "data": [{"question": "x"}]}'),
     (), ["rows.json:1", "not a list of rows", "write the list under 'data' alone"]),
    ("json-key-twice", rows('{"question": "x", "answer": "3", "answer": "4"}\n'),
     (), ["rows.jsonl:4", "the key 'answer' is there twice"]),
    ("pretty-printed-lines", {"rows.jsonl": '{\n  "question": "x"\n}\n'},
     (), ["rows.jsonl:1", "one object on one line"]),
    ("json-cut-off", data("rows.json", "[\n" + ROW % (1, 2) + ","), (), ["rows.json:3", "not JSON"]),
    ("json-bad-row", data("rows.json", "[\n\n" + ROW % (1, 2) + ',\n\n{"question": "x"}]'),
     (), ["rows.json:6: answer"]),
    ("csv-behind-quoted-newlines", data("rows.csv", 'question,answer\n"a\nb\nc",1\n\n"d",\n'),
     (), ["rows.csv:6: answer", "empty"]),
    ("csv-ragged", data("rows.csv", "question,answer\na,1\nb,2,3\n"),
     (), ["rows.csv:3", "3 cells where the header has 2"]),
    ("csv-open-quote", data("rows.csv", 'question,answer\na,1\n"b,2\nc,3\n'),
     (), ["rows.csv:3", "not CSV"]),
    ("csv-two-columns-of-a-name", data("rows.csv", "question,answer,answer\na,1,2\n"),
     (), ["rows.csv:1: answer", "one name"]),
    ("csv-other-columns", data("rows.csv", "task;result\na;1\n"),
     (), ["rows.csv:2: question", "'task', 'result'"]),
    ("csv-header-only", data("rows.csv", "question,answer\n"), (), ["rows.csv:1", "no rows"]),
    ("csv-nan", data("rows.csv", "question,answer\na,nan\n"), (), ["rows.csv:2: answer", "empty"]),
    ("csv-not-utf8", data("rows.csv", b"question,answer\na,1\ncaf\xe9,2\n"),
     (), ["rows.csv:3", "not UTF-8"]),
    ("parquet-garbage", data("rows.parquet", b"PAR1" + b"\0" * 40 + b"PAR1"),
     (), ["rows.parquet:1", "not Parquet"]),
    ("parquet-null", data("rows.parquet", parquet({"question": ["a", "b"], "answer": ["1", None]})),
     (), ["rows.parquet:2: answer", "missing"]),
    ("gzip-cut-off", data("rows.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)[:-9]),
     (), ["rows.jsonl.gz:1", "not gzip"]),
    ("gzip-in-name-only", data("rows.csv.gz", "question,answer\na,1\n"), (), ["rows.csv.gz:1", "not gzip"]),
    ("a-shard-is-missing",
     {"recipe.yaml": HEAD.replace("rows.jsonl", "d"), "d/train-00000-of-00002.jsonl": ROWS},
     (), ["/d", "shard 00001 of 00002 is missing"]),
    ("no-level", data("m.jsonl", '{"problem": "x", "solution": "\\\\boxed{3}"}\n', "math-hard"),
     (), ["m.jsonl:1: level", "Level 5"]),
]

# fmt: on
BROKEN: list[Case] = RECIPES + DATA


def write_case(folder: Path, files: Files) -> Path:
    """Write the files of a case, sound ones where it brings none; the path of its recipe."""
    for name, content in ({"recipe.yaml": HEAD, "rows.jsonl": ROWS} | dict(files)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "recipe.yaml"


def run_case(folder: Path, files: Files, overrides: Sequence[str]) -> str:
    """The message of a case; an AssertionError where it goes through or ends otherwise."""
    path, started = write_case(folder, files), time.perf_counter()
    try:
        load_splits(load_recipe(str(path), overrides))
    except EmpgError as error:
        assert error.exit_code == 65, error
        assert time.perf_counter() - started < SECONDS
        return str(error)
    raise AssertionError("went through")
