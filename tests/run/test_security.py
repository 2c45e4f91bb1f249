"""Hostile models, names and secrets: refused or displayed, never followed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixture_model import load_fixture_policy
from fixture_recipe import write_recipe

from empg_lite.core.errors import MissingInput, ModelUnusable
from empg_lite.core.safe_text import without_passwords
from empg_lite.loop.train import TrainOptions, train
from empg_lite.recipe.file import load_recipe
from empg_lite.run import store

CANARY = "s3cr3t-c4n4ry"


# --- code from a repository --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_runs_none(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Refused if the model class would come from the repository; the tokenizer's is ignored."""
    folder, sung = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "sung"
    (folder / "evil.py").write_text(f"open({str(sung)!r}, 'w')\n", "utf-8")
    facts = json.loads((folder / name).read_text("utf-8"))
    facts["auto_map"] = {
        "AutoConfig": "evil.X",
        "AutoModelForCausalLM": "evil.X",
        "AutoTokenizer": ["evil.X", None],
    }
    (folder / name).write_text(json.dumps(facts), "utf-8")
    try:
        load_fixture_policy(folder)
        assert name == "tokenizer_config.json"
    except ModelUnusable as error:
        assert name == "config.json" and "needs remote code" in str(error) and error.exit_code == 66
    assert not sung.exists()


def test_only_pickled_weights_are_missing_weights(model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(MissingInput, match="pickle files are not read") as raised:
        load_fixture_policy(folder)
    assert raised.value.exit_code == 66


TEMPLATES_THAT_ATTACK = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for i in range(10**10) %}{% endfor %}",
    "{{ 'x' * 2**33 }}",
]


@pytest.mark.parametrize("template", TEMPLATES_THAT_ATTACK)
def test_a_models_own_template_is_never_rendered(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """Prompts come from the project or the user and have one placeholder: nothing to sandbox."""
    import jinja2

    folder = shutil.copytree(model_dir, tmp_path / "model")
    facts = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**facts, "chat_template": template}), "utf-8")
    rendered: list[str] = []
    monkeypatch.setattr(jinja2.Template, "render", lambda self, *a, **k: rendered.append("template"))
    recipe = load_recipe(str(write_recipe(tmp_path, folder)), ["run.steps=1", "run.eval_every=0"])
    assert train(recipe, tmp_path / "run", TrainOptions(force=True))["steps"] == 1
    assert rendered == []
    jinja2.Template("{{ 1 }}").render()  # the control
    assert rendered == ["template"]


# --- names -------------------------------------------------------------------------------------------------

NAMES = [
    "../x", "/etc/x", "a/../../b", "CON", "x" * 300, "~", "$(id)", ";rm -rf x", "-rf", "a\u2215b", ".", "..",
    "`id`", "a\nb", "\u202ex", "%2e%2e/x", "file:///etc/passwd", "\\\\host\\x", "a b", "*", "?", "'", '"',
]  # fmt: skip

FUZZ_NAMES = """
import json, os, sys
root, names = sys.argv[1], json.loads(sys.argv[2])
from empg_lite.run import store
from empg_lite.core.errors import EmpgError
from empg_lite.recipe.file import load_recipe
from empg_lite.policy.templates import load_template
from empg_lite.run.checkpoint import stored_state
from empg_lite.run.target import resolve_target
from pathlib import Path
import empg_lite.run.layout, empg_lite.rewards
os.chdir(root)
seen = []
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append([event, repr(arguments)])
    if event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not os.path.realpath(str(arguments[0])).startswith(os.path.realpath(root)):
            seen.append([event, repr(arguments)])
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        if not os.path.realpath(str(arguments[0])).startswith(os.path.realpath(root)):
            seen.append([event, repr(arguments)])
sys.addaudithook(hook)
refused = 0
for number, name in enumerate(names):
    step = Path(root) / "run" / "checkpoints" / f"step-{number:06d}"
    store.write_dir(step, {"a": b"1"})
    manifest = json.loads((step / "manifest.json").read_text())
    (step / "manifest.json").write_text(json.dumps({**manifest, name: {"bytes": 1, "sha256": "x"}}))
    refused += store.verify_dir(step) is not None
    calls = (load_recipe, load_template, resolve_target, lambda n: load_recipe("tiny", ["data.path=" + n]))
    for call in calls:
        try:
            call(name)
        except (EmpgError, OSError):  # the command makes a line of either
            pass
if len(sys.argv) > 3:  # the control
    open("/tmp/" + sys.argv[3], "w").close(); os.remove("/tmp/" + sys.argv[3])
print(json.dumps([refused, seen]))
"""


@pytest.mark.parametrize("n", [150, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_thousand_names_write_nothing_outside_and_start_no_shell(tmp_path: Path, n: int) -> None:
    rng = random.Random(0)
    names = NAMES + [
        "".join(rng.choice([*NAMES, "/", "..", "a"]) for _ in range(3))[:400] for _ in range(n - len(NAMES))
    ]
    names = [n.replace("\0", "") for n in names]

    def fuzz(root: Path, *more: str) -> list[Any]:
        root.mkdir()
        given = json.dumps(names[:1] if more else names)
        command = [sys.executable, "-c", FUZZ_NAMES, str(root), given, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        assert done.returncode == 0, done.stderr[-1000:]
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    refused, seen = fuzz(tmp_path / "root")
    assert refused == len(names) and seen == []
    assert len(fuzz(tmp_path / "control", f"empg-{os.getpid()}")[1]) == 2


WATCH_A_REWARD = """
import json, sys
seen, mine = [], sys.argv[1]
def hook(event, arguments):
    if event in ("import", "exec", "compile") and mine in repr(arguments):
        seen.append(event)
sys.addaudithook(hook)
from empg_lite.cli import main
if sys.argv[2] == "control":
    import runpy
    runpy.run_path(mine)
    code = 0
else:
    try:
        code = main(sys.argv[2:])
    except SystemExit as end:
        code = end.code
print(json.dumps([code, seen]))
"""


@pytest.mark.slow
def test_a_recipe_that_names_code_runs_none(recipe_file: Path, tmp_path: Path) -> None:
    """Nor does one inside a checkpoint or run; parsing the file to report an error is not running it."""
    mine, sung = tmp_path / "mine.py", tmp_path / "sung"
    mine.write_text(
        f"open({str(sung)!r}, 'w')\ndef reward(completion, gold, question, meta):\n    return 1\n"
    )
    recipe_file.write_text(recipe_file.read_text("utf-8").replace('"regex:[a-m]"', "python:mine.py"), "utf-8")

    def watched(*arguments: Any) -> tuple[int, list[str], str]:
        command = [sys.executable, "-c", WATCH_A_REWARD, str(mine), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        code, seen = json.loads(done.stdout.splitlines()[-1])
        return code, seen, done.stderr

    train = ("train", "--recipe", recipe_file, "--output-dir", tmp_path / "run", "--max-steps", "1")
    code, seen, err = watched(*train)
    assert code == 65 and "exec" not in seen and "import" not in seen and not sung.exists()
    assert hashlib.sha256(mine.read_bytes()).hexdigest() in err and "--allow-code" in err
    assert "exec" in watched("control")[1] and sung.exists()

    sung.unlink()
    assert watched(*train, "--allow-code")[0] == 0 and sung.exists()  # by the worker
    sung.unlink()
    run = tmp_path / "run"
    commands: list[tuple[Any, ...]] = [
        ("train", "--output-dir", run, "--resume", "--max-steps", "2"),
        ("eval", run),
        ("eval", run / "checkpoints" / "step-000001"),
        ("chat", run, "--prompt", "a", "--json"),
        ("score", run / "rollouts" / "step-000001.jsonl"),
    ]
    for command in commands:
        code, seen, err = watched(*command)
        assert code == 65 and not {"exec", "import"} & set(seen) and not sung.exists(), (command, err)


def test_modes_and_links(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store.write_file(tmp_path / "run" / "a.json", "1")
        store.write_dir(tmp_path / "run" / "step", {"b": b"2"})
        store.append_text(tmp_path / "run" / "log", "3\n")
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    victim = tmp_path / "victim"
    victim.write_text("mine", "utf-8")
    (tmp_path / "run" / "events").symlink_to(victim)
    with pytest.raises(store.StorageError, match="symbolic links are not written through"):
        store.append_text(tmp_path / "run" / "events", "x")
    store.write_file(tmp_path / "run" / "events", "replaced")  # the link goes, not what it points to
    assert victim.read_text("utf-8") == "mine"


# --- secrets -----------------------------------------------------------------------------------------------


def test_no_secret_is_written_or_printed(
    recipe_file: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, CANARY)
    url, run = f"https://me:{CANARY}@host.invalid/x", tmp_path / "run"
    two = ("train", "--recipe", recipe_file, "--debug", "--output-dir")
    keys = (
        *(
            "model.name",
            "model.adapter",
            "data.source",
            "data.path",
            "data.prompt",
            "data.reward",
            "data.split",
        ),
        *("data.reward", "data.split", "data.eval_path", "data.hub_config", "run.steps", "nonsense"),
    )
    commands: list[tuple[Any, ...]] = [
        ("train", "--recipe", recipe_file, "--output-dir", run, "--debug"),
        *((*two, run, "--set", f"{key}={url}") for key in keys),
        (*two, run),
        ("train", "--recipe", url, "--debug"),
        ("eval", url, "--debug"),
        ("chat", url, "--prompt", "x", "--debug"),
        ("inspect", url, "--debug"),
        ("recipes", "show", url, "--debug"),
        ("grade", "--gold", "1", "--prediction", "1", "--reward", url, "--debug"),
        ("plan", "--recipe", url, "--debug"),
        ("check", "--recipe", url, "--debug"),
        ("score", url, "--debug"),
        ("doctor", "--debug"),
    ]  # fmt: skip
    printed, failed = "", 0
    for command in commands:
        code, out, err = cli(*command)
        printed, failed = printed + out + err, failed + (code != 0)
    assert failed >= 20
    assert CANARY not in printed, printed[max(0, printed.find(CANARY) - 300) :][:600]
    hits = [p for p in run.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert hits == [] and "host.invalid" in printed, "the control: the address itself is said"
    assert without_passwords(url) == "https://***@host.invalid/x"


def test_no_command_takes_a_token() -> None:
    help_of = subprocess.run(
        [sys.executable, "-m", "empg_lite", "train", "--help"], capture_output=True, text=True, check=True
    )
    assert "--token" not in help_of.stdout and "--output-dir" in help_of.stdout


NO_NETWORK = """
import socket, sys
def refuse(*a, **k): raise AssertionError("the network was asked for")
real = socket.socket.connect
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from empg_lite.cli import main
main(sys.argv[1:])
"""


def test_training_a_local_model_asks_for_no_network(recipe_file: Path, tmp_path: Path) -> None:
    command = [
        "train",
        "--recipe",
        str(recipe_file),
        "--set",
        "run.steps=1",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "network" not in done.stderr, done.stderr[-500:]
