"""Rewards for video models: how executable the motion in a video is."""

from jidm.adapters.reward.calibration import TermScales
from jidm.adapters.reward.eva import EvaLimits, EvaReward, eva_reward
from jidm.adapters.reward.executability import ExecutabilityReward, VideoScore
from jidm.adapters.reward.terms import TERMS

__all__ = ["TERMS", "TermScales", "EvaLimits", "EvaReward", "ExecutabilityReward", "VideoScore", "eva_reward"]
