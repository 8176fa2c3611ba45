"""Inverse dynamics by a Jacobian field: whole videos, or frames as they come."""

from jidm.estimation.result import JointMotion
from jidm.idm.jacobian import JacobianIDM
from jidm.idm.stream import MotionStream

__all__ = ["JacobianIDM", "JointMotion", "MotionStream"]
