"""VERA's requests (github.com/sizhe-li/VERA): windows of pictures, in which the views of all cameras lie side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.errors import InputError
from jidm.serving.observation import as_image

WINDOW_KEYS = ("context_rgb", "rgb_context")
# The first of them that a request holds is read: `rgb` beside a window repeats its last picture.
_PICTURE_KEYS = ("executed_rgb", *WINDOW_KEYS, "rgb")
_VIEW_KEYS = ("view_keys", "view_widths", "concat_rgb_key")
# Notes of VERA's client for its own planner and gains.
VERA_UNNEEDED = ("reason", "rails_bound", "executed_trans", "lang_guidance", "hist_guidance", "step_index")


def separate_views(message: Mapping[str, Any]) -> dict[str, Any]:
    """A request with one entry per view in place of VERA's pictures; other requests are returned as they are.

    Args:
        message: pictures (T, H, W, 3) or (H, W, 3), `view_keys` with the names of the views from left to right, and
            `view_widths` [px], equal widths if not given.

    Raises:
        InputError: names and widths of the views do not match the pictures.
    """
    found = [key for key in _PICTURE_KEYS if key in message]
    if not found:
        return dict(message)
    rest = {key: value for key, value in message.items() if key not in (*_PICTURE_KEYS, *_VIEW_KEYS)}
    picture, views = as_image(message[found[0]]), message.get("view_keys")
    if picture is None or views is None:
        return {**rest, found[0]: message[found[0]]}
    if not isinstance(views, list) or not views or not all(isinstance(view, str) for view in views):
        raise InputError("view_keys must be a list of names")
    if len({*views, *rest}) != len(views) + len(rest):
        raise InputError("view_keys must differ from one another and from the request's other names")
    widths = _widths(message.get("view_widths"), len(views), picture.shape[-2])
    return {**rest, **dict(zip(views, np.split(picture, np.cumsum(widths)[:-1], axis=-2), strict=True))}


def _widths(widths: Any, count: int, width: int) -> list[int]:
    if widths is None or (isinstance(widths, list) and not widths):
        widths = [width // count] * count
    if not isinstance(widths, (list, np.ndarray)) or not all(
        isinstance(x, (int, np.integer)) and x > 0 for x in widths
    ):
        raise InputError("view_widths must be a list of widths [px]")
    if len(widths) != count or sum(widths) != width:
        raise InputError(
            f"{len(widths)} view_widths of {sum(widths)} px for {count} view_keys in a picture of {width} px"
        )
    return [int(x) for x in widths]


def picture_digest(picture: NDArray[Any]) -> bytes:
    """A hash of a picture's pixels, equal for equal pictures."""
    content = f"{picture.shape} {picture.dtype.str} ".encode() + np.ascontiguousarray(picture).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def num_repeated(previous: Sequence[bytes], window: Sequence[bytes]) -> int:
    """How many pictures at the start of a window ended the previous one, both given by their digests."""
    longest = min(len(previous), len(window))
    return next((k for k in range(longest, 0, -1) if list(previous[-k:]) == list(window[:k])), 0)
