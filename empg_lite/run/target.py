"""What RUN, ADAPTER and MODEL mean on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from empg_lite.core.bundled import BUNDLED, PACKAGED
from empg_lite.core.errors import MissingInput, UsageError
from empg_lite.recipe.file import builtin_recipes, load_recipe
from empg_lite.recipe.schema import Recipe
from empg_lite.run.checkpoint import require_valid
from empg_lite.run.layout import RECIPE, is_run, newest_run, run_of, trained_adapter


@dataclass(frozen=True, slots=True)
class Target:
    """A model to evaluate or chat with.

    Attributes:
        recipe: how to load and prompt it; ``model.adapter`` names the adapter, if any.
        run: the run directory it belongs to, if any.
        label: for tables and titles.
    """

    recipe: Recipe
    run: Path | None
    label: str


def resolve_target(
    name: str | None, recipe: str | None = None, overrides: Sequence[str] = (), seed: int | None = None
) -> Target:
    """Resolve RUN|ADAPTER|MODEL; None means the recipe's own model if a recipe is given, else the newest run.

    Args:
        name: a run directory, an adapter or checkpoint folder, a model folder, a hub id, or a model found
            without a hub (``tiny``, ``smollm2-135m``).
        recipe: how to prompt and grade; required for anything outside a run, else the run's own.
        overrides, seed: as for ``load_recipe``.

    Raises:
        MissingInput: it does not exist.
        UsageError: an adapter or model without a recipe.
        CheckpointError: the named checkpoint is not valid.
    """
    if name is None:
        if recipe is not None:
            own = load_recipe(recipe, overrides, seed).resolved()
            return Target(own, None, own.model.name)
        name = str(newest_run())
    path = Path(name)
    run = path if is_run(path) else run_of(path)
    if run is not None:
        if path.parent.name == "checkpoints":
            require_valid(path)
        adapter = trained_adapter(path) if path == run else path
        own = load_recipe(str(run / RECIPE), overrides if recipe is None else (), seed)
        if recipe is not None:  # other data or another prompt with the run's model
            own = load_recipe(recipe, overrides, seed).model_copy(update={"model": own.model})
        return Target(_with_adapter(own, adapter), run, f"{run.name}/{adapter.name}")
    is_adapter = (path / "adapter_config.json").is_file()
    if not is_adapter and not path.is_dir() and not _may_be_a_model(name):
        raise MissingInput("no such run, adapter or model", name, "empg-lite train makes a run under runs/")
    if recipe is None:
        kind = "an adapter" if is_adapter else "a model"
        same = name if name in builtin_recipes() else "NAME"
        raise UsageError(f"{kind} outside a run needs a recipe", name, f"add --recipe {same}")
    own = load_recipe(recipe, overrides, seed)
    if is_adapter:
        return Target(_with_adapter(own, path), None, path.name)
    model = own.model.model_copy(update={"name": name, "adapter": None, "revision": None})
    return Target(own.model_copy(update={"model": model}).resolved(), None, name)


def _may_be_a_model(name: str) -> bool:
    """Whether it is found without a hub, or written like the name of one on the hub."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    return name in BUNDLED or name in PACKAGED or (is_hub_id and not Path(name).parent.is_dir())


def _with_adapter(recipe: Recipe, adapter: Path) -> Recipe:
    model = recipe.model.model_copy(update={"adapter": str(adapter.resolve())})
    return recipe.model_copy(update={"model": model}).resolved()
