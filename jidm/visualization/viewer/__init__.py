"""A viewer of decoded and recorded video in the browser; needs the extra `view`."""

from jidm.visualization.viewer.live import LiveFeed
from jidm.visualization.viewer.viewed_run import ViewedRun
from jidm.visualization.viewer.viewer import Viewer

__all__ = ["LiveFeed", "ViewedRun", "Viewer"]
