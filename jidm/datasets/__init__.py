"""LeRobot data sets, read (v3.0, v2.1, v2.0) and written (v3.0, v2.1)."""

from __future__ import annotations

from jidm.datasets.feature import Feature
from jidm.datasets.reader import Episode, RecordedDataset, open_dataset
from jidm.datasets.validate import Problem, validate_dataset
from jidm.datasets.writer import DatasetWriter

__all__ = ["DatasetWriter", "Episode", "Feature", "Problem", "RecordedDataset", "open_dataset", "validate_dataset"]
