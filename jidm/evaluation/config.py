"""How a model is evaluated."""

from __future__ import annotations

from dataclasses import dataclass

from jidm.errors import InputError


@dataclass(frozen=True)
class EvalConfig:
    """Which held-out video is decoded, and how it is scored.

    Attributes:
        episodes: indices; all that the data set lists if None.
        image_key: which of the data set's videos; the first if None.
        stride: recorded frames per step; 3 at 30 fps are steps of 0.1 s.
        frames: at most so many frames of each episode, counted after the stride.
        clip_frames: length of the clip on which positions are scored, from the known initial pose [frames].
        tolerance: a position within this is right [rad or m].
        joints: that count; all but grippers if None.
        moving_speed: joints with a lower mean speed are left out of correlations [rad/s or m/s].
        field_samples: pairs per episode at which field and flow are compared with the exact ones.
        given_initial_pose: whether models are given the initial pose; else they predict it from the image, if they can.
    """

    episodes: tuple[int, ...] | None = None
    image_key: str | None = None
    stride: int = 1
    frames: int | None = None
    clip_frames: int = 49
    tolerance: float = 0.05
    joints: tuple[str, ...] | None = None
    moving_speed: float = 0.05
    field_samples: int = 4
    given_initial_pose: bool = True

    def __post_init__(self) -> None:
        if self.stride < 1 or self.clip_frames < 2 or (self.frames is not None and self.frames < 2):
            raise InputError("an evaluation needs stride >= 1 and at least 2 frames in a clip and in an episode")
        if not self.tolerance > 0 or self.field_samples < 0:
            raise InputError("an evaluation needs tolerance > 0 and field_samples >= 0")
