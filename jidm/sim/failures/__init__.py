"""Videos gone wrong as video models get them wrong, made from rendered ones whose truth is known."""

from jidm.sim.failures.corrupt import FAILURE_KINDS, CorruptedVideo, corrupt
from jidm.sim.failures.episode import RenderedEpisode

__all__ = ["FAILURE_KINDS", "CorruptedVideo", "RenderedEpisode", "corrupt"]
