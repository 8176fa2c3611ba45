"""The executability reward: EVA's reward, with penalties for image motion that contradicts the robot's kinematics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, JidmError, did_you_mean
from jidm.estimation.result import JointMotion
from jidm.fields.free import LearnedField
from jidm.idm import JacobianIDM
from jidm.rewards.analysis import VideoAnalysis, VideoAnalyzer
from jidm.rewards.eva import DECAY, P0, EvaLimits, eva_reward
from jidm.rewards.recognition import Recognition
from jidm.rewards.term_scales import TermScales, fitted_lengths, not_tighter_when_shorter
from jidm.rewards.terms import MIN_VIDEOS, TERMS, TermScale, TermValues
from jidm.rewards.videos import load_frames, split_initial_poses, split_videos
from jidm.robot.embodiment import Embodiment

_MAX_REASONS = 3  # per video
_MIN_REASON_PENALTY = 0.2  # smaller penalties are usual in good videos
MAX_REWARD = 10.0


@dataclass(frozen=True, eq=False)
class VideoScore:
    """Score of one video: S steps, n joints.

    Attributes:
        reward: in [0, 10], higher is better; 0 if and only if there is a problem.
        eva: EVA's reward of the decoded positions, in (0, 10].
        doubt: whether this is the robot at all, from the pictures: 0 in good videos, up to 1; see `Recognition`.
        penalties: term -> penalty in [0, 1], doubt included.
        by_step: term -> (S,) penalty of each step, in [0, 1).
        by_joint: (n,) fraction of the weighted penalties attributed to each joint; the sum is at most 1.
        reasons: descriptions of the worst frames.
        motion: the decoded motion; None if frame pairs were solved separately.
        problem: why the video could not be scored; None if it was.
    """

    reward: Float[Tensor, ""]
    eva: float = math.nan
    doubt: float = 0.0
    penalties: Mapping[str, float] | None = None
    by_step: Mapping[str, Float[Tensor, " S"]] | None = None
    by_joint: Float[Tensor, " n"] | None = None
    reasons: tuple[str, ...] = ()
    motion: JointMotion | None = None
    problem: str | None = None

    @classmethod
    def failed(cls, problem: str) -> VideoScore:
        """Score of a video that could not be scored."""
        return cls(torch.tensor(0.0, dtype=torch.float64), problem=problem)


class ExecutabilityReward:
    """Reward for the executability of videos.

        reward = 10 (1 + (P - P_good)_+ / P0 + sum_k w_k (1 - (1 - t_k) (1 - doubt)))^(-1/2)

    with EVA's penalty P of the decoded positions and its median P_good in good videos of the same length, terms t_k in [0, 1)
    (`TERMS`) and their weights w_k. A video that does not show the robot gets no credit for any term: `doubt` comes from
    `Recognition`. Without terms P_good is 0, and it is EVA's reward.

    Args:
        idm: decodes the motion. Its `limits` must be "none" or "position": a decoder that enforces velocity limits hides
            violations.
        scales: of the terms; may be None until `fit_scales`.
        weights: of terms, in place of those in `TERMS`; 0 removes a term.
        limits: of the robot in EVA's units; from the descriptor if not given.
        p0: EVA's P0.
        differentiable: give gradients with respect to the pixels through a learned field. Each pair of frames is then
            solved separately instead of tracked, and the term "consistency" is removed. It needs its own scales.

    Raises:
        InputError: the IDM enforces velocity limits, a term is unknown, the scales were fitted with another decoder or mode,
            or gradients are requested from a field that is not learned.
    """

    def __init__(
        self,
        idm: JacobianIDM,
        scales: TermScales | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        limits: EvaLimits | None = None,
        p0: float = P0,
        differentiable: bool = False,
    ) -> None:
        if idm.limits == "all":
            raise InputError(
                "an IDM that enforces velocity limits hides jumps from the reward; make it with limits='none'"
            )
        if idm.embodiment is None and limits is None:
            raise InputError("EVA's reward needs the robot's limits: give the IDM an embodiment, or pass limits=")
        for name, weight in (weights or {}).items():
            if name not in TERMS:
                raise InputError(f"no term '{name}': {did_you_mean(name, TERMS)}")
            if not (math.isfinite(weight) and weight >= 0):
                raise InputError(f"the weight of '{name}' must be finite and not negative, got {weight}")
        self.idm = idm
        self.weights = {name: (weights or {}).get(name, term.weight) for name, term in TERMS.items()}
        if differentiable:
            self.weights["consistency"] = 0.0
        self.weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        self.differentiable = differentiable
        self.limits = limits or EvaLimits.from_embodiment(idm.embodiment)  # type: ignore[arg-type]
        self._analyzer = VideoAnalyzer(
            idm, self.limits.velocity, decode_backward="consistency" in self.weights, pairwise=differentiable
        )
        self.p0 = p0
        self.scales = scales
        if scales is not None:
            scales.check(self.weights, mode=self._analyzer.mode, provenance=self._analyzer.provenance)

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, scales: TermScales | None = None, *, embodiment: str | Embodiment | None = None,
        device: str | torch.device = "cpu", **options: Any,
    ) -> ExecutabilityReward:  # fmt: skip
        """The reward with a trained field.

        Args:
            checkpoint: a checkpoint folder, the name of a bundled one, or a hub id.
            scales: those in the checkpoint's folder if not given, see `TermScales.from_checkpoint`.
            embodiment, device: as for `JacobianIDM.from_pretrained`.
            options: of the constructor.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of another robot.
            InputError: no scales were given, and the checkpoint's folder has none.
        """
        idm = JacobianIDM.from_pretrained(checkpoint, embodiment=embodiment, device=device, limits="none")
        return cls(idm, scales or TermScales.from_checkpoint(checkpoint), **options)

    def to(self, device: str | torch.device) -> ExecutabilityReward:
        """Move the network to a device; an analytic field computes on the video's device."""
        if isinstance(self.idm.field, LearnedField):
            self.idm.field.to(device)
        return self

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def __call__(self, videos: Any, **options: Any) -> Float[Tensor, " N"]:
        """Rewards of videos, arguments as of `score`: finite, 0 where a video could not be scored."""
        rewards = [score.reward for score in self.score(videos, **options)]
        return torch.stack(rewards) if rewards else torch.zeros(0, dtype=torch.float64)

    def score(
        self,
        videos: Any,
        *,
        q0: Any = None,
        fps: float | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Iterator[VideoScore]:
        """Score videos one after another. A video that cannot be scored gets a score with the problem; others are unaffected.

        Args:
            videos: a path, a batch of frames in any layout `as_video` takes, the output of a diffusers pipeline, or a
                sequence of paths, videos, arrays or outputs.
            q0: (n,) or one per video: joint positions in the first frame, as for `JacobianIDM.decode`.
            fps: frames per second; as the files state if not given.
            layout, value_range: as for `as_video`.

        Raises:
            InputError: there are no scales yet, or q0 is for another number of videos.
            VideoError: a batch of frames as a whole cannot be read.
        """
        scales = self.require_scales()
        singles, layout, value_range = split_videos(videos, fps, layout, value_range)
        options: dict[str, Any] = {"fps": fps, "layout": layout, "value_range": value_range}
        starts = split_initial_poses(q0, len(singles))

        def generate() -> Iterator[VideoScore]:
            for video, start in zip(singles, starts, strict=True):
                try:
                    yield self._score(self.analyze(video, q0=start, **options), scales)
                except (JidmError, OSError) as error:
                    yield VideoScore.failed(str(error))

        return generate()

    def explain(
        self, video: Any, *, q0: Any = None, fps: float | None = None, layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> tuple[VideoScore, VideoAnalysis]:  # fmt: skip
        """Score one video, and return the analysis as well. Arguments as of `score`.

        Raises:
            InputError: there are no scales yet.
            JidmError: the video cannot be scored.
        """
        scales = self.require_scales()
        analysis = self.analyze(video, q0=q0, fps=fps, layout=layout, value_range=value_range)
        return self._score(analysis, scales), analysis

    def require_scales(self) -> TermScales:
        """The scales of the terms.

        Raises:
            InputError: there are none yet.
        """
        if self.scales is None:
            raise InputError(
                "the reward has no scales yet: reward = reward.fit_scales(good_videos), or load TermScales"
            )
        return self.scales

    def _score(self, analysis: VideoAnalysis, scales: TermScales) -> VideoScore:
        eva = eva_reward(analysis.q, self.limits, analysis.dt, p0=self.p0)
        frames = len(analysis.q)
        term_values = {name: TERMS[name].compute(analysis) for name in self.weights}
        term_scales = {name: scales.term_scale(name, frames) for name in self.weights}
        by_step = {name: term_scales[name].penalty(raw.per_step) for name, raw in term_values.items()}
        doubt = torch.zeros_like(eva.penalty)
        if scales.recognition is not None and analysis.keypoints is not None and self.weights:
            doubt = scales.recognition.doubt(analysis.keypoints).to(doubt)
        penalties = {
            name: 1 - (1 - term_scales[name].penalty(raw.tail_mean)) * (1 - doubt) for name, raw in term_values.items()
        }
        jitter = scales.median_eva_penalty(frames) if self.weights else 0.0
        weighted = sum((self.weights[name] * x for name, x in penalties.items()), torch.zeros_like(eva.penalty))
        excess = (eva.penalty - jitter).clamp(min=0)
        reward = (MAX_REWARD * (1 + excess / self.p0 + weighted) ** -DECAY).double()
        return VideoScore(
            reward=reward,
            eva=float(eva.reward.detach()),
            doubt=float(doubt.detach()),
            penalties={name: float(x.detach()) for name, x in penalties.items()},
            by_step={name: x.detach() for name, x in by_step.items()},
            by_joint=self._attribution(term_values, by_step),
            reasons=self._reasons(term_values, by_step, float(doubt.detach())),
            motion=analysis.motion,
        )

    def _attribution(self, term_values: Mapping[str, TermValues], by_step: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        n = len(self.idm.joint_names)
        attribution, total = torch.zeros(n, dtype=torch.float64), 1e-12
        for name, raw in term_values.items():
            weighted = self.weights[name] * by_step[name].detach().double().cpu()
            total += float(weighted.sum())
            if raw.by_joint is not None:
                fractions = raw.by_joint.detach().double().cpu()
                fractions = fractions / fractions.sum(-1, keepdim=True).clamp(min=1e-12)
                attribution += (weighted[:, None] * fractions).sum(0)
        return attribution / total

    def _reasons(
        self, term_values: Mapping[str, TermValues], by_step: Mapping[str, Tensor], doubt: float
    ) -> tuple[str, ...]:
        names = list(term_values)
        if not names:
            return ()
        weighted = torch.stack([self.weights[name] * by_step[name].detach().double() for name in names])
        worst = weighted.sum(0).argsort(descending=True, stable=True).tolist()
        reasons = ["the pictures do not look like this robot"] if doubt >= _MIN_REASON_PENALTY else []
        used: set[str] = set()
        for step in worst:
            name = names[int(weighted[:, step].argmax())]
            if name in used or by_step[name][step] < _MIN_REASON_PENALTY:
                continue
            used.add(name)
            reasons.append(TERMS[name].reason(term_values[name], step, self.idm.joint_names))
            if len(reasons) == _MAX_REASONS:
                break
        return tuple(reasons)

    # ---- analysis ---------------------------------------------------------------------------------------------------

    def analyze(
        self, video: Any, *, q0: Any = None, fps: float | None = None, layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> VideoAnalysis:  # fmt: skip
        """Analyze one video; needs no scales. Arguments as of `score`.

        Raises:
            JidmError: the video cannot be analyzed.
        """
        frames, dt = load_frames(video, fps, layout, value_range)
        return self._analyzer.analyze(frames, dt, q0)

    # ---- scales -----------------------------------------------------------------------------------------------------

    def fit_scales(
        self,
        videos: Any,
        *,
        q0: Any = None,
        fps: float | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> ExecutabilityReward:
        """This reward, with scales fitted to good videos. Arguments as of `score`.

        The videos are real or simulated, with camera and resolution of those to score, and at least as long. Their first frames
        also give the scales of shorter videos.

        Raises:
            InputError: fewer than 5 videos.
            JidmError: one of them cannot be analyzed.
        """
        singles, layout, value_range = split_videos(videos, fps, layout, value_range)
        if len(singles) < MIN_VIDEOS:
            raise InputError(f"a scale needs at least {MIN_VIDEOS} good videos, got {len(singles)}")
        tail_means: dict[int, dict[str, list[float]]] = {}
        eva_penalties: dict[int, list[float]] = {}
        keypoints: list[Tensor] = []
        decoded: dict[str, Any] = {}
        lengths: tuple[int, ...] = ()
        for video, start in zip(singles, split_initial_poses(q0, len(singles)), strict=True):
            clip, dt = load_frames(video, fps, layout, value_range)
            lengths = lengths or fitted_lengths(len(clip))
            for frames in (*(x for x in lengths[:-1] if x < len(clip)), len(clip)):
                analysis = self._analyzer.analyze(clip[:frames], dt, start)
                nearest = min(lengths, key=lambda x: abs(math.log(x / frames)))
                values = tail_means.setdefault(nearest, {name: [] for name in self.weights})
                for name, found in values.items():
                    found.append(float(TERMS[name].compute(analysis).tail_mean))
                penalty = eva_reward(analysis.q, self.limits, dt, p0=self.p0).penalty
                eva_penalties.setdefault(nearest, []).append(float(penalty))
            decoded = {} if analysis.motion is None else dict(analysis.motion.provenance)
            if analysis.keypoints is not None:
                keypoints.append(analysis.keypoints)
        lengths = tuple(x for x in lengths if len(eva_penalties.get(x, ())) >= MIN_VIDEOS)
        scales = TermScales(
            frames=lengths,
            terms={
                name: not_tighter_when_shorter(
                    [TermScale.from_tail_means(tail_means[x][name], TERMS[name].min_spread) for x in lengths]
                )
                for name in self.weights
            },
            eva_penalty=tuple(float(np.median(eva_penalties[x])) for x in lengths),
            recognition=Recognition.fit(keypoints) if keypoints else None,
            num_videos=len(singles),
            mode=self._analyzer.mode,
            provenance=json.loads(json.dumps({**self._analyzer.provenance, "decoded": decoded})),
        )
        weights = {name: self.weights.get(name, 0.0) for name in TERMS}
        return ExecutabilityReward(
            self.idm, scales, weights=weights, limits=self.limits, p0=self.p0, differentiable=self.differentiable
        )
