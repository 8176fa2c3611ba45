"""What a client's observation holds: images, joint positions and words, under the names that robots' clients use.

Every key is used, or is known not to be needed, or refuses the message: a state under a misspelled name would otherwise be
ignored, and the robot would start at a guessed pose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError, did_you_mean

_STATE_KEYS = ("state", "qpos", "joints")
_JOINT_KEYS, _GRIPPER_KEYS = ("joint_position", "joint_positions", "q_robot"), ("gripper_position",)
_NUMBER_KEYS = (*_STATE_KEYS, *_JOINT_KEYS, *_GRIPPER_KEYS)
_TOOL_POSE_KEYS = ("cartesian_position", "eef_pos", "eef_quat")
_PREFIXES = ("", "observation/", "observation.", "observations/", "obs/")
_UNNEEDED = ("prompt", "task", "instruction", "language_instruction", "session_id", "timestamp", "frame_index")
_OPENING_TOLERANCE = 0.1  # by which a gripper may be reported beyond closed or open, of its range


_IMAGE = "image of shape (H, W, 3) or (T, H, W, 3)"


@dataclass(frozen=True, eq=False)
class Observation:
    """One observation.

    Attributes:
        images: name -> (H, W, 3) or (T, H, W, 3).
        q: (n,) joint positions that its last frame shows, as the client states them [rad or m]; None if it does not.
        state: (n,) joint positions of the robot when it was sent [rad or m]; None if it holds none.
    """

    images: Mapping[str, NDArray[Any]]
    q: NDArray[np.float64] | None
    state: NDArray[np.float64] | None

    def image(self, key: str | None) -> NDArray[Any]:
        """The image with this name, or with a name that ends so; the only one if None.

        Raises:
            InputError: it is missing or ambiguous.
        """
        if key is None and len(self.images) == 1:
            return next(iter(self.images.values()))
        if key is not None and key in self.images:
            return self.images[key]
        same = [] if key is None else [name for name in self.images if _last_part(name) == _last_part(key)]
        if len(same) == 1:
            return self.images[same[0]]
        problem = "serve with an image key" if key is None else f"no image '{key}'"
        problem = f"several images '{key}'" if same else problem
        problem = problem if self.images else f"no {_IMAGE}"
        raise InputError(f"{problem}; images in the request: {', '.join(sorted(self.images)) or 'none'}")


def read_observation(
    message: Mapping[str, Any], joint_names: Sequence[str], grippers: Sequence[int], gripper_range: NDArray[np.float64], *,
    known: Sequence[str] = (), normalized_grippers: bool = False,
) -> Observation:  # fmt: skip
    """Read an observation.

    Args:
        message: names to values, possibly nested; images may be (H, W, 3) or (3, H, W), or several of them.
        joint_names: n names, the order of a state. grippers: columns of the gripper joints.
        gripper_range: (g, 2) positions of the grippers, closed and open [rad or m].
        known: keys that others read.
        normalized_grippers: whether the grippers of a state are from 0 (closed) to 1 (open), not joint positions.

    Raises:
        InputError: a value is not what its name says, a key is unknown, or the robot's pose is given as a tool pose only.
    """
    images: dict[str, NDArray[Any]] = {}
    numbers: dict[str, NDArray[np.float64]] = {}
    tool_pose = ""
    for name, value in _flattened({key: value for key, value in message.items() if key not in known}):
        plain = _plain(name)
        if name == "q" or plain in _NUMBER_KEYS:
            if value is not None:
                numbers[name] = _vector(value, name)
        elif plain in _TOOL_POSE_KEYS:
            tool_pose = name
        elif plain not in _UNNEEDED:
            images[name] = _checked_image(value, name, known)
    states, joints, gripper = (
        {name: value for name, value in numbers.items() if _plain(name) in keys}
        for keys in (_STATE_KEYS, _JOINT_KEYS, _GRIPPER_KEYS)
    )
    # VERA's client sends the same joint positions under two names.
    differ = any(not np.array_equal(value, next(iter(joints.values()))) for value in joints.values())
    if len(states) + bool(joints or gripper) > 1 or len(gripper) > 1 or differ:
        raise InputError(f"the request holds several states: {', '.join(numbers)}; send one of them")
    q, state = numbers.get("q"), _first(states)
    if normalized_grippers:
        q, state = (None if x is None else _denormalized(x, grippers, gripper_range) for x in (q, state))
    if joints or gripper:
        state = _join(_first(joints), _first(gripper), joint_names, grippers, gripper_range)
    if tool_pose and q is None and state is None:
        raise InputError(
            f"the request's '{tool_pose[:60]}' is a tool pose, from which the joints do not follow: send joint positions"
        )
    return Observation(images, q, state)


def _first(values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64] | None:
    return next(iter(values.values()), None)


def _checked_image(value: Any, name: str, known: Sequence[str]) -> NDArray[Any]:
    """An image (H, W, 3) or (T, H, W, 3).

    Raises:
        InputError: it is none, or something else under a name that is not understood.
    """
    image = as_image(value)
    if image is not None:
        return image
    if isinstance(value, np.ndarray) and value.ndim >= 3:
        raise InputError(f"the request's '{name[:60]}' is no {_IMAGE}, it has shape {value.shape}")
    candidates = ["q", "observation/state", "observation/joint_position", "observation/gripper_position", *known]
    raise InputError(f"the request's '{name[:60]}' is not understood: {did_you_mean(name[:60], candidates)}")


def _denormalized(
    q: NDArray[np.float64], columns: Sequence[int], gripper_range: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) joint positions, from those whose grippers are from 0 (closed) to 1 (open)."""
    columns = [k for k in columns if k < len(q)]  # a state of another length is refused where it is used
    closed, opened = gripper_range[: len(columns)].T
    q = q.copy()
    opening = _checked_opening(q[columns], "a state's gripper is from 0 (closed) to 1 (open)")
    q[columns] = closed + opening * (opened - closed)
    return q


def _checked_opening(value: NDArray[np.float64], meaning: str) -> NDArray[np.float64]:
    if not ((value >= -_OPENING_TOLERANCE) & (value <= 1 + _OPENING_TOLERANCE)).all():
        raise InputError(f"{meaning}, got {', '.join(f'{x:.4g}' for x in value)}; or send joint positions [rad or m]")
    return value.clip(0, 1)


def _join(
    joints: NDArray[np.float64] | None, gripper: NDArray[np.float64] | None, joint_names: Sequence[str], columns: Sequence[int],
    gripper_range: NDArray[np.float64],
) -> NDArray[np.float64]:  # fmt: skip
    """(n,) joint positions from DROID's two vectors. Its gripper is 0 where open and 1 where closed."""
    n, g = len(joint_names), len(columns)
    if joints is None:
        raise InputError("the request holds gripper_position without joint_position; send both, or a whole state")
    if gripper is None and len(joints) == n:
        return joints
    if gripper is None or len(gripper) != g or len(joints) != n - g:
        given = "none" if gripper is None else len(gripper)
        raise InputError(
            f"joint_position and gripper_position must hold {n - g} and {g} numbers for this robot, got {len(joints)} and {given}"
        )
    closed, opened = gripper_range.T
    q = np.zeros(n)
    q[np.setdiff1d(np.arange(n), columns)] = joints
    closing = _checked_opening(gripper, "gripper_position is from 0 (open) to 1 (closed)")
    q[list(columns)] = opened + closing * (closed - opened)
    return q


def _flattened(message: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in message.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}/")
        else:
            yield name, value


def _plain(name: str) -> str:
    """The name without the prefixes of observations."""
    prefix = max((x for x in _PREFIXES if name.startswith(x)), key=len)
    return name[len(prefix) :]


def _last_part(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]


def as_image(value: Any) -> NDArray[Any] | None:
    """(H, W, 3) or (T, H, W, 3) from either order of axes, and from a batch of one; None if it is no image."""
    if isinstance(value, np.ndarray) and value.ndim == 5 and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.ndim not in (3, 4) or not value.size:
        return None
    if value.shape[-1] == 3:
        return value
    return np.moveaxis(value, -3, -1) if value.shape[-3] == 3 else None


def _vector(value: Any, name: str) -> NDArray[np.float64]:
    """Numbers (n,), possibly with leading axes of length 1, such as a batch of one."""
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} must be numbers") from None
    if numbers.ndim == 0 or numbers.size != numbers.shape[-1]:
        raise InputError(f"{name} must be one vector, got shape {numbers.shape}")
    return numbers.reshape(-1)
