"""Agreement of a video with the robot's mask that a learned field predicts, see `agreement`: the mask's border lies on edges.

It recognizes frames that do not show a robot at all. It does not tell one robot from another, or a video from its mirror image:
the mask follows whatever looks like the robot.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.agreement import Agreement, RunningComparison

_SHIFTS = [(u, v) for u in (-4, -2, 0, 2, 4) for v in (-4, -2, 0, 2, 4) if (u, v) != (0, 0)]  # [cells]
MIN_SCORE = 2.0
"""With the bundled checkpoints single frames of the robot reach 3.3 and more, noise at most 1.8, uniform frames 0."""
_MAX_UNDECIDED = 0.5  # p (1 - p) relative to p, above which the mask says nothing: the network has not learned it
_MIN_BORDER = 0.1  # largest step of the probability below which the mask has no border


class MaskAgreement:
    """Running agreement of one video."""

    def __init__(self) -> None:
        self._comparison = RunningComparison()

    def update(self, gray: Float[Tensor, "1 1 H W"], mask: Float[Tensor, "1 h w"]) -> float | None:
        """Add a frame; its own score, or None where the mask tells nothing: it has no border, or is not learned.

        Args:
            gray: luma of the frame in [0, 1]. mask: logit of the probability that a cell shows the robot.
        """
        probability = mask.sigmoid()[0]
        edges, steps = _gradient(F.interpolate(gray, probability.shape, mode="area")[0, 0]), _gradient(probability)
        border = steps.norm(dim=0)
        undecided = (probability * (1 - probability)).sum() / probability.sum()
        if float(undecided) > _MAX_UNDECIDED or float(border.max()) < _MIN_BORDER:
            return None
        # Edges along the border count, those that cross it do not.
        copies = [steps, *(steps.roll(shift, (2, 1)) for shift in _SHIFTS)]
        return self._comparison.update(torch.stack([(x * edges).sum(0).abs().sum() / border.sum() for x in copies]))

    @property
    def value(self) -> Agreement:
        """The agreement of the last frames."""
        return Agreement(self._comparison.score, None, self._comparison.frames, MIN_SCORE)


def _gradient(image: Float[Tensor, "H W"]) -> Float[Tensor, "2 h w"]:
    """Central differences by u and v in the interior."""
    du = image[1:-1, 2:] - image[1:-1, :-2]
    dv = image[2:, 1:-1] - image[:-2, 1:-1]
    return torch.stack([du, dv])
