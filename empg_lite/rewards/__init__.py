"""Rewards: reading an answer, comparing it with the gold one, and the killable process that helps."""

from empg_lite.rewards.functions import Grader, check_reward, reward_names
from empg_lite.rewards.verdict import Verdict

__all__ = ["Grader", "Verdict", "check_reward", "reward_names"]
