"""How executable the motion in a video is: EVA's reward, less what only a Jacobian field can see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.adapters.reward.calibration import Calibration
from jidm.adapters.reward.eva import DECAY, LEAST_FRAMES, P0, EvaLimits, eva_reward
from jidm.adapters.reward.evidence import evidence
from jidm.adapters.reward.terms import EVERY, TERMS, Raw, Reading
from jidm.errors import InputError, JidmError, VideoError, did_you_mean
from jidm.field.learned import LearnedField
from jidm.idm import JacobianIDM
from jidm.joint_motion import JointMotion
from jidm.motion.fit import Fit
from jidm.motion.layout import as_video
from jidm.motion.timed import frame_times
from jidm.motion.video import read_video
from jidm.robot.embodiment import Embodiment
from jidm.solve.learned_step import SeenAt, solve_pairs

_PAIRS = 8  # of frames solved at once
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
            if not isinstance(idm.field, LearnedField):
                raise InputError("gradients need a learned field: flow in front of an exact one has none")
            self.weights["consistency"] = 0.0
        self.weights = {name: weight for name, weight in self.weights.items() if weight > 0}
        self.differentiable = differentiable
        self.limits = limits or EvaLimits.of(idm.embodiment)  # type: ignore[arg-type]
        self.p0 = p0
        self.calibration = calibration
        if calibration is not None:
            absent = [name for name in self.weights if name not in calibration.scales]
            if absent:
                raise InputError(f"the calibration knows nothing of {', '.join(absent)}; calibrate again")
            if calibration.reading != self._reads:
                raise InputError(
                    f"the calibration was made of videos read as '{calibration.reading}', not '{self._reads}'; calibrate again"
                )
            for what, mine in self._judge.items():
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
        return torch.stack(rewards) if rewards else torch.zeros(0)

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
        singles, layout, value_range = _singles(videos, fps, layout, value_range)
        starts = _starts(q0, len(singles))

        def scores() -> Iterator[Score]:
            for video, start in zip(singles, starts, strict=True):
                try:
                    yield self._scored(*self._read(video, start, fps, layout, value_range))
                except (JidmError, OSError) as error:
                    yield Score.failed(str(error))

        return scores()

    def explain(self, video: Any, *, q0: Any = None, fps: float | None = None, **how: Any) -> tuple[Score, Reading]:
        """Judge one video, and keep all that the score was read off.

        Arguments as of `judge`.

        Raises:
            InputError: there is no calibration yet.
            JidmError: the video cannot be judged.
        """
        if self.calibration is None:
            raise InputError(_UNCALIBRATED)
        reading, motion = self._read(video, q0, fps, how.get("layout"), how.get("value_range"))
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
            weighed = self.weights[name] * by_step[name].detach().double()
            total += float(weighed.sum())
            if raw.by_joint is not None:
                shares = raw.by_joint.detach().double()
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

    @property
    def _reads(self) -> str:
        return "pairs" if self.differentiable else "followed"

    @property
    def _judge(self) -> dict[str, str | None]:
        """What a calibration belongs to."""
        robot = self.idm.embodiment
        return {
            "field": type(self.idm.field).__name__,
            "checkpoint": self.idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.content_hash,
        }

    def _read(
        self, video: Any, q0: Any, fps: float | None, layout: Any, value_range: Any
    ) -> tuple[Reading, JointMotion | None]:
        frames, dt = _frames(video, fps, layout, value_range)
        if self.differentiable:
            return self._by_pairs(frames, q0, dt), None
        with torch.no_grad():
            motion = self.idm.decode(frames, q0=q0, fps=1 / dt, layout="TCHW")
            back = None
            if "consistency" in self.weights:
                some = slice(None, None, EVERY)
                last = motion.position[some][-1]
                behind = self.idm.decode(frames[some].flip(0), q0=last, fps=1 / (EVERY * dt), layout="TCHW")
                back = behind.position.flip(0)
            return self._reading(self._fitted(frames), motion.position, back, motion.valid, dt), motion

    def _by_pairs(self, frames: Float[Tensor, "T 3 H W"], q0: Any, dt: float) -> Reading:
        field = self.idm.field
        assert isinstance(field, LearnedField)
        pictures = self._fitted(frames)
        steps, valid = [], []
        for first, second in zip(pictures[:-1].split(_PAIRS), pictures[1:].split(_PAIRS), strict=True):
            seen = field.encode(torch.cat([first, second]))
            solved = solve_pairs(field, SeenAt.of(field, seen, field.state(seen)[0]), whole=True)
            steps.append(solved.steps[-1])
            valid.append(solved.solution.valid)
        start = field.state(field.encode(pictures[:1]))[0] if q0 is None else torch.as_tensor(q0).to(pictures)[None]
        q = torch.cat([start, start + torch.cat(steps).cumsum(0)])
        return self._reading(pictures, q, None, torch.cat(valid), dt)

    def _fitted(self, frames: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T 3 h w"]:
        """In the size the field reads, where it computes."""
        field = self.idm.field
        if not isinstance(field, LearnedField):
            return frames
        return Fit(frames.shape[-2], frames.shape[-1], *field.config.picture).frames(frames).to(field.delta_std)

    def _reading(self, pictures: Tensor, q: Tensor, back: Tensor | None, valid: Tensor, dt: float) -> Reading:
        lower, upper, velocity = self._range(q)
        return Reading(q, back, valid, dt, lower, upper, velocity, evidence(self.idm.field, pictures, q))

    def _range(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        robot = self.idm.embodiment
        if robot is None:
            return (
                torch.full_like(like[0], -math.inf),
                torch.full_like(like[0], math.inf),
                self.limits.velocity.to(like),
            )
        return tuple(torch.from_numpy(np.array(x)).to(like) for x in (robot.lower, robot.upper, robot.velocity))  # type: ignore[return-value]

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
        singles, layout, value_range = _singles(videos, fps, layout, value_range)
        worst: dict[str, list[float]] = {name: [] for name in TERMS}
        decoded: dict[str, Any] = {}
        for video, start in zip(singles, _starts(q0, len(singles)), strict=True):
            reading, motion = self._read(video, start, fps, layout, value_range)
            decoded = {} if motion is None else dict(motion.provenance)
            for name in self.weights:
                worst[name].append(float(TERMS[name].raw(reading).worst))
        known = {name: values for name, values in worst.items() if values}
        made_by = {**self._judge, "decoded": decoded}
        calibration = Calibration.of(known, reading=self._reads, made_by=made_by)
        weights = {name: self.weights.get(name, 0.0) for name in TERMS}
        return ExecutabilityReward(
            self.idm, calibration, weights=weights, limits=self.limits, p0=self.p0, differentiable=self.differentiable
        )


def _singles(
    videos: Any, fps: float | None, layout: str | None, value_range: tuple[float, float] | None
) -> tuple[Sequence[Any], str | None, tuple[float, float] | None]:
    """One video per item, as light as they came, and how to read them."""
    if isinstance(videos, (str, Path)) or isinstance(getattr(videos, "pixels", None), Tensor):
        singles: Sequence[Any] = [videos]
    elif isinstance(videos, (list, tuple)) and not (videos and hasattr(videos[0], "getbands")):
        singles = videos
    else:
        batch = as_video(videos, layout=layout, value_range=value_range)
        singles, layout, value_range = list(batch.reshape(-1, *batch.shape[-4:])), "TCHW", (0.0, 1.0)
    for video in singles:
        if fps is None and not isinstance(video, (str, Path)) and getattr(video, "time", None) is None:
            raise VideoError("frames without a clock: pass fps= (frames a second), velocities need it")
    return singles, layout, value_range


def _frames(video: Any, fps: float | None, layout: Any, value_range: Any) -> tuple[Float[Tensor, "T 3 H W"], float]:
    """One video's frames in canonical form and the time between them [s].

    Raises:
        VideoError: it cannot be read, is too short, or holds NaN.
    """
    if isinstance(video, (str, Path)):
        video = read_video(video)
    frames = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range)
    if frames.dim() != 4:
        raise VideoError(f"one video has shape (T, 3, H, W), got {tuple(frames.shape)}")
    if len(frames) < LEAST_FRAMES:
        raise VideoError(f"the video has {len(frames)} frames; at least {LEAST_FRAMES} can be judged")
    bad = (~frames.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        raise VideoError(f"frames {', '.join(map(str, bad[:5]))}{' and more' * (len(bad) > 5)} hold NaN or infinity")
    time = frame_times(video, fps, len(frames))
    return frames, (time[-1] - time[0]) / (len(time) - 1)


def _starts(q0: Any, count: int) -> list[Any]:
    if q0 is None:
        return [None] * count
    if isinstance(q0, (list, tuple)) and not (q0 and np.isscalar(q0[0])):
        starts = list(q0)
    else:
        array = q0 if isinstance(q0, Tensor) else np.asarray(q0, dtype=np.float64)
        if array.ndim == 1:
            return [array] * count
        starts = list(array)
    if len(starts) != count:
        raise InputError(f"q0 holds {len(starts)} poses for {count} videos")
    return starts
