"""The learned Jacobian field: a network from one image to the image motion of every cell per unit of each joint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from jidm.errors import InputError
from jidm.fields.free.backbone import make_encoder
from jidm.fields.free.blocks import ConvBlock, Modulation, downsample, luma, pixel_grid, spatial_softmax, upsample2x
from jidm.fields.free.config import COARSE_STRIDE, FLOW_SCALE, SIZES, LearnedFieldConfig
from jidm.fields.free.correlation import CorrelationHead
from jidm.fields.free.step_regression import StepRegressionHead
from jidm.video.letterbox import Letterbox

FieldT = TypeVar("FieldT", bound="LearnedField")

_CHUNK_SIZE = 16  # images
_KEYPOINTS = 32
_INITIAL_LOGIT_SCALE = 1.5  # logarithm of the inverse softmax temperature of keypoints
_KEYPOINT_GAIN = 4.0
"""At first keypoints lie in the middle half of the image; times this they vary by about one."""
_POSE_WIDTH = 96
_POSE_HEAD_WIDTH = 256
_POSE_LOG_STD_RANGE = 3.0  # standard deviations lie between e^-5 and e^1 of the training poses'
_INITIAL_MASK_LOGIT = -2.0  # most cells do not show the robot


@dataclass(frozen=True, eq=False)
class Features:
    """Features of a batch of images; computed once per frame and used for the steps to and from it.

    Attributes:
        gray: (B, 1, H', W') luma of the images as given, of `config.input_size` or H x W.
        gray_downsampled: (B, 1, H, W) luma reduced to height x width.
        half, quarter, eighth, sixteenth: encoder features at those scales.
        coarse: (B, C, H/8, W/8) matching features, of unit mean square.
    """

    gray: Tensor
    gray_downsampled: Tensor
    half: Tensor
    quarter: Tensor
    eighth: Tensor
    sixteenth: Tensor
    coarse: Tensor

    def __getitem__(self, index: Any) -> Features:
        """Index the batch axis."""
        return Features(*(getattr(self, f.name)[index] for f in fields(self)))


class LearnedField(nn.Module):
    """A network that predicts Jacobian field, flow, joint positions and joint steps from images of one robot.

    The field is decoded from the image and from joint positions q. A known q, tracked or given, makes the field more
    accurate than the image alone does; without one the network's own pose estimate is used.
    """

    kind: ClassVar[str] = "jacobian_field"
    q_mean: Tensor
    q_std: Tensor
    delta_std: Tensor
    delta_correlation: Tensor
    step_std_scale: Tensor
    flow_std_scale: Tensor
    regression_std_scale: Tensor
    pose_std_scale: Tensor
    video_std_scale: Tensor
    use_refinement: Tensor
    use_step_regression: Tensor
    grid2: Tensor
    grid4: Tensor
    grid8: Tensor
    grid16: Tensor

    def __init__(self, config: LearnedFieldConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        size, n = SIZES[config.size], config.n
        half, quarter, eighth, sixteenth = size.levels
        width, fine = size.decoder
        for name in ("q_mean", "q_std", "delta_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name)), persistent=False)
        correlation = torch.tensor(config.delta_correlation) if config.delta_correlation else torch.eye(n)
        self.register_buffer("delta_correlation", correlation, persistent=False)
        # Set by `calibrate_uncertainty` after training: factors on the standard deviations of steps solved from the
        # network's own matches, of steps solved from flow measured elsewhere, of regressed steps, and of poses.
        self.register_buffer("step_std_scale", torch.ones(n))
        self.register_buffer("flow_std_scale", torch.ones(n))
        self.register_buffer("regression_std_scale", torch.ones(n))
        self.register_buffer("pose_std_scale", torch.ones(n))
        # The same for steps in a video: the filter assumes that their errors are independent, which they are not.
        self.register_buffer("video_std_scale", torch.ones(n))
        # Whether photometric refinement makes steps more accurate; with an inaccurate field it does not.
        self.register_buffer("use_refinement", torch.tensor(True))
        # Whether fusing the regressed step makes steps more accurate.
        self.register_buffer("use_step_regression", torch.tensor(False))
        for stride in (2, 4, 8, 16):
            self.register_buffer(f"grid{stride}", pixel_grid(config.height, config.width, stride), persistent=False)
        self.encoder = make_encoder(config.backbone, size.levels, pretrained=pretrained)
        self.coarse_in = nn.Conv2d(eighth, size.match, 1)
        self.correlation = CorrelationHead(
            size.match, config.search_radius, (config.height // COARSE_STRIDE, config.width // COARSE_STRIDE)
        )
        self.from_sixteenth = nn.Conv2d(sixteenth + 2, width, 1)
        self.from_eighth = nn.Conv2d(eighth, width, 1)
        self.from_quarter = nn.Conv2d(quarter, width, 1)
        self.from_half = nn.Conv2d(half, fine, 1)
        self.to_fine = nn.Conv2d(width, fine, 1)
        self.pose_embedding = nn.Sequential(
            nn.Linear(3 * n, _POSE_WIDTH), nn.GELU(), nn.Linear(_POSE_WIDTH, _POSE_WIDTH), nn.GELU()
        )
        self.modulate = nn.ModuleList(Modulation(_POSE_WIDTH, x) for x in (width, width, width, fine))
        self.decoder = nn.ModuleList(ConvBlock(x, x) for x in (width, width, width, fine))
        self.field_out = nn.Conv2d(width, 2 * n, 1)
        self.field_fine = nn.Conv2d(fine, 2 * n, 1)
        self.mask_out = nn.Conv2d(fine, 1, 1)
        assert self.mask_out.bias is not None
        nn.init.constant_(self.mask_out.bias, _INITIAL_MASK_LOGIT)
        self.keypoints = nn.Conv2d(eighth + width, _KEYPOINTS, 1)
        # With flat maps every keypoint starts at the middle of the image and learns slowly, so the softmax starts
        # sharper.
        self.keypoint_logit_scale = nn.Parameter(torch.full((_KEYPOINTS, 1, 1), _INITIAL_LOGIT_SCALE))
        self.pose_out = nn.Sequential(
            nn.Linear(2 * _KEYPOINTS, _POSE_HEAD_WIDTH), nn.GELU(), nn.Linear(_POSE_HEAD_WIDTH, 2 * n)
        )
        self.step_head = (
            StepRegressionHead(quarter, (quarter, eighth, sixteenth), n) if config.step_regression else None
        )

    @classmethod
    def from_config(cls: type[FieldT], config: LearnedFieldConfig | Mapping[str, Any]) -> FieldT:
        """An untrained field from its config or the config's JSON form."""
        return cls(config if isinstance(config, LearnedFieldConfig) else LearnedFieldConfig.from_dict(config))

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every Jacobian's columns."""
        return self.config.joint_names

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Features:
        """Features of a batch of images, RGB in [0, 1], of `config.input_size`, for all heads.

        Images already reduced to height x width give the same features; photometric refinement then has no more
        detail.
        """
        downsampled = downsample(image, image.shape[-1] // self.config.width)
        half, quarter, eighth, sixteenth = self.encoder(downsampled)
        # Only field and pose train the encoder: gradients of matching are larger and would degrade the field.
        coarse = _rms_normalize(self.coarse_in(eighth.detach() if self.training else eighth))
        return Features(luma(image), luma(downsampled), half, quarter, eighth, sixteenth, coarse)

    def pose_keypoints(self, features: Features) -> Float[Tensor, "b m"]:
        """Image coordinates of the learned keypoints that the pose is regressed from, in [-1, 1]."""
        maps = self.keypoints(torch.cat([features.eighth, upsample2x(self._coarse(features))], 1))
        return spatial_softmax(maps * self.keypoint_logit_scale.exp(), self.grid8).flatten(1)

    def predict_pose(self, features: Features) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Joint positions regressed from the image alone, and their standard deviation [rad or m]."""
        out = self.pose_out(_KEYPOINT_GAIN * self.pose_keypoints(features))
        value, log_std = out.chunk(2, -1)
        std = (
            self.q_std
            * self.pose_std_scale
            * (_POSE_LOG_STD_RANGE * torch.tanh(log_std / _POSE_LOG_STD_RANGE) - 2).exp()
        )
        return self.q_mean + self.q_std * value, std

    def regress_step(
        self, first: Features, second: Features, flows: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """Joint step between two images by regression, and its standard deviation [rad or m].

        Args:
            first, second: features of the two images.
            flows: flow with log-confidence, on the grid of flow [px], from first to second and, if known, back.

        Raises:
            InputError: the network has no such head, see `LearnedFieldConfig.step_regression`.
        """
        if self.step_head is None:
            raise InputError(
                "this field was made without a head that regresses steps; train one with step_regression=True"
            )
        # The head is trained on the features learned for the field and does not change them.
        features = [x.quarter.detach() if self.training else x.quarter for x in (first, second)]
        step, log_std = self.step_head((features[0], features[1]), flows, self.grid4)
        return step * self.delta_std, log_std.exp() * self.delta_std * self.regression_std_scale

    def jacobian(
        self, features: Features, q: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b 2 n h w"], Float[Tensor, "b h w"]]:
        """The field at joint positions q [px of the image per rad or m], and the logit of the robot's mask."""
        pose = self.pose_embedding(torch.cat([(q - self.q_mean) / self.q_std, q.sin(), q.cos()], -1))
        x = self.decoder[0](self.modulate[0](self._coarse(features), pose, self.grid16))
        x = self.decoder[1](self.modulate[1](upsample2x(x) + self.from_eighth(features.eighth), pose, self.grid8))
        x = self.decoder[2](self.modulate[2](upsample2x(x) + self.from_quarter(features.quarter), pose, self.grid4))
        fine = upsample2x(self.to_fine(x)) + self.from_half(features.half)
        fine = self.decoder[3](self.modulate[3](fine, pose, self.grid2))
        # The last level has few channels: it sharpens the links' borders in the field of the level before.
        field = (upsample2x(self.field_out(x)) + self.field_fine(fine)).unflatten(1, (2, self.config.n))
        return field * (FLOW_SCALE / self.delta_std)[:, None, None], self.mask_out(fine)[:, 0]

    def letterbox(self, frames: Float[Tensor, "*batch 3 H W"]) -> Float[Tensor, "*batch 3 h w"]:
        """Frames of any size letterboxed to `config.input_size`, on the network's device and in its precision."""
        return Letterbox(frames.shape[-2], frames.shape[-1], *self.config.input_size).apply(frames).to(self.delta_std)

    def dense(
        self, q: Float[Tensor, "*batch n"], height: int, width: int, image: Float[Tensor, "*batch 3 H W"] | None = None
    ) -> tuple[Float[Tensor, "*batch 2 n {height} {width}"], Float[Tensor, "*batch {height} {width}"]]:
        """The field at joint positions q [rad or m] on a grid over the whole image [px of that grid per unit], and the
        robot's mask in [0, 1].

        Args:
            image: RGB in [0, 1], of `config.input_size`; see `letterbox` for other sizes.

        Raises:
            InputError: no image, or of another size.
        """
        if image is None or tuple(image.shape[-2:]) != self.config.input_size:
            given = "none" if image is None else "{} x {}".format(*image.shape[-2:])
            raise InputError(
                "this field reads images of {} x {} px, got {}; see letterbox".format(*self.config.input_size, given)
            )
        batch, pieces = q.shape[:-1], []
        flat = zip(
            image.reshape(-1, *image.shape[-3:]).split(_CHUNK_SIZE),
            q.reshape(-1, q.shape[-1]).split(_CHUNK_SIZE),
            strict=True,
        )
        for frames, poses in flat:
            jacobian, mask = self.jacobian(self.encode(frames.to(self.q_std)), poses.to(self.q_std))
            both = torch.cat([jacobian.flatten(1, 2), mask.sigmoid()[:, None]], 1)
            pieces.append(F.interpolate(both, (height, width), mode="bilinear", align_corners=False))
        both = torch.cat(pieces)
        scale = both.new_tensor([width / self.config.width, height / self.config.height])[:, None, None, None]
        jacobian = both[:, :-1].unflatten(1, (2, self.config.n)) * scale
        return jacobian.reshape(*batch, *jacobian.shape[1:]), both[:, -1].reshape(*batch, height, width)

    def _coarse(self, features: Features) -> Tensor:
        grid = self.grid16.expand(len(features.sixteenth), -1, -1, -1)
        return self.from_sixteenth(torch.cat([features.sixteenth, grid], 1))


def _rms_normalize(features: Tensor) -> Tensor:
    """Features of unit mean square at every position."""
    return features / features.square().mean(1, keepdim=True).add(1e-4).sqrt()
