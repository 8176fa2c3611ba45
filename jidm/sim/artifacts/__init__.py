"""Videos gone wrong as video models get them wrong, made from rendered ones whose truth is known."""

from jidm.sim.artifacts.corrupt import KINDS, Corrupted, corrupt
from jidm.sim.artifacts.take import Take

__all__ = ["KINDS", "Corrupted", "Take", "corrupt"]
