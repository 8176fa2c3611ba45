"""BaselineIDM: any baseline as an inverse dynamics model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.baselines.base import Baseline, BidirectionalFlow, Prediction
from jidm.baselines.flow_source import estimate_bidirectional_flow
from jidm.errors import InputError, VideoError
from jidm.estimation.result import JointMotion
from jidm.estimation.smoother import smooth_motion
from jidm.flow import Flow, FlowEstimator, as_flow_estimator
from jidm.idm.base import InverseDynamicsModel
from jidm.video.letterbox import Letterbox
from jidm.video.timestamps import TimedFrame

_CHUNK_SIZE = 16  # pairs or windows that the network gets at once

T = TypeVar("T")


class BaselineIDM(InverseDynamicsModel):
    """A trained baseline that decodes video.

    Without q0, positions are those that the model regresses (EVA), else they start at zero; the provenance states which. A
    regression does not estimate its errors. So `covariance` and `position_std` of its motions are the variance of the
    training data, and `residual` and `explained_fraction` are 0 unless the model measures them (VERA does); the
    provenance lists what was not measured.

    Args:
        model: a baseline; it is put into evaluation mode.
        flow: in place of the estimator that the model's config names.
        source: where the model was read from, for the provenance.

    Raises:
        InputError: a flow estimator for a model that uses none.
    """

    def __init__(self, model: Baseline, *, flow: str | FlowEstimator | None = None, source: str = "") -> None:
        if flow is not None and model.flow_estimator is None:
            raise InputError(f"this {model.kind} uses no flow estimator; leave flow= out")
        self.model = model.eval()
        estimator = flow if flow is not None else model.flow_estimator
        self.flow: FlowEstimator | None = None if estimator is None else as_flow_estimator(estimator)
        self.source = source

    def save_pretrained(self, folder: str | Path, **record: Any) -> Path:
        """As `Baseline.save_pretrained`."""
        return self.model.save_pretrained(folder, **record)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every joint axis."""
        return self.model.joint_names

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B n"]:  # fmt: skip
        """Joint steps of unrelated pairs of frames of any one size [rad or m].

        Args:
            first, second: RGB in [0, 1], finite.
            before: the frames one step before `first`, for models that read three.
        """
        with torch.no_grad():
            return self._predict(first, second, before).delta_q

    @torch.no_grad()
    def decode_clip(
        self, frames: Iterator[TimedFrame], q0: Float[Tensor, " n"] | None, flow: Flow | Tensor | None = None,
        *, smooth: bool = False,
    ) -> tuple[JointMotion, JointMotion]:  # fmt: skip
        """Decode one clip, see `InverseDynamicsModel.decode_clip`.

        Positions after a frame that is not finite are right again.

        Raises:
            InputError: external flow is given, which `BaselineIDM(..., flow=)` takes.
        """
        if flow is not None:
            raise InputError(f"a baseline ({self.model.kind}) decodes no flow= of single videos; give an estimator")
        predictions = _VideoPredictions(self.model.config.n)
        finite = predictions.finite_frames(frames)
        if self.model.predicts_positions:
            self._predict_positions(finite, predictions)
        else:
            self._predict_video_steps(finite, predictions)
        if predictions.frames < 2:
            raise VideoError("the video has one frame; motion lies between frames, give at least two")
        motion = self._joint_motion(predictions, None if q0 is None else q0.double().cpu())
        return motion, smooth_motion(motion) if smooth else motion

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _predict_video_steps(self, frames: Iterator[Tensor | None], predictions: _VideoPredictions) -> None:
        """Steps from each finite frame to the next; across a gap they move the position, but are not valid."""
        for chunk in _chunks(_successive_pairs(frames)):
            prediction = self._predict(torch.stack([p[2] for p in chunk]), torch.stack([p[3] for p in chunk]))
            zero = prediction.delta_q.new_zeros(len(chunk))
            residual = zero if prediction.residual is None else prediction.residual
            explained = zero if prediction.explained_fraction is None else prediction.explained_fraction
            values = (x.cpu().double() for x in (prediction.delta_q, residual, explained))
            for (start, stop, *_), *step in zip(chunk, *values, strict=True):
                if all(x.isfinite().all() for x in step):
                    predictions.steps[start, stop] = _Step(*step)

    def _predict_positions(self, frames: Iterator[Tensor | None], predictions: _VideoPredictions) -> None:
        """Position in each finite frame; a neighbor that is missing or not finite is replaced by the frame itself."""
        for chunk in _chunks(_windows(frames)):
            index, *windows = zip(*chunk, strict=True)
            before, current, after = (self._letterbox(torch.stack(frames)) for frames in windows)
            positions = self.model.positions(before, current, after).cpu().double()
            for t, q in zip(index, positions, strict=True):
                if q.isfinite().all():
                    predictions.positions[t] = q
        zero = torch.zeros((), dtype=torch.float64)
        for t, q in predictions.positions.items():
            if t + 1 in predictions.positions:
                predictions.steps[t, t + 1] = _Step(predictions.positions[t + 1] - q, zero, zero)

    def _predict(self, first: Tensor, second: Tensor, before: Tensor | None = None) -> Prediction:
        motion = None if self.flow is None else self._estimate_flow(self.flow, first, second)
        earlier = None if before is None else self._letterbox(before)
        return self.model.predict(self._letterbox(first), self._letterbox(second), earlier, motion)

    def _estimate_flow(self, estimator: FlowEstimator, first: Tensor, second: Tensor) -> BidirectionalFlow:
        """Flow of the frames at their own size, where it is most accurate, converted to the model's."""
        forward, backward = estimate_bidirectional_flow(
            estimator, first.float(), second.float(), self._make_letterbox(first)
        )
        return forward.to(self.model.delta_std), backward.to(self.model.delta_std)

    def _letterbox(self, frames: Tensor) -> Tensor:
        images = frames.to(self.model.delta_std)
        return self._make_letterbox(images).apply(images)

    def _make_letterbox(self, images: Tensor) -> Letterbox:
        return Letterbox(images.shape[-2], images.shape[-1], *self.model.config.input_size)

    def _joint_motion(self, predictions: _VideoPredictions, q0: Tensor | None) -> JointMotion:
        config, frames = self.model.config, predictions.frames
        like = torch.zeros((), dtype=predictions.dtype)
        time = torch.tensor(predictions.times, dtype=torch.float64)
        step_variance = torch.tensor(config.delta_std, dtype=torch.float64).square()
        if self.model.predicts_positions:
            position = predictions.held_positions(q0)
            position_std = torch.tensor([config.q_std] * frames)
        else:
            position = predictions.integrated_steps(q0)
            position_std = (torch.arange(frames, dtype=torch.float64)[:, None] * step_variance).sqrt()
        no_step = _Step(torch.zeros(config.n, dtype=torch.float64), *torch.zeros(2, dtype=torch.float64))
        steps = [predictions.steps.get((t, t + 1), no_step) for t in range(frames - 1)]
        delta_q, residual, explained_fraction = (torch.stack(x) for x in zip(*steps, strict=True))
        valid = torch.tensor([(t, t + 1) in predictions.steps for t in range(frames - 1)])
        return JointMotion(
            joint_names=config.joint_names,
            joint_types=config.joint_types,
            time=time,
            delta_q=delta_q.to(like),
            velocity=(delta_q / time.diff()[:, None]).to(like),
            position=position.to(like),
            position_std=position_std.to(like),
            covariance=torch.diag(step_variance).expand(frames - 1, -1, -1).to(like).clone(),
            residual=residual.to(like),
            explained_fraction=explained_fraction.to(like),
            agreement=torch.zeros_like(explained_fraction.to(like)),
            observable=valid[:, None].expand(-1, config.n).clone(),
            valid=valid,
            provenance=self._provenance(q0 is not None),
        )

    def _provenance(self, q0_given: bool) -> dict[str, Any]:
        from jidm import __version__

        start = "absolute, by the model" if self.model.predicts_positions else "zero, no q0 was given"
        fields = ("position_std", "covariance", "residual", "explained_fraction", "agreement", "observable")
        return {
            "jidm": __version__,
            "model": self.model.kind,
            "source": self.source,
            "config": asdict(self.model.config),
            "flow": repr(self.flow) if self.flow is not None else None,
            "start": "given" if q0_given else start,
            "not_measured": [x for x in fields if x not in self.model.measured],
        }


class _Step(NamedTuple):
    """A predicted step (n,), and its residual and explained fraction (both 0 where not measured); float64."""

    delta_q: Tensor
    residual: Tensor
    explained_fraction: Tensor


class _VideoPredictions:
    """Predicted steps, by the numbers of their two frames, and positions, by frame number, in one video."""

    def __init__(self, n: int) -> None:
        self.n, self.dtype = n, torch.float32
        self.times: list[float] = []
        self.steps: dict[tuple[int, int], _Step] = {}
        self.positions: dict[int, Tensor] = {}

    @property
    def frames(self) -> int:
        """How many frames were read."""
        return len(self.times)

    def finite_frames(self, frames: Iterator[TimedFrame]) -> Iterator[Tensor | None]:
        """The frames, None in place of one that is not finite.

        Raises:
            VideoError: the size changes.
        """
        shape: torch.Size | None = None
        for t, (time, frame) in enumerate(frames):
            if shape is not None and frame.shape != shape:
                raise VideoError(f"frame {t} is {tuple(frame.shape)}, the first is {tuple(shape)}")
            shape, self.dtype = frame.shape, frame.dtype
            self.times.append(time)
            yield frame if frame.isfinite().all() else None

    def integrated_steps(self, q0: Tensor | None) -> Tensor:
        """(T, n) positions: steps summed from q0, or from zero."""
        position = torch.zeros(self.frames, self.n, dtype=torch.float64)
        if q0 is not None:
            position[0] = q0
        start_of = {stop: start for start, stop in self.steps}
        for t in range(1, self.frames):
            start = start_of.get(t)
            position[t] = position[t - 1] if start is None else position[start] + self.steps[start, t].delta_q
        return position

    def held_positions(self, q0: Tensor | None) -> Tensor:
        """(T, n) predicted positions, held where there is none; with q0 shifted as a whole so that the first is q0."""
        position = torch.zeros(self.frames, self.n, dtype=torch.float64)
        last = next(iter(self.positions.values()), torch.zeros_like(position[0]))
        shift = torch.zeros_like(last) if q0 is None else q0 - last
        for t in range(self.frames):
            last = self.positions.get(t, last)
            position[t] = last + shift
        return position


def _successive_pairs(frames: Iterator[Tensor | None]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Each finite frame and the next finite one, as (start, stop, first, second)."""
    last: tuple[int, Tensor] | None = None
    for t, frame in enumerate(frames):
        if frame is None:
            continue
        if last is not None:
            yield last[0], t, last[1], frame
        last = (t, frame)


def _windows(frames: Iterator[Tensor | None]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Each finite frame between its neighbors, as (t, before, current, after)."""
    before: Tensor | None = None
    current: Tensor | None = None
    for t, after in enumerate(chain(frames, [None])):
        if current is not None:
            yield t - 1, current if before is None else before, current, current if after is None else after
        before, current = current, after


def _chunks(items: Iterator[T]) -> Iterator[list[T]]:
    while chunk := list(islice(items, _CHUNK_SIZE)):
        yield chunk
