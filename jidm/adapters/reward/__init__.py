"""Rewards for video models: how executable the motion in a video is."""

from jidm.adapters.reward.eva import EvaLimits, EvaReward, eva_reward

__all__ = ["EvaLimits", "EvaReward", "eva_reward"]
