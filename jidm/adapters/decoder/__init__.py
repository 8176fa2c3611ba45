"""From a planner's frames to commands a controller can run."""

from jidm.adapters.decoder.commands import ACTION_SPACES, ActionSpace, Commands
from jidm.adapters.decoder.decoder import ActionDecoder
from jidm.adapters.decoder.limits import MotionLimits
from jidm.adapters.decoder.spline import LimitedSpline, MotionState

__all__ = [
    "ACTION_SPACES",
    "ActionDecoder",
    "ActionSpace",
    "Commands",
    "LimitedSpline",
    "MotionLimits",
    "MotionState",
]
