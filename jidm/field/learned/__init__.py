"""A Jacobian field learned from a robot's own motion: no CAD, no calibration."""

from jidm.field.learned.backbone import register_backbone
from jidm.field.learned.config import LearnedFieldConfig
from jidm.field.learned.network import Features, LearnedField

__all__ = ["Features", "LearnedField", "LearnedFieldConfig", "register_backbone"]
