"""Dense inverse search (DIS) optical flow: the default estimator, which needs no weights and no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.flow.base import Flow, check_pair, finite_items, forward_backward_weight

_MIN_SIZE = 16  # [px] OpenCV refuses images not larger than its patch
_MIN_CONTRAST = 32.0  # [gray levels] a smaller range is noise and is not stretched further


@dataclass(frozen=True)
class DisFlow:
    """OpenCV's dense inverse search (Kroeger et al. 2016), tuned for sub-pixel motion of white robot arms.

    The settings were chosen on rendered Panda video (320x240) and MuJoCo ALOHA video (640x480) with exact flow, by the
    error of the joint steps from robust, weighted least squares on the flow (mean |error| / mean |delta_q| at the true
    pose). OpenCV's medium preset with uniform weights has .33 and .61; these settings have .20 and .28. On Panda the
    gain comes from the finest scale, on ALOHA from the weight: forward-backward consistency (`forward_backward_weight`)
    times the texture of the image.

    Attributes:
        patch_size: edge of a patch [px]; 12 is better at 640x480 and worse at 320x240.
        patch_stride: distance of patches [px]; 4 is as accurate for small motion, but fails from 50 px on.
        gradient_iterations: gradient descent iterations per patch; 16 is as accurate as 50.
        variational_iterations: iterations of variational refinement per level; 0 increases the end-point error by a
            fifth.
        smoothness: weight of smoothness in the refinement (OpenCV's alpha); 80 blurs the flow across joints.
        blur: standard deviation of the blur before matching [px], against aliased edges of rendered images.
        texture: corner strength at which the weight is one half, in squared gray levels of 0..255 per px^2; 0 turns the
            texture weight off.
    """

    patch_size: int = 8
    patch_stride: int = 3
    gradient_iterations: int = 16
    variational_iterations: int = 5
    smoothness: float = 20.0
    blur: float = 0.7
    texture: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.patch_stride <= self.patch_size <= _MIN_SIZE - 1:
            raise InputError(f"DIS needs 1 <= patch_stride <= patch_size < {_MIN_SIZE}, got {self}")

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        """Flow from `first` to `second`, RGB in [0, 1]; see `FlowEstimator`. Runs on the CPU, without gradients."""
        return self.bidirectional(first, second)[0]

    def bidirectional(
        self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]
    ) -> tuple[Flow, Flow]:
        """Flow from `first` to `second` and back, at the cost of one: the weight needs both directions in any case."""
        check_pair(first, second)
        batch, (height, width) = first.shape[:-3], first.shape[-2:]
        finite = finite_items(first, second).reshape(-1).cpu()
        grays = [_to_gray(x).reshape(-1, height, width) for x in (first, second)]
        directions = [torch.zeros(len(finite), 2, height, width) for _ in range(2)]
        texture = torch.zeros(2, len(finite), height, width)
        for k in torch.nonzero(finite)[:, 0].tolist():
            a, b = self._preprocess(grays[0][k], grays[1][k])
            directions[0][k] = self._match(a, b)[:, :height, :width]
            directions[1][k] = self._match(b, a)[:, :height, :width]
            texture[0, k], texture[1, k] = (torch.from_numpy(_corner_strength(gray[k])) for gray in grays)
        flows = []
        for forward, backward, corners in zip(directions, directions[::-1], texture):
            weight = forward_backward_weight(forward, backward)
            if self.texture > 0:
                weight = weight * corners / (corners + self.texture)
            weight = weight * finite[:, None, None]
            flows.append(
                Flow(
                    forward.to(first).reshape(*batch, 2, height, width), weight.to(first).reshape(*batch, height, width)
                )
            )
        return flows[0], flows[1]

    def _preprocess(self, *grays: NDArray[np.float32]) -> list[NDArray[np.uint8]]:
        """Both frames blurred, stretched by one map to the 8 bits of OpenCV's DIS, and padded to its minimum size."""
        import cv2

        blurred = [cv2.GaussianBlur(x, (0, 0), self.blur) if self.blur > 0 else x for x in grays]
        sample = np.stack([x[::2, ::2] for x in blurred])  # every second pixel: percentiles in a third of the time
        low, high = np.percentile(sample, [1, 99])
        gain = 255.0 / max(high - low, _MIN_CONTRAST)
        bottom, right = (max(0, _MIN_SIZE - n) for n in grays[0].shape)
        stretched = (np.clip((x - low) * gain + 0.5, 0, 255).astype(np.uint8) for x in blurred)
        return [np.pad(x, ((0, bottom), (0, right)), mode="edge") for x in stretched]

    def _match(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Tensor:
        """(2, H, W) float32. The OpenCV object holds buffers that threads must not share, so each call creates one."""
        import cv2

        dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        dis.setFinestScale(0)
        dis.setPatchSize(self.patch_size)
        dis.setPatchStride(self.patch_stride)
        dis.setGradientDescentIterations(self.gradient_iterations)
        dis.setVariationalRefinementIterations(self.variational_iterations)
        dis.setVariationalRefinementAlpha(self.smoothness)
        return torch.from_numpy(dis.calc(first, second, None)).permute(2, 0, 1)


def _to_gray(frames: Tensor) -> NDArray[np.float32]:
    """(*batch, H, W) luma in 0..255; zero where not finite."""
    x = frames.detach().to("cpu", torch.float32).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
    luma: NDArray[np.float32] = torch.einsum("c,...chw->...hw", torch.tensor([76.245, 149.685, 29.07]), x).numpy()
    return luma


def _corner_strength(gray: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) smaller eigenvalue of the structure tensor over 9x9 px (Shi and Tomasi 1994)."""
    import cv2

    gx, gy = cv2.Scharr(gray, -1, 1, 0) / 32, cv2.Scharr(gray, -1, 0, 1) / 32
    xx, xy, yy = (cv2.blur(product, (9, 9)) for product in (gx * gx, gx * gy, gy * gy))
    smaller = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    strength: NDArray[np.float32] = np.maximum(smaller, 0.0)
    return strength
