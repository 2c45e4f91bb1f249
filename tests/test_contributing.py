"""``docs/contributing.md`` is true: each kind of change works in a copy, in the files that its row names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text("utf-8")


def files_of(change: str) -> list[str]:
    """The package's files that the page names for a kind of change."""
    (row,) = re.findall(rf"^\| {re.escape(change)} \| (.*?) \|", PAGE, re.MULTILINE)
    return re.findall(r"`([\w/]+\.py)`", row)


@dataclass
class Copy:
    """A copy of the package in which only the files of one kind of change may be edited."""

    folder: Path
    allowed: list[str]
    edited: set[str] = field(default_factory=set)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text that occurs once."""
        assert name in self.allowed, f"{name} is not named in docs/contributing.md"
        path = self.folder / "empg_lite" / name
        text = path.read_text("utf-8")
        assert text.count(old) == 1, f"{text.count(old)} times in {name}: {old!r}"
        path.write_text(text.replace(old, new), "utf-8")
        self.edited.add(name)

    def before(self, name: str, anchor: str, line: str) -> None:
        """Add a line in front of text that occurs once."""
        self.edit(name, anchor, f"{line}\n{anchor}")

    def python(self, *words: str) -> str:
        """What Python prints with the copy in place of the package."""
        paths = os.pathsep.join((str(self.folder), str(ROOT / "tests" / "support")))
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Copy:
    shutil.copytree(ROOT / "empg_lite", tmp_path / "empg_lite", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return Copy(tmp_path, files_of(request.param))


TRAIN = ("-m", "empg_lite", "train", "--recipe", "tiny", "--output-dir", "run", "--max-steps", "1")
QUICK = ("--set", "run.eval_every=0", "--set", "run.eval_limit=8", "--set", "sampler.problems_per_step=4")
WEIGH = """
from rationales import rationale
from empg_lite.core.rationale import group_rationales
from empg_lite.loop.estep import weigh
from empg_lite.recipe.file import load_recipe
recipe = load_recipe("tiny", ["sampler.tries=null", "em.weighting=squared"])
groups = group_rationales(rationale(sample_index=k, reward=r) for k, r in enumerate((0.5, 1.0)))
(group,) = weigh(groups, weighting=recipe.em.weighting)
print(recipe.em.weighting, [r.weight for r in group.rationales])
"""


@pytest.mark.parametrize("copy", ["a weighting"], indirect=True)
def test_a_weighting(copy: Copy) -> None:
    """Squared rewards: accepted in a recipe, and what the loop then gives rationales."""
    copy.edit("em.py", '"standardized", "raw")', '"standardized", "raw", "squared")')
    branch = '    elif weighting == "squared":\n        weights = rewards.square()'
    copy.before("em.py", '    elif weighting == "raw":', branch)
    copy.edit("recipe/schema.py", '"standardized", "raw"]', '"standardized", "raw", "squared"]')
    assert copy.edited == set(copy.allowed)
    assert copy.python("-c", WEIGH) == "squared [0.25, 1.0]\n"


@pytest.mark.parametrize("copy", ["a recipe key"], indirect=True)
def test_a_recipe_key_and_a_train_flag(copy: Copy) -> None:
    """A motto that is shown when training begins: read, checked, recorded, listed. And ``train --cheer``."""
    copy.allowed.append("loop/train.py")  # the file that reads it
    copy.before("recipe/schema.py", "    steps: ", '    motto: Text = key("none", "shown at the start")')
    note = '        view.note(f"motto: {recipe.run.motto}")'
    copy.before("loop/train.py", "        while state.step < ", note)

    copy.allowed, copy.edited = files_of("a flag of `train`"), set()
    option = '    cheer: Annotated[str, typer.Option(help="Shown at the start.")] = "",'
    copy.before("cli/train.py", "    allow_change: AllowChangeOption = None,\n    allow_code", option)
    copy.before("cli/train.py", "        trackers=track or (),", "        cheer=cheer,")
    middle = "    seeds: Sequence[int] = (),\n    resume: bool = False,\n    force: bool = False,"
    copy.before("api.py", middle, '    cheer: str = "",')
    note = '    if cheer and view is not None:\n        view.note(f"cheer: {cheer}")'
    copy.before("api.py", "    require(trackers)\n", note)
    assert copy.edited == set(copy.allowed)

    said = copy.python(*TRAIN, *QUICK, "--set", "run.motto=onward", "--cheer", "upward")
    assert "motto: onward" in said and "cheer: upward" in said
    assert "motto: onward" in (copy.folder / "run" / "recipe.yaml").read_text("utf-8")
    assert "shown at the start" in copy.python("-m", "empg_lite", "recipes", "show", "tiny")
    code = "from empg_lite import api; from inspect import signature; print(signature(api.run))"
    assert "cheer" in copy.python("-c", code)


ENGINES = """
import sys, torch
from pathlib import Path
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM
from fixture_model import build_model, load_fixture_policy
from sampling import ids_of, prompts_of
from empg_lite.policy.memory.shape import read_shape
from empg_lite.sampler import Decoding, make_sampler
folder = build_model(Path("model"))
AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
torch.manual_seed(0)
sizes = dict(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
ends = dict(eos_token_id=256, bos_token_id=256, tie_word_embeddings=True, initializer_range=0.05)
MistralForCausalLM(MistralConfig(**sizes, **heads, **ends, sliding_window=None)).save_pretrained(folder)
policy = load_fixture_policy(folder)
prompts = prompts_of(policy, 4, 2)
greedy = Decoding(12, 0.0)
native, plain = (ids_of(make_sampler(policy, e).sample(prompts, greedy)) for e in ("native", "generate"))
assert native == plain and read_shape("model").layers == 2
pairs = [((1, 2, 3), (4, 5, 256)), ((1, 2, 3), (6, 256))]
packed = policy.completion_logprobs(pairs)
assert all(p.isfinite().all() for p in packed)
print("the engines agree")
"""


@pytest.mark.parametrize("copy", ["an architecture"], indirect=True)
def test_an_architecture(copy: Copy) -> None:
    """Mistral, which is built like Llama: both engines draw the same from random weights."""
    assert len(copy.allowed) <= 4
    copy.before("policy/families.py", '    "qwen3": Family(', '    "mistral": Family("Mistral 7B v0.3"),')
    assert "the engines agree" in copy.python("-c", ENGINES)


def test_no_row_names_too_many_files_or_one_that_is_not_there() -> None:
    most = {"a reward": 2, "a weighting": 2, "a recipe key": 2, "a flag of `train`": 2, "an export format": 2}
    for change, limit in {**most, "an architecture": 4}.items():
        files = files_of(change)
        assert 0 < len(files) <= limit, change
        for name in files:
            path = ROOT / "empg_lite" / name
            assert path.exists() or path.parent.is_dir(), name


def test_a_file_that_is_not_named_may_not_be_edited(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not named"):
        Copy(tmp_path, ["em.py"]).edit("api.py", "a", "b")
