"""A recipe's reward, pinned: a file that it runs is the file that was allowed to run."""

from __future__ import annotations

from empg_lite.recipe.schema import Recipe
from empg_lite.rewards import UserCode, pin, refuse_code


def pin_reward(
    recipe: Recipe, allow_code: bool, *, repin: bool = False, runs: bool = True
) -> tuple[Recipe, UserCode | None]:
    """The recipe with its reward pinned, and the file that the reward runs, if it is one.

    Args:
        repin: take a file that is not the one recorded.
        runs: the caller will run the file, and has to be allowed to.

    Raises:
        DataError: it would run a file that nobody allowed, or one that is not the one recorded.
        MissingInput: the file is not there.
    """
    if recipe.data.reward is None:
        return recipe, None
    spec, code = pin(recipe.data.reward, repin=repin)
    if code is None:
        return recipe, None
    if runs and not allow_code:
        raise refuse_code(code.ref, "data.reward")
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"reward": spec})}), code
