"""Other people's inverse dynamics models, trained, saved and decoded like ours, so that users can compare and choose.

Written from the papers' descriptions; where one differs from its original, its docstring says so.
"""

from jidm.baselines.base import Baseline, BaselineConfig
from jidm.baselines.direct import DirectConfig, DirectIDM
from jidm.baselines.direct_on_flow import DirectOnFlowConfig, DirectOnFlowIDM
from jidm.baselines.eva import EvaAveragePoolIDM, EvaConfig, EvaIDM
from jidm.baselines.idm import BaselineIDM
from jidm.baselines.vera import VeraConfig, VeraField

__all__ = [
    "Baseline",
    "BaselineConfig",
    "BaselineIDM",
    "DirectConfig",
    "DirectIDM",
    "DirectOnFlowConfig",
    "DirectOnFlowIDM",
    "EvaAveragePoolIDM",
    "EvaConfig",
    "EvaIDM",
    "VeraConfig",
    "VeraField",
]
