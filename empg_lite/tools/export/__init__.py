"""Export formats. Each is written, loaded again, and compared with the run's adapter before it is published.

To add a format, write a file here with a function ``export`` and add a line to ``FORMATS``; the command and
``api.export_run`` follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.core.errors import UsageError

if TYPE_CHECKING:
    from empg_lite.core.view import View
    from empg_lite.run.target import Target


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a format: a keyword argument of its ``export``, and a flag of the command.

    Attributes:
        default: None means that the option is required.
        choices: the allowed values; empty means any.
        flag: of the command, where it differs from the keyword.
        metavar: stands for the value in the command's help.
    """

    help: str
    default: str | bool | None = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    metavar: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """One value of ``--to``.

    Attributes:
        module: file in this folder whose ``export(target, out, grader, view, **options)`` writes the format
            and returns the figures to report, with ``export``: where it is.
        help: for the command's help.
        options: by keyword.
        file: default name under ``RUN/export/``; empty: the name of the format.
        loads_model: False for a format that reads stored rationales only: its ``grader`` is None.
    """

    module: str
    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    file: str = ""
    loads_model: bool = True


FORMATS: dict[str, Format] = {
    "adapter": Format("adapter", "plain PEFT"),
    "merged": Format(
        "merged",
        "a plain model",
        {
            "dtype": Option(
                "type of the weights; auto: the run's", "auto", ("auto", "float32", "bfloat16", "float16")
            ),
            "onto": Option(
                "NF4 runs: merge into the dequantized base used in training, or into the original weights",
                "dequantized",
                ("dequantized", "original"),
            ),
        },
    ),
    "gguf": Format(
        "gguf",
        "for llama.cpp",
        {"kind": Option("type of the matrices", "f16", ("f16", "f32", "bf16", "q8_0"), "--gguf-type")},
    ),
    "hub": Format(
        "hub",
        "upload the adapter",
        {
            "repo": Option("where to upload", metavar="OWNER/NAME"),
            "public": Option("make a new repository public", False),
        },
    ),
    "sft-dataset": Format("sft", "the right rationales", file="sft.jsonl", loads_model=False),
}


def export(
    target: Target,
    to: str,
    out: Path | None = None,
    *,
    allow_code: bool = False,
    view: View | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a run's model in another format.

    Args:
        to: one of ``FORMATS``.
        out: None: ``RUN/export/FORMAT``. ``hub`` does not use it.
        allow_code: permission to run the file of a ``python:FILE.py`` reward.
        options: of that format.

    Returns:
        ``export``: where it is; and what the format reports.

    Raises:
        UsageError: an unknown format or option, or the target is not part of a run.
        CheckFailed: the export behaves differently from the run's adapter; nothing was written.
    """
    if to not in FORMATS:
        raise UsageError(f"unknown export format {to!r}", "--to", f"one of {', '.join(FORMATS)}")
    if target.run is None:
        raise UsageError("only a run, or a checkpoint of one, can be exported", target.label)
    chosen = FORMATS[to]
    _check_options(to, chosen.options, options)
    write = import_module(f"{__name__}.{chosen.module}").export
    where = out or target.run / "export" / (chosen.file or to)
    if not chosen.loads_model:
        return dict(write(target, where, None, view, **options))
    from empg_lite.recipe.reward import pin_reward
    from empg_lite.rewards import Grader

    recipe, code = pin_reward(target.recipe, allow_code)
    with Grader(code=code) as grader:
        return dict(write(replace(target, recipe=recipe), where, grader, view, **options))


def _check_options(to: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in known:
            raise UsageError(
                f"{_flag(name)} is not an option of this format",
                f"--to {to}",
                f"it has {', '.join(map(_flag, known)) or 'no options'}",
            )
        choices = known[name].choices
        if choices and value not in choices:
            raise UsageError(f"unknown value {value!r}", _flag(name), f"one of {', '.join(choices)}")
    for name, option in known.items():
        if option.default is None and given.get(name) is None:
            raise UsageError(
                "a required option is missing", f"--to {to}", f"add {_flag(name)} {option.metavar}"
            )


def _flag(name: str) -> str:
    """The flag of the command for a keyword."""
    flags = (o.flag for form in FORMATS.values() for key, o in form.options.items() if key == name)
    return next(flags, "") or f"--{name}"
