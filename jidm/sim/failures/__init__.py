"""Corrupted robot videos, failing as video models fail, made from rendered episodes whose truth is known."""

from jidm.sim.failures.corrupt import FAILURE_KINDS, CorruptedVideo, corrupt
from jidm.sim.failures.episode import RenderedEpisode

__all__ = ["FAILURE_KINDS", "CorruptedVideo", "RenderedEpisode", "corrupt"]
