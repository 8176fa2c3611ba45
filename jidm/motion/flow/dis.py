"""Dense inverse search: the default estimator. Nothing to train, works everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.motion.flow.base import Flow, check_pair, finite_items, forward_backward_weight


@dataclass(frozen=True)
class DisFlow:
    """OpenCV's dense inverse search (Kroeger et al. 2016), tuned for half-pixel work on robots.

    Attributes:
        patch_stride: distance of patches [px].
        gradient_iterations: gradient descent steps per patch.
        variational_iterations: iterations of variational refinement per level.
    """

    patch_stride: int = 3
    gradient_iterations: int = 25
    variational_iterations: int = 5

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        """Flow from `first` to `second`, RGB in [0, 1]; see `FlowEstimator`. Not differentiable."""
        check_pair(first, second)
        height, width = first.shape[-2:]
        finite = finite_items(first, second).reshape(-1)
        a, b = (_to_grey(x).reshape(-1, height, width) for x in (first, second))
        forward = np.zeros((len(a), 2, height, width), np.float32)
        backward = np.zeros_like(forward)
        for k in torch.nonzero(finite)[:, 0].tolist():
            forward[k] = self._calc(a[k], b[k])
            backward[k] = self._calc(b[k], a[k])
        f = torch.from_numpy(forward)
        weight = forward_backward_weight(f, torch.from_numpy(backward)) * finite.cpu()[:, None, None]
        flow = f.to(first).reshape(*first.shape[:-3], 2, height, width)
        return Flow(flow, weight.to(first).reshape(*first.shape[:-3], height, width))

    def _calc(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        import cv2

        dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        dis.setFinestScale(0)
        dis.setPatchStride(self.patch_stride)
        dis.setGradientDescentIterations(self.gradient_iterations)
        dis.setVariationalRefinementIterations(self.variational_iterations)
        return dis.calc(first, second, None).transpose(2, 0, 1)


def _to_grey(frames: Tensor) -> np.ndarray:
    """(*batch, H, W) uint8 luma."""
    x = frames.detach().to(torch.float32).cpu().nan_to_num(0.0).clamp(0.0, 1.0)
    grey = 0.299 * x[..., 0, :, :] + 0.587 * x[..., 1, :, :] + 0.114 * x[..., 2, :, :]
    return (grey * 255.0).round().to(torch.uint8).numpy()
