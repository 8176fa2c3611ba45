"""Pictures of what was decoded: curves with their uncertainty, and the video beside its explanation."""

from jidm.visualization.overlay import write_overlay
from jidm.visualization.plot import plot_motion

__all__ = ["plot_motion", "write_overlay"]
