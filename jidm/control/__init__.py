"""From a planner's frames to commands a controller can run."""

from jidm.control.commands import ACTION_SPACES, ActionSpace, Commands
from jidm.control.controller import MODES, AsyncController, ForwardModel, Planner
from jidm.control.decoder import ActionDecoder
from jidm.control.limits import MotionLimits
from jidm.control.reader import PoseMeasurement, PoseTracker
from jidm.control.spline import LimitedSpline, TrajectoryState

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
    "Planner",
    "PoseMeasurement",
    "PoseTracker",
    "TrajectoryState",
]
