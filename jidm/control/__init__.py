"""From a planner's frames to commands that a robot controller can execute."""

from jidm.control.commands import ACTION_SPACES, ActionSpace, Commands
from jidm.control.config import ControlConfig
from jidm.control.controller import MODES, AsyncController, ForwardModel, Planner
from jidm.control.decoder import ActionDecoder
from jidm.control.limits import MotionLimits
from jidm.control.pose_tracker import PoseMeasurement, PoseTracker
from jidm.control.reference_trajectory import ReferenceTrajectory
from jidm.control.spline import LimitedSpline, TrajectoryState

__all__ = [
    "ACTION_SPACES",
    "MODES",
    "ActionDecoder",
    "ActionSpace",
    "AsyncController",
    "Commands",
    "ControlConfig",
    "ForwardModel",
    "LimitedSpline",
    "MotionLimits",
    "Planner",
    "PoseMeasurement",
    "PoseTracker",
    "ReferenceTrajectory",
    "TrajectoryState",
]
