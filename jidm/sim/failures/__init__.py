"""Failures of video models, synthesized in rendered episodes with known ground truth."""

from jidm.sim.failures.corrupt import FAILURE_KINDS, CorruptedVideo, corrupt
from jidm.sim.failures.episode import RenderedEpisode

__all__ = ["FAILURE_KINDS", "CorruptedVideo", "RenderedEpisode", "corrupt"]
