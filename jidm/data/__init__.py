"""What was recorded: LeRobot data sets, read (v3.0, v2.1, v2.0) and written (v3.0, v2.1)."""

from __future__ import annotations

from jidm.data.check import Problem, validate_dataset
from jidm.data.feature import Feature
from jidm.data.read import Episode, RecordedDataset, open_dataset
from jidm.data.write import DatasetWriter

__all__ = ["DatasetWriter", "Episode", "Feature", "Problem", "RecordedDataset", "validate_dataset", "open_dataset"]
