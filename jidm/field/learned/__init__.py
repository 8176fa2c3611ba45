"""A Jacobian field learned from a robot's own motion: no CAD, no calibration."""

from jidm.field.learned.backbone import register_backbone
from jidm.field.learned.config import LearnedFieldConfig
from jidm.field.learned.network import Encoded, LearnedField

__all__ = ["Encoded", "LearnedField", "LearnedFieldConfig", "register_backbone"]
