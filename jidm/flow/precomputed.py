"""Precomputed flow: arrays, and files in the formats of flow data sets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow, check_pair, finite_items, mask_invalid

FlowLayout = Literal["2HW", "HW2"]

_MIDDLEBURY_TAG = 202021.25  # first float of every .flo file; it also identifies the byte order
_MIDDLEBURY_UNKNOWN = 1e9  # larger values mark unknown flow
_KITTI_ZERO, _KITTI_SCALE = 2.0**15, 64.0


class PrecomputedFlow:
    """Given flow between consecutive frames of one video, or of a batch of videos.

    Args:
        flow: (*batch, T-1, 2, H, W) or (*batch, T-1, H, W, 2) displacement (u right, v down) [px].
        weight: (*batch, T-1, H, W) confidence in [0, 1]; 1 if not given. It becomes 0 where flow or weight is not
            finite.
        layout: of the last axes, "2HW" or "HW2"; needed only if the shape allows both.

    Raises:
        InputError: shapes disagree or the layout is ambiguous.
    """

    def __init__(
        self, flow: Tensor | np.ndarray, weight: Tensor | np.ndarray | None = None, *, layout: FlowLayout | None = None
    ) -> None:
        measured = _channels_first(flow, layout)
        if measured.ndim < 4:
            raise InputError(
                f"flow of a video needs an axis of frame pairs, got {tuple(measured.shape)}; use flow[None] for one"
            )
        self.flow: Flow = _with_weight(measured, weight)

    @classmethod
    def from_files(
        cls, paths: str | Path | Iterable[str | Path], *, layout: FlowLayout | None = None
    ) -> PrecomputedFlow:
        """From one .npy / .npz file of a whole video, or one file per pair of frames in order (see `read_flow`).

        Raises:
            InputError: a file cannot be read, or the files differ in size.
        """
        if isinstance(paths, (str, Path)):
            whole = read_flow(paths, layout=layout)
            return cls(whole.flow, whole.weight, layout="2HW")
        pairs = [read_flow(path, layout=layout) for path in paths]
        if not pairs or any(pair.flow.shape != pairs[0].flow.shape for pair in pairs):
            raise InputError(
                f"flow files of one size are needed, got sizes {sorted({tuple(p.flow.shape) for p in pairs})}"
            )
        return cls(torch.stack([p.flow for p in pairs]), torch.stack([p.weight for p in pairs]), layout="2HW")

    def __len__(self) -> int:
        """Number of frame pairs."""
        return self.flow.flow.shape[-4]

    def between(
        self,
        first: Float[Tensor, "*batch 3 H W"],
        second: Float[Tensor, "*batch 3 H W"],
        start: int,
        stop: int,
    ) -> Flow:
        """Stored flow of the pair (start, start + 1); see `FrameIndexedFlow`."""
        if stop != start + 1 or not 0 <= start < len(self):
            raise InputError(
                f"precomputed flow holds steps of one frame, 0 -> 1 to {len(self) - 1} -> {len(self)}; "
                f"asked for {start} -> {stop}"
            )
        return self._on_frames(
            Flow(self.flow.flow[..., start, :, :, :], self.flow.weight[..., start, :, :]), first, second
        )

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        """All stored pairs at once: `first` and `second` are (*batch, T-1, 3, H, W)."""
        return self._on_frames(self.flow, first, second)

    @staticmethod
    def _on_frames(flow: Flow, first: Tensor, second: Tensor) -> Flow:
        check_pair(first, second)
        expected = (*first.shape[:-3], 2, *first.shape[-2:])
        if tuple(flow.flow.shape) != expected:
            raise InputError(
                f"precomputed flow is {tuple(flow.flow.shape)}, the frames need {expected}; "
                "resize it with Flow.resized, or query one pair by .between(first, second, start, stop)"
            )
        flow = flow.to(first)
        return mask_invalid(flow.flow, flow.weight, finite_items(first, second))


def read_flow(path: str | Path, *, layout: FlowLayout | None = None) -> Flow:
    """Flow from a file: .flo (Middlebury), .png (KITTI, 16 bit), .npy, .npz with `flow` and optionally `weight`.

    Args:
        path: the file.
        layout: of an array's last axes, "2HW" or "HW2"; needed only if the shape allows both.

    Returns:
        Float32 (or the array's float64) flow (*batch, 2, H, W) [px]; weight 0 where the flow is unknown, else 1.

    Raises:
        InputError: the file is missing, broken or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such flow file")
    readers = {".flo": _read_middlebury, ".png": _read_kitti}
    if path.suffix in readers:
        return readers[path.suffix](path)
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"{path}: flow is read from .flo, .png (KITTI), .npy or .npz files")
    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return _with_weight(_channels_first(loaded, layout), None)
        with loaded:
            return _with_weight(_channels_first(loaded["flow"], layout), loaded.get("weight"))
    except KeyError:
        raise InputError(f"{path}: holds no array named 'flow'; save it with numpy.savez(path, flow=...)") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable array ({error})") from None


def _read_middlebury(path: Path) -> Flow:
    data = path.read_bytes()
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != _MIDDLEBURY_TAG:
        raise InputError(f"{path}: not a Middlebury flow file (tag {_MIDDLEBURY_TAG} is missing)")
    width, height = (int(n) for n in np.frombuffer(data, "<i4", 2, offset=4))
    if width < 1 or height < 1 or len(data) != 12 + 8 * width * height:
        raise InputError(f"{path}: {len(data)} bytes do not hold a {width}x{height} flow; copy the file again")
    values = np.frombuffer(data, "<f4", offset=12).astype(np.float32)
    uv = torch.from_numpy(values).reshape(height, width, 2).permute(2, 0, 1)
    known = (uv.abs() < _MIDDLEBURY_UNKNOWN).all(0)
    return _with_weight(torch.where(known, uv, torch.nan), None)


def _read_kitti(path: Path) -> Flow:
    import cv2

    # OpenCV returns channels as B, G, R; the file's order is u, v, known.
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise InputError(f"{path}: not a readable PNG; copy the file again")
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"{path}: not KITTI flow, which is a PNG of three 16-bit channels")
    known, v, u = (torch.from_numpy(image[..., k].astype(np.float32)) for k in range(3))
    uv = (torch.stack([u, v]) - _KITTI_ZERO) / _KITTI_SCALE
    return _with_weight(torch.where(known > 0, uv, torch.nan), None)


def _channels_first(flow: Tensor | np.ndarray, layout: FlowLayout | None) -> Tensor:
    x = torch.as_tensor(flow)
    if not x.is_floating_point():
        raise InputError(f"flow must be floating point, got {x.dtype}")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    fits = [name for name, axis in (("2HW", -3), ("HW2", -1)) if x.ndim >= 3 and x.shape[axis] == 2]
    if layout is None:
        if len(fits) != 1:
            problem = "may be 2HW or HW2: pass layout=" if fits else "has no axis of 2 displacements (2HW or HW2)"
            raise InputError(f"flow of shape {tuple(x.shape)} {problem}")
        layout = "2HW" if fits == ["2HW"] else "HW2"
    elif layout not in fits:
        raise InputError(f"flow of shape {tuple(x.shape)} is not in layout '{layout}'; known layouts: 2HW, HW2")
    return x if layout == "2HW" else x.movedim(-1, -3)


def _with_weight(flow: Tensor, weight: Tensor | np.ndarray | None) -> Flow:
    w = torch.ones_like(flow[..., 0, :, :]) if weight is None else torch.as_tensor(weight).to(flow)
    if w.shape != (*flow.shape[:-3], *flow.shape[-2:]):
        raise InputError(f"weight of shape {tuple(w.shape)} does not match flow of shape {tuple(flow.shape)}")
    return mask_invalid(flow, w)
