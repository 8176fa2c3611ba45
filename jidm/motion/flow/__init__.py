"""Optical flow: what moved between two frames, and how far to trust it."""

from jidm.motion.flow.base import Flow, FlowEstimator, forward_backward_weight, resize_flow
from jidm.motion.flow.dis import DisFlow

__all__ = ["DisFlow", "Flow", "FlowEstimator", "forward_backward_weight", "resize_flow"]
