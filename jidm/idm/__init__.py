"""Inverse dynamics models: joint motion from whole videos or from a stream of frames."""

from jidm.estimation.result import JointMotion
from jidm.idm.base import InverseDynamicsModel
from jidm.idm.jacobian import JacobianIDM
from jidm.idm.stream import MotionStream

__all__ = ["InverseDynamicsModel", "JacobianIDM", "JointMotion", "MotionStream"]
