"""Optical flow between frames, with a confidence per pixel."""

from jidm.flow.base import (
    Flow,
    FlowEstimator,
    FrameIndexedFlow,
    bidirectional_flow,
    forward_backward_weight,
    resize_flow,
)
from jidm.flow.dis import DisFlow
from jidm.flow.factory import CallableFlow, as_flow_estimator
from jidm.flow.flow_source import FlowSource, split_flow
from jidm.flow.point_tracks import PointTrackFlow, SparseFlow
from jidm.flow.precomputed import PrecomputedFlow, read_flow
from jidm.flow.raft import RaftFlow

__all__ = [
    "CallableFlow",
    "DisFlow",
    "Flow",
    "FlowEstimator",
    "FlowSource",
    "FrameIndexedFlow",
    "PointTrackFlow",
    "PrecomputedFlow",
    "RaftFlow",
    "SparseFlow",
    "as_flow_estimator",
    "bidirectional_flow",
    "forward_backward_weight",
    "read_flow",
    "resize_flow",
    "split_flow",
]
