"""Optical flow: what moved between two frames, and how far to trust it."""

from jidm.motion.flow.base import (
    Flow,
    FlowEstimator,
    TimedFlow,
    both_ways,
    flow_between,
    forward_backward_weight,
    resize_flow,
)
from jidm.motion.flow.choose import CallableFlow, as_flow_estimator
from jidm.motion.flow.dis import DisFlow
from jidm.motion.flow.precomputed import PrecomputedFlow, read_flow
from jidm.motion.flow.raft import RaftFlow
from jidm.motion.flow.tracks import SparseFlow, TrackFlow
from jidm.motion.flow.video_flow import VideoFlow, split_flow

__all__ = [
    "CallableFlow",
    "DisFlow",
    "Flow",
    "FlowEstimator",
    "PrecomputedFlow",
    "RaftFlow",
    "SparseFlow",
    "TimedFlow",
    "TrackFlow",
    "VideoFlow",
    "as_flow_estimator",
    "both_ways",
    "flow_between",
    "forward_backward_weight",
    "read_flow",
    "resize_flow",
    "split_flow",
]
