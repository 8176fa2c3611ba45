"""A Jacobian field whose 2n channels a network learns freely from video: no CAD, no camera calibration."""

from jidm.fields.free.backbone import register_backbone
from jidm.fields.free.config import LearnedFieldConfig
from jidm.fields.free.network import Features, LearnedField

__all__ = ["Features", "LearnedField", "LearnedFieldConfig", "register_backbone"]
