"""Rewards: reading an answer, comparing it with the gold one, and the killable process that helps."""

from empg_lite.rewards.grader import Grader
from empg_lite.rewards.spec import check_reward, reward_names
from empg_lite.rewards.verdict import Case, Verdict
from empg_lite.rewards.worker.usercode import UserCode, pin, refuse_code

__all__ = [
    "Case",
    "Grader",
    "UserCode",
    "Verdict",
    "check_reward",
    "pin",
    "refuse_code",
    "reward_names",
]
