"""From a planner's frames to commands a controller can run."""

from jidm.adapters.decoder.commands import ACTION_SPACES, ActionSpace, Commands
from jidm.adapters.decoder.controller import MODES, AsyncController, ForwardModel, Planner
from jidm.adapters.decoder.decoder import ActionDecoder
from jidm.adapters.decoder.limits import MotionLimits
from jidm.adapters.decoder.reader import PoseTracker, PoseMeasurement
from jidm.adapters.decoder.spline import LimitedSpline, TrajectoryState

__all__ = [
    "ACTION_SPACES",
    "MODES",
    "ActionDecoder",
    "ActionSpace",
    "AsyncController",
    "Commands",
    "ForwardModel",
    "LimitedSpline",
    "MotionLimits",
    "TrajectoryState",
    "Planner",
    "PoseTracker",
    "PoseMeasurement",
]
