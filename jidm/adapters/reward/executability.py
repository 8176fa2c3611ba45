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

from jidm.adapters.reward.calibration import Calibration
from jidm.adapters.reward.eva import DECAY, P0, EvaLimits, eva_reward
from jidm.adapters.reward.reading import Reader, Reading
from jidm.adapters.reward.terms import TERMS, Raw
from jidm.adapters.reward.videos import frames_of, singles_of, starts_of
from jidm.errors import InputError, JidmError, did_you_mean
from jidm.field.learned import LearnedField
from jidm.idm import JacobianIDM
from jidm.joint_motion import JointMotion
from jidm.robot.embodiment import Embodiment

_REASONS = 3  # how many frames of a video are spoken of
_WORTH_SAYING = 0.2  # a penalty below this is what good videos have
HIGHEST = 10.0
_UNCALIBRATED = "the reward has no scales yet: reward = reward.calibrated(good_videos), or load a Calibration"


@dataclass(frozen=True, eq=False)
class Score:
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
    def failed(cls, problem: str) -> Score:
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
        calibration: Calibration | None = None,
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
        self.limits = limits or EvaLimits.of(idm.embodiment)  # type: ignore[arg-type]
        self._reader = Reader(
            idm, self.limits.velocity, backwards="consistency" in self.weights, by_pairs=differentiable
        )
        self.p0 = p0
        self.calibration = calibration
        if calibration is not None:
            absent = [name for name in self.weights if name not in calibration.scales]
            if absent:
                raise InputError(f"the calibration knows nothing of {', '.join(absent)}; calibrate again")
            if calibration.reading != self._reader.kind:
                raise InputError(
                    f"the calibration was made of videos read as '{calibration.reading}', not '{self._reader.kind}'; calibrate again"
                )
            for what, mine in self._reader.judge.items():
                if calibration.made_by.get(what) != mine:
                    raise InputError(
                        f"the calibration was made with {what} {calibration.made_by.get(what)}, not {mine}; calibrate again"
                    )

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, calibration: Calibration | None = None, *, embodiment: str | Embodiment | None = None,
        device: str | torch.device = "cpu", **options: Any,
    ) -> ExecutabilityReward:  # fmt: skip
        """The reward by a trained field.

        Args:
            checkpoint: a checkpoint folder, the name of a bundled one, or a hub id.
            calibration: the one that lies beside the checkpoint if not given, see `Calibration.beside`.
            embodiment, device: as for `JacobianIDM.from_pretrained`.
            options: of the constructor.

        Raises:
            CheckpointError: there is no such checkpoint, or it is of another robot.
            InputError: no calibration was given, and none lies beside it.
        """
        idm = JacobianIDM.from_pretrained(checkpoint, embodiment=embodiment, device=device, limits="none")
        return cls(idm, calibration or Calibration.beside(checkpoint), **options)

    def to(self, device: str | torch.device) -> ExecutabilityReward:
        """Let the network compute there; an exact field computes where the video is."""
        if isinstance(self.idm.field, LearnedField):
            self.idm.field.to(device)
        return self

    # ---- judging ----------------------------------------------------------------------------------------------------

    def __call__(self, videos: Any, **how: Any) -> Float[Tensor, " N"]:
        """The rewards of videos, see `judge`: finite, 0 where a video could not be judged."""
        rewards = [score.reward for score in self.judge(videos, **how)]
        return torch.stack(rewards) if rewards else torch.zeros(0, dtype=torch.float64)

    def judge(
        self,
        videos: Any,
        *,
        q0: Any = None,
        fps: float | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Iterator[Score]:
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
        if self.calibration is None:
            raise InputError(_UNCALIBRATED)
        singles, layout, value_range = singles_of(videos, fps, layout, value_range)
        starts = starts_of(q0, len(singles))

        def scores() -> Iterator[Score]:
            for video, start in zip(singles, starts, strict=True):
                try:
                    yield self._scored(*self._read(video, start, fps, layout, value_range))
                except (JidmError, OSError) as error:
                    yield Score.failed(str(error))

        return scores()

    def explain(
        self, video: Any, *, q0: Any = None, fps: float | None = None, layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> tuple[Score, Reading]:  # fmt: skip
        """Judge one video, and keep all that the score was read off.

        Arguments as of `judge`.

        Raises:
            InputError: there is no calibration yet.
            JidmError: the video cannot be judged.
        """
        if self.calibration is None:
            raise InputError(_UNCALIBRATED)
        reading, motion = self._read(video, q0, fps, layout, value_range)
        return self._scored(reading, motion), reading

    def _scored(self, reading: Reading, motion: JointMotion | None) -> Score:
        assert self.calibration is not None
        eva = eva_reward(reading.q, self.limits, reading.dt, p0=self.p0)
        raws = {name: TERMS[name].raw(reading) for name in self.weights}
        scales = self.calibration.scales
        penalties = {name: scales[name].penalty(raw.worst) for name, raw in raws.items()}
        by_step = {name: scales[name].penalty(raw.value) for name, raw in raws.items()}
        weighed = sum((self.weights[name] * x for name, x in penalties.items()), torch.zeros_like(eva.penalty))
        reward = (HIGHEST * (1 + eva.penalty / self.p0 + weighed) ** -DECAY).double()
        return Score(
            reward=reward,
            eva=float(eva.reward.detach()),
            penalties={name: float(x.detach()) for name, x in penalties.items()},
            by_step={name: x.detach() for name, x in by_step.items()},
            by_joint=self._blame(raws, by_step),
            reasons=self._reasons(raws, by_step),
            motion=motion,
        )

    def _blame(self, raws: Mapping[str, Raw], by_step: Mapping[str, Tensor]) -> Float[Tensor, " n"]:
        n = len(self.idm.joint_names)
        blame, total = torch.zeros(n, dtype=torch.float64), 1e-12
        for name, raw in raws.items():
            weighed = self.weights[name] * by_step[name].detach().double().cpu()
            total += float(weighed.sum())
            if raw.by_joint is not None:
                shares = raw.by_joint.detach().double().cpu()
                shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
                blame += (weighed[:, None] * shares).sum(0)
        return blame / total

    def _reasons(self, raws: Mapping[str, Raw], by_step: Mapping[str, Tensor]) -> tuple[str, ...]:
        names = list(raws)
        if not names:
            return ()
        weighed = torch.stack([self.weights[name] * by_step[name].detach().double() for name in names])
        worst = weighed.sum(0).argsort(descending=True, stable=True).tolist()
        said: list[str] = []
        spoken: set[str] = set()
        for step in worst:
            name = names[int(weighed[:, step].argmax())]
            if name in spoken or by_step[name][step] < _WORTH_SAYING:
                continue
            spoken.add(name)
            said.append(TERMS[name].reason(raws[name], step, self.idm.joint_names))
            if len(said) == _REASONS:
                break
        return tuple(said)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(
        self, video: Any, *, q0: Any = None, fps: float | None = None, layout: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> Reading:  # fmt: skip
        """All that terms are read off in one video; it needs no calibration. Arguments as of `judge`.

        Raises:
            JidmError: the video cannot be judged.
        """
        return self._read(video, q0, fps, layout, value_range)[0]

    def _read(
        self, video: Any, q0: Any, fps: float | None, layout: Any, value_range: Any
    ) -> tuple[Reading, JointMotion | None]:
        frames, dt = frames_of(video, fps, layout, value_range)
        return self._reader.read(frames, dt, q0)

    # ---- calibrating ------------------------------------------------------------------------------------------------

    def calibrated(
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
        singles, layout, value_range = singles_of(videos, fps, layout, value_range)
        worst: dict[str, list[float]] = {name: [] for name in TERMS}
        decoded: dict[str, Any] = {}
        for video, start in zip(singles, starts_of(q0, len(singles)), strict=True):
            reading, motion = self._read(video, start, fps, layout, value_range)
            decoded = {} if motion is None else dict(motion.provenance)
            for name in self.weights:
                worst[name].append(float(TERMS[name].raw(reading).worst))
        known = {name: values for name, values in worst.items() if values}
        made_by = {**self._reader.judge, "decoded": decoded}
        calibration = Calibration.of(known, reading=self._reader.kind, made_by=made_by)
        weights = {name: self.weights.get(name, 0.0) for name in TERMS}
        return ExecutabilityReward(
            self.idm, calibration, weights=weights, limits=self.limits, p0=self.p0, differentiable=self.differentiable
        )
