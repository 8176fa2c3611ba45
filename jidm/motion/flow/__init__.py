"""Optical flow: what moved between two frames, and how far to trust it."""

from jidm.motion.flow.base import (
    Flow,
    FlowEstimator,
    FrameIndexedFlow,
    bidirectional_flow,
    flow_between,
    forward_backward_weight,
    resize_flow,
)
from jidm.motion.flow.choose import CallableFlow, as_flow_estimator
from jidm.motion.flow.dis import DisFlow
from jidm.motion.flow.precomputed import PrecomputedFlow, read_flow
from jidm.motion.flow.raft import RaftFlow
from jidm.motion.flow.tracks import SparseFlow, PointTrackFlow
from jidm.motion.flow.video_flow import FlowSource, split_flow

__all__ = [
    "CallableFlow",
    "DisFlow",
    "Flow",
    "FlowEstimator",
    "PrecomputedFlow",
    "RaftFlow",
    "SparseFlow",
    "FrameIndexedFlow",
    "PointTrackFlow",
    "FlowSource",
    "as_flow_estimator",
    "bidirectional_flow",
    "flow_between",
    "forward_backward_weight",
    "read_flow",
    "resize_flow",
    "split_flow",
]
