"""The export command. Its options are those of the formats in ``tools.export``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from empg_lite import api
from empg_lite.cli.options import AllowCodeOption, TargetArgument
from empg_lite.cli.output import Output
from empg_lite.tools.export import FORMATS, Option

#: Every format's options, by keyword.
OPTIONS = {name: option for format in FORMATS.values() for name, option in format.options.items()}


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])


def _flag(to: str, name: str, option: Option) -> inspect.Parameter:
    kind = Literal[option.choices] if option.choices else bool if option.default is False else str | None
    flag = option.flag or f"--{name}"
    shown = typer.Option(
        flag, help=f"{to}: {option.help}.", metavar=option.metavar or None, show_default=bool(option.default)
    )
    return _parameter(name, kind, option.default, shown)


def with_format_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace ``**options`` of a command by ``--to`` and a flag for each option of a format."""
    forms = "; ".join(f"{name}: {format.help}" for name, format in FORMATS.items())
    to = typer.Option("--to", help=f"{forms}.", metavar="FORMAT", show_default=False)
    flags = [_flag(name, k, o) for name, format in FORMATS.items() for k, o in format.options.items()]
    signature = inspect.signature(command, eval_str=True)
    out, target, *own, _ = signature.parameters.values()
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    chosen = _parameter("to", Literal[tuple(FORMATS)], ..., to)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[out, target, chosen, *flags, *own]
    )
    return command


@with_format_options
def export(
    out: Output,
    target: TargetArgument = None,
    out_path: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write; default RUN/export/FORMAT.", show_default=False),
    ] = None,
    allow_code: AllowCodeOption = False,
    **options: Any,
) -> None:
    """Write a run's model in another format, reload it and compare. Exit code 1 if it behaves differently."""
    to = options.pop("to")
    own = FORMATS[to].options
    given = {name: v for name, v in options.items() if name in own or v != OPTIONS[name].default}
    result = api.export_run(target, to, out_path, allow_code=allow_code, view=out.view(), **given)
    out.line(result)
    out.say(_export_text(result))


def _export_text(result: dict[str, Any]) -> str:
    if "rows" in result:
        return (
            f"{result['rows']} right rationales of {result['problems']} problems in {result['export']} "
            f"({result['duplicates']} duplicates left out)"
        )
    if "argmax_agreement" not in result:
        return str(result["export"])
    text = (
        f"{result['export']}: {result['bytes'] / 1e6:,.1f} MB; agrees with the adapter on the top token at "
        f"{result['argmax_agreement']:.2%} of {result['compared_tokens']} positions"
    )
    if "greedy_agreement" in result:
        text += (
            f" and on {result['greedy_agreement']:.0%} of {result['compared_prompts']} greedy answers; "
            f"reward {result['reward']:.1%} (adapter {result['reward_adapter']:.1%})"
        )
    return text
