"""Recognition of the robot: whether the pictures of a video are like those of good videos of it.

A network decodes something from every video, also from one that is mirrored, lies on its side, or shows another robot; the
decoded motion may even be smooth. So the keypoints that it reads the pose from are compared with their distribution over good
videos, by the Mahalanobis distance (Lee et al., 2018, "A simple unified framework for detecting out-of-distribution samples").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.rewards.terms import TermScale

_MIN_STD = 1e-3  # of a keypoint [half images]
_MIN_SPREAD = 0.1  # of the distance
_SHARPNESS = 4  # the doubt is .01 at the 90th percentile of good videos, .63 three times as far from their median


@dataclass(frozen=True)
class Recognition:
    """Distribution of the m keypoint coordinates over good videos.

    Attributes:
        mean: (m,).
        whitening: (m, m) lower triangle, row by row: maps deviations from the mean to uncorrelated ones of unit variance.
        scale: of the distance, each good video's measured with the distribution of the others.
    """

    mean: tuple[float, ...]
    whitening: tuple[float, ...]
    scale: TermScale

    @classmethod
    def fit(cls, videos: Sequence[Float[Tensor, "_ m"]]) -> Recognition:
        """Fit to good videos.

        Args:
            videos: keypoints in each frame of each video.

        Raises:
            InputError: there are too few videos.
        """
        videos = [x.detach().double().cpu() for x in videos]
        distances = [
            float(_distance(video, *_fit(torch.cat([*videos[:k], *videos[k + 1 :]]))))
            for k, video in enumerate(videos)
            if len(videos) > 1
        ]
        mean, whitening = _fit(torch.cat(videos))
        rows, columns = torch.tril_indices(*whitening.shape)
        return cls(
            tuple(mean.tolist()),
            tuple(round(x, 4) for x in whitening[rows, columns].tolist()),
            distance_scale(distances),
        )

    def distance(self, keypoints: Float[Tensor, "T m"]) -> Float[Tensor, ""]:
        """Mean over the frames of the Mahalanobis distance, divided by sqrt(m): about 1 in good videos."""
        m = len(self.mean)
        whitening = keypoints.new_zeros(m, m)
        rows, columns = torch.tril_indices(m, m)
        whitening[rows, columns] = keypoints.new_tensor(self.whitening)
        return _distance(keypoints, keypoints.new_tensor(self.mean), whitening)

    def doubt(self, keypoints: Float[Tensor, "T m"]) -> Float[Tensor, ""]:
        """In [0, 1): 0 for pictures like those of good videos, 1 where nothing supports that this is the robot."""
        return doubt_of(self.distance(keypoints), self.scale)


def distance_scale(distances: Sequence[float]) -> TermScale:
    """Scale of the distance from those of good videos.

    Raises:
        InputError: there are too few.
    """
    return TermScale.from_tail_means(distances, _MIN_SPREAD)


def doubt_of(distance: Float[Tensor, "*any"], scale: TermScale) -> Float[Tensor, "*any"]:
    """Doubt in [0, 1) at a distance."""
    return scale.penalty(distance, sharpness=_SHARPNESS)


def _distance(x: Tensor, mean: Tensor, whitening: Tensor) -> Float[Tensor, ""]:
    return ((x - mean) @ whitening.T).square().mean(-1).clamp(min=1e-12).sqrt().mean()


def _fit(x: Float[Tensor, "N m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
    """Mean and whitening, with the covariance of Ledoit and Wolf (2004) of the standardized coordinates."""
    mean, std = x.mean(0), x.std(0, correction=0) + _MIN_STD
    z = (x - mean) / std
    count, m = z.shape
    sample = z.T @ z / count
    target = sample.diagonal().mean() * torch.eye(m, dtype=x.dtype)
    distance = (sample - target).square().sum()
    error = (z.square().sum(1).square().sum() / count - sample.square().sum()) / count
    shrinkage = float((error / distance.clamp(min=1e-12)).clamp(0, 1))
    covariance = (1 - shrinkage) * sample + shrinkage * target
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return mean, whitening / std
