"""Rewards for video models: how executable the motion in a video is."""

from jidm.rewards.eva import EvaLimits, EvaReward, eva_reward
from jidm.rewards.executability import ExecutabilityReward, VideoScore
from jidm.rewards.term_scales import TermScales
from jidm.rewards.terms import TERMS

__all__ = ["TERMS", "EvaLimits", "EvaReward", "ExecutabilityReward", "TermScales", "VideoScore", "eva_reward"]
