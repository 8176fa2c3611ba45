"""Plots of decoded motion, overlay videos, contact sheets and reports."""

from jidm.visualization.overlay import write_overlay
from jidm.visualization.plot import plot_motion

__all__ = ["plot_motion", "write_overlay"]
