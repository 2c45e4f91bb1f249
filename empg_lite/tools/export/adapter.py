"""The adapter as plain PEFT, with tokenizer, template, stop tokens and a model card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_lite.policy.adapter import adapter_files
from empg_lite.policy.card import adapter_card, tokenizer_files
from empg_lite.run import store
from empg_lite.tools.export.compare import THRESHOLD, begin, write_files

if TYPE_CHECKING:
    from empg_lite.core.view import View
    from empg_lite.rewards import Grader
    from empg_lite.run.target import Target


def export(target: Target, out: Path, grader: Grader, view: View | None = None) -> dict[str, Any]:
    """Write the adapter's folder.

    Returns:
        ``export`` (the folder), ``bytes``, and the figures of ``Agreement``.

    Raises:
        CheckFailed: it behaves differently from the run's adapter.
        UsageError: ``out`` exists.
    """
    job = begin(target, out, grader, view)
    policy = job.learner.policy
    files = adapter_files(policy) | tokenizer_files(policy)
    del policy
    with store.staged_dir(out) as staged:
        write_files(staged, files)
        section = job.learner.recipe.model.model_copy(update={"adapter": str(staged)})
        found = job.compare(job.reload(section))
        todo = "use the folder of the run itself"
        job.require(found.argmax_agreement, found.compared_tokens, THRESHOLD, "exported adapter", todo)
        store.write_file(staged / "README.md", adapter_card(job.provenance, asdict(found)))
    return job.result(asdict(found))
