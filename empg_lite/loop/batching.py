"""Split a step's rows among processes, and into micro-batches of a token budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from empg_lite.core.sizes import shared_prefix

if TYPE_CHECKING:
    from empg_lite.core.rationale import Rationale
    from empg_lite.policy.packing import Ids
    from empg_lite.run.parallel import World


#: A prefix that prompts share is computed once, but its keys and values are kept with every prompt. These
#: count as an eighth of its tokens, enough for any model and length (test_plan_families.py); a 16th is not.
PREFIX_AGAIN = 8


def whole_problems(rows: Sequence[Rationale], kept: Sequence[int], world: World) -> list[int]:
    """This process's share of the row numbers ``kept``: whole problems, balanced by their tokens.

    The heaviest problem goes first, to the least loaded process; every process computes the same split.
    """
    problems: dict[str, list[int]] = {}
    for i in kept:
        problems.setdefault(rows[i].problem_id, []).append(i)
    tokens = {pid: sum(rows[i].tokens for i in members) for pid, members in problems.items()}
    loads = [0] * world.size
    mine: list[int] = []
    for pid in sorted(problems, key=lambda pid: -tokens[pid]):  # ties stay in the order of the rows
        lightest = loads.index(min(loads))
        loads[lightest] += tokens[pid]
        if lightest == world.rank:
            mine += problems[pid]
    return sorted(mine)


def packed_batches(rows: Mapping[int, tuple[Ids, int]], budget: int) -> list[list[int]]:
    """Row numbers in batches of at most ``budget`` tokens (or one row), as ``pack`` stores them.

    Shared prompts count once, and so does a prefix that all share, but for its keys (``PREFIX_AGAIN``).

    Problems of similar length are batched together, since attention pads; a problem is split only if it does
    not fit in one batch.

    Args:
        rows: prompt, and tokens of the completion, of each row by its number.
    """
    problems: dict[Ids, list[int]] = {}
    for i in sorted(rows, key=lambda i: (-rows[i][1], i)):
        problems.setdefault(rows[i][0], []).append(i)  # in the order of their longest completion
    prefix = shared_prefix(list(problems))
    batches: list[list[int]] = []
    used = 0
    for prompt, members in problems.items():
        more = len(prompt) - prefix + prefix // PREFIX_AGAIN
        if batches and used + more + sum(rows[i][1] for i in members) <= budget:
            used += more
        else:
            batches.append([])
            used = len(prompt)
        for i in members:
            if batches[-1] and used + rows[i][1] > budget:
                batches.append([])
                used = len(prompt)
            batches[-1].append(i)
            used += rows[i][1]
    return batches
