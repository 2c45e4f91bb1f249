"""The export command."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from empg_lite.cli.options import AllowCodeOption, DebugOption, JsonOption, Output, TargetArgument


class Form(StrEnum):
    """What ``--to`` takes."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"
    hub = "hub"
    sft_dataset = "sft-dataset"


class Dtype(StrEnum):
    """What ``--dtype`` takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Onto(StrEnum):
    """What ``--onto`` takes."""

    dequantized = "dequantized"
    original = "original"


class GgufType(StrEnum):
    """What ``--gguf-type`` takes."""

    f16 = "f16"
    f32 = "f32"
    bf16 = "bf16"
    q8_0 = "q8_0"


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(export)


def export(
    target: TargetArgument = None,
    to: Annotated[
        Form,
        typer.Option(
            "--to",
            help="adapter: plain PEFT; merged: a plain model; gguf: for llama.cpp; hub: upload the adapter; "
            "sft-dataset: the right rationales.",
            show_default=False,
        ),
    ] = ...,  # type: ignore[assignment]
    out_path: Annotated[
        Path | None,
        typer.Option("--out", help="Where to; default RUN/export/FORM.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="merged: type of its weights; auto: the run's.")
    ] = Dtype.auto,
    onto: Annotated[
        Onto,
        typer.Option(
            "--onto", help="merged, NF4 runs: onto the base as trained over, or onto the original weights."
        ),
    ] = Onto.dequantized,
    gguf_type: Annotated[
        GgufType, typer.Option("--gguf-type", help="gguf: type of its matrices.")
    ] = GgufType.f16,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="OWNER/NAME", help="hub: where to.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="hub: make a new repository public.")] = False,
    allow_code: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a run's model in another form, load it again and compare. Exit code 1 if it acts otherwise."""
    from empg_lite.core.errors import UsageError
    from empg_lite.run.target import resolve_target

    out = Output(as_json)
    if (to is Form.hub) != (repo is not None):
        raise UsageError("--to hub and --repo OWNER/NAME go together", "export")
    chosen = resolve_target(str(target) if target is not None else None)
    if chosen.run is None:
        raise UsageError("what is exported is a run, or a checkpoint of one", str(target))
    where = out_path or chosen.run / "export" / ("sft.jsonl" if to is Form.sft_dataset else to.value)
    with out.guarded():
        if to is Form.sft_dataset:
            from empg_lite.tools.export.sft import export_sft

            result = export_sft(chosen.run, where)
        else:
            from empg_lite.recipe.reward import pin_reward
            from empg_lite.rewards import Grader
            from empg_lite.tools import export as exporting

            plan, code = pin_reward(chosen.recipe, allow_code)
            chosen = replace(chosen, recipe=plan)
            with Grader(code=code) as grader:
                if to is Form.adapter:
                    result = exporting.export_adapter(chosen, where, grader, out.view())
                elif to is Form.merged:
                    result = exporting.export_merged(
                        chosen, where, grader, out.view(), dtype=dtype.value, onto=onto.value
                    )
                elif to is Form.gguf:
                    result = exporting.export_gguf(chosen, where, grader, out.view(), kind=gguf_type.value)
                else:
                    result = exporting.upload_adapter(
                        chosen, str(repo), grader, out.view(), private=not public
                    )
        out.line(result)
        _say(out, result)


def _say(out: Output, result: dict[str, Any]) -> None:
    if "rows" in result:
        text = f"{result['rows']} right rationales of {result['problems']} problems in {result['export']}"
        text += f" ({result['duplicates']} duplicates left out)"
    else:
        text = f"{result['export']}: {result['bytes'] / 1e6:,.1f} MB; the adapter's token first at "
        text += f"{result['argmax_agreement']:.2%} of {result['compared_tokens']} places"
        if "greedy_agreement" in result:
            text += (
                f", {result['greedy_agreement']:.0%} of {result['compared_prompts']} greedy answers the same"
            )
            text += f", reward {result['reward']:.1%} (adapter {result['reward_adapter']:.1%})"
    out.print(text, markup=False, highlight=False)
