"""What a model in training makes of a pair of frames."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.nn import functional as F

from jidm.evaluation.field_metrics import predict_field
from jidm.flow import as_flow_estimator
from jidm.training.data.batch import PairBatch
from jidm.visualization.field_pictures import write_field_sheet


def draw_pairs(model: Any, batch: PairBatch, path: Path) -> None:
    """Field, flow and residual of the first pair of a batch, into a PNG; nothing for a model without a field."""
    estimator = getattr(model, "estimator", None)
    decoder = SimpleNamespace(
        field=model, model=model, flow=None if estimator is None else as_flow_estimator(estimator)
    )
    result = predict_field(decoder, batch.first[:1], batch.second[:1], batch.q[:1])
    if result is None:
        return
    # Where nobody knows the robot's place in the picture, the flow is measured, not exact.
    flow = None
    if batch.flow is not None and batch.mask is not None and result.flow is not None:
        flow = F.interpolate(batch.flow[:1].cpu(), size=result.flow.shape[-2:])[0]
    write_field_sheet(path, batch.first[0].cpu(), result, model.config.joint_names, exact_flow=flow)
