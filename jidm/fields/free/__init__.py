"""A Jacobian field learned from a robot's own motion: no CAD, no calibration."""

from jidm.fields.free.backbone import register_backbone
from jidm.fields.free.config import LearnedFieldConfig
from jidm.fields.free.network import Features, LearnedField

__all__ = ["Features", "LearnedField", "LearnedFieldConfig", "register_backbone"]
