"""Rewards for video models: how executable the motion in a video is."""

from jidm.adapters.reward.calibration import Calibration
from jidm.adapters.reward.eva import EvaLimits, EvaReward, eva_reward
from jidm.adapters.reward.executability import ExecutabilityReward, Score
from jidm.adapters.reward.terms import TERMS

__all__ = ["TERMS", "Calibration", "EvaLimits", "EvaReward", "ExecutabilityReward", "Score", "eva_reward"]
