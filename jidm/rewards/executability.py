"""How executable the motion in a video is: EVA's reward, less what only a Jacobian field can see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, JidmError, did_you_mean
from jidm.estimation.result import JointMotion
from jidm.fields.free import LearnedField
from jidm.idm import JacobianIDM
from jidm.rewards.analysis import VideoAnalysis, VideoAnalyzer
from jidm.rewards.eva import DECAY, P0, EvaLimits, eva_reward
from jidm.rewards.term_scales import TermScales
from jidm.rewards.terms import TERMS, TermValues
from jidm.rewards.videos import load_frames, split_initial_poses, split_videos
from jidm.robot.embodiment import Embodiment

_MAX_REASONS = 3  # how many frames of a video are spoken of
_MIN_REASON_PENALTY = 0.2  # a penalty below this is what good videos have
MAX_REWARD = 10.0
_NO_SCALES = "the reward has no scales yet: reward = reward.calibrated(good_videos), or load a Calibration"


@dataclass(frozen=True, eq=False)
class VideoScore:
    """What is said of one video: S steps, n joints.

    Attributes:
        reward: in [0, 10], higher is better; 0, which no video that could be judged has, where there is a problem.
        eva: EVA's own reward of the decoded positions, in (0, 10].
        penalties: name of a term -> in [0, 1).
        by_step: name of a term -> (S,) in [0, 1).
        by_joint: (n,) share of the weighed penalties that each joint is to blame for; sums up to at most 1.
        reasons: in words, of the worst frames.
        motion: as decoded; None where pairs were solved by themselves.
        problem: why the video could not be judged; None where it was.
    """

    reward: Float[Tensor, ""]
    eva: float = math.nan
    penalties: Mapping[str, float] | None = None
    by_step: Mapping[str, Float[Tensor, " S"]] | None = None
    by_joint: Float[Tensor, " n"] | None = None
    reasons: tuple[str, ...] = ()
    motion: JointMotion | None = None
    problem: str | None = None

    @classmethod
    def failed(cls, problem: str) -> VideoScore:
        """Of a video that could not be judged."""
        return cls(torch.tensor(0.0, dtype=torch.float64), problem=problem)


class ExecutabilityReward:
    """An executability score of videos.

        reward = 10 (1 + P / P0 + sum_k w_k t_k)^(-1/2)

    with EVA's penalty P of the decoded positions, terms t_k in [0, 1) (`TERMS`) and their weights w_k: without the terms
    it is EVA's reward.

    Args:
        idm: decodes the motion. Its `limits` must be "none" or "position": what the decoder holds back, it cannot report.
        calibration: scales of the terms, see `calibrated`; may be None until then.
        weights: of terms, in place of `TERMS`'s; 0 leaves a term out.
        limits: of the robot as EVA counts them; of the descriptor if not given.
        p0: EVA's P0.
        differentiable: for gradients with respect to the pixels, through a learned field: every pair of frames is then
            solved by itself instead of followed, and the term "consistency" left out. It needs a calibration of its own.

    Raises:
        InputError: an IDM that keeps to speed limits, an unknown term, a calibration made by another reading, or
            gradients asked of a field that is not learned.
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
                "an IDM that keeps to speed limits hides jumps from the reward; make it with limits='none'"
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
            absent = [name for name in self.weights if name not in scales.terms]
            if absent:
                raise InputError(f"the calibration knows nothing of {', '.join(absent)}; calibrate again")
            if scales.mode != self._analyzer.mode:
                raise InputError(
                    f"the calibration was made of videos read as '{scales.mode}', not '{self._analyzer.mode}'; calibrate again"
                )
            for what, mine in self._analyzer.provenance.items():
                if scales.provenance.get(what) != mine:
                    raise InputError(
                        f"the calibration was made with {what} {scales.provenance.get(what)}, not {mine}; calibrate again"
                    )

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, scales: TermScales | None = None, *, embodiment: str | Embodiment | None = None,
        device: str | torch.device = "cpu", **options: Any,
    ) -> ExecutabilityReward:  # fmt: skip
        """The reward by a trained field.

        Args:
            checkpoint: a checkpoint folder, the name of a bundled one, or a hub id.
            scales: the one that lies beside the checkpoint if not given, see `Calibration.beside`.
            embodiment, device: as for `JacobianIDM.from_pretrained`.
            options: of the constructor.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of another robot.
            InputError: no calibration was given, and none lies beside it.
        """
        idm = JacobianIDM.from_pretrained(checkpoint, embodiment=embodiment, device=device, limits="none")
        return cls(idm, scales or TermScales.from_checkpoint(checkpoint), **options)

    def to(self, device: str | torch.device) -> ExecutabilityReward:
        """Let the network compute there; an exact field computes where the video is."""
        if isinstance(self.idm.field, LearnedField):
            self.idm.field.to(device)
        return self

    # ---- judging ----------------------------------------------------------------------------------------------------

    def __call__(self, videos: Any, **options: Any) -> Float[Tensor, " N"]:
        """The rewards of videos, see `judge`: finite, 0 where a video could not be judged."""
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
        """Judge videos one after another; what cannot be judged gets a score that says why, and spoils no other.

        Args:
            videos: a path, a batch of frames in any layout `as_video` takes, or a sequence of paths, videos or arrays.
            q0: (n,) or one per video: joint positions in the first frame, as for `JacobianIDM.decode`.
            fps: frames a second; taken from files where not given.
            layout, value_range: as for `as_video`.

        Raises:
            InputError: there is no calibration yet, or q0 does not fit the number of videos.
            VideoError: a batch of frames as a whole cannot be read.
        """
        if self.scales is None:
            raise InputError(_NO_SCALES)
        singles, layout, value_range = split_videos(videos, fps, layout, value_range)
        starts = split_initial_poses(q0, len(singles))

        def generate() -> Iterator[VideoScore]:
            for video, start in zip(singles, starts, strict=True):
                try:
                    yield self._score(*self._analyze(video, start, fps, layout, value_range))
                except (JidmError, OSError) as error:
                    yield VideoScore.failed(str(error))

        return generate()

    def explain(
        self, video: Any, *, q0: Any = None, fps: float | None = None, layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> tuple[VideoScore, VideoAnalysis]:  # fmt: skip
        """Judge one video, and keep all that the score was read off.

        Arguments as of `judge`.

        Raises:
            InputError: there is no calibration yet.
            JidmError: the video cannot be judged.
        """
        if self.scales is None:
            raise InputError(_NO_SCALES)
        analysis, motion = self._analyze(video, q0, fps, layout, value_range)
        return self._score(analysis, motion), analysis

    def _score(self, analysis: VideoAnalysis, motion: JointMotion | None) -> VideoScore:
        assert self.scales is not None
        eva = eva_reward(analysis.q, self.limits, analysis.dt, p0=self.p0)
        term_values = {name: TERMS[name].compute(analysis) for name in self.weights}
        terms = self.scales.terms
        penalties = {name: terms[name].penalty(raw.tail_mean) for name, raw in term_values.items()}
        by_step = {name: terms[name].penalty(raw.per_step) for name, raw in term_values.items()}
        weighted = sum((self.weights[name] * x for name, x in penalties.items()), torch.zeros_like(eva.penalty))
        reward = (MAX_REWARD * (1 + eva.penalty / self.p0 + weighted) ** -DECAY).double()
        return VideoScore(
            reward=reward,
            eva=float(eva.reward.detach()),
            penalties={name: float(x.detach()) for name, x in penalties.items()},
            by_step={name: x.detach() for name, x in by_step.items()},
            by_joint=self._attribution(term_values, by_step),
            reasons=self._reasons(term_values, by_step),
            motion=motion,
        )

    def _attribution(self, term_values: Mapping[str, TermValues], by_step: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        n = len(self.idm.joint_names)
        attribution, total = torch.zeros(n, dtype=torch.float64), 1e-12
        for name, raw in term_values.items():
            weighted = self.weights[name] * by_step[name].detach().double().cpu()
            total += float(weighted.sum())
            if raw.by_joint is not None:
                shares = raw.by_joint.detach().double().cpu()
                shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
                attribution += (weighted[:, None] * shares).sum(0)
        return attribution / total

    def _reasons(self, term_values: Mapping[str, TermValues], by_step: Mapping[str, Tensor]) -> tuple[str, ...]:
        names = list(term_values)
        if not names:
            return ()
        weighted = torch.stack([self.weights[name] * by_step[name].detach().double() for name in names])
        worst = weighted.sum(0).argsort(descending=True, stable=True).tolist()
        reasons: list[str] = []
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

    # ---- reading ----------------------------------------------------------------------------------------------------

    def analyze(
        self, video: Any, *, q0: Any = None, fps: float | None = None, layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> VideoAnalysis:  # fmt: skip
        """All that terms are read off in one video; it needs no calibration. Arguments as of `judge`.

        Raises:
            JidmError: the video cannot be judged.
        """
        return self._analyze(video, q0, fps, layout, value_range)[0]

    def _analyze(
        self, video: Any, q0: Any, fps: float | None, layout: Any, value_range: Any
    ) -> tuple[VideoAnalysis, JointMotion | None]:
        frames, dt = load_frames(video, fps, layout, value_range)
        return self._analyzer.analyze(frames, dt, q0)

    # ---- calibrating ------------------------------------------------------------------------------------------------

    def fit_scales(
        self,
        videos: Any,
        *,
        q0: Any = None,
        fps: float | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> ExecutabilityReward:
        """This reward with scales measured on good videos: real ones, or simulated, as long and large as those to judge.

        Arguments as of `judge`.

        Raises:
            InputError: fewer than 5 videos.
            JidmError: one of them cannot be read: good videos can.
        """
        singles, layout, value_range = split_videos(videos, fps, layout, value_range)
        tail_means: dict[str, list[float]] = {name: [] for name in TERMS}
        decoded: dict[str, Any] = {}
        for video, start in zip(singles, split_initial_poses(q0, len(singles)), strict=True):
            analysis, motion = self._analyze(video, start, fps, layout, value_range)
            decoded = {} if motion is None else dict(motion.provenance)
            for name in self.weights:
                tail_means[name].append(float(TERMS[name].compute(analysis).tail_mean))
        known = {name: values for name, values in tail_means.items() if values}
        provenance = {**self._analyzer.provenance, "decoded": decoded}
        scales = TermScales.from_tail_means(known, mode=self._analyzer.mode, provenance=provenance)
        weights = {name: self.weights.get(name, 0.0) for name in TERMS}
        return ExecutabilityReward(
            self.idm, scales, weights=weights, limits=self.limits, p0=self.p0, differentiable=self.differentiable
        )
