"""Inverse dynamics by a Jacobian field: whole videos, or frames as they come."""

from jidm.idm.jacobian import JacobianIDM
from jidm.idm.stream import MotionStream
from jidm.joint_motion import JointMotion

__all__ = ["JacobianIDM", "JointMotion", "MotionStream"]
