"""Pin a recipe's reward: the Python file that runs is the one that was approved."""

from __future__ import annotations

from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import UserCode, pin, refuse_code


def pin_reward(
    recipe: Recipe, allow_code: bool, *, repin: bool = False, runs: bool = True
) -> tuple[Recipe, UserCode | None]:
    """The recipe with its reward pinned to a file hash, and that file; None unless the reward is Python code.

    Args:
        repin: accept a file that differs from the recorded one.
        runs: the caller will run the file, which requires ``allow_code``.

    Raises:
        DataError: the file may not run, or differs from the recorded one.
        MissingInput: no such file.
    """
    if recipe.data.reward is None:
        return recipe, None
    spec, code = pin(recipe.data.reward, repin=repin)
    if code is None:
        return recipe, None
    if runs and not allow_code:
        raise refuse_code(code.ref, "data.reward")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"reward": spec})}), code
