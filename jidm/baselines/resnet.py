"""Residual trunks of EVA's model: small ones of our own, and torchvision's where it is installed."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn

from jidm.errors import InputError, MissingExtraError
from jidm.fields.free.blocks import ConvBlock, ResidualBlock

OWN: dict[str, tuple[int, int, int, int]] = {
    "tiny": (16, 32, 64, 64),
    "small": (24, 48, 96, 128),
    "base": (32, 64, 128, 256),
}
"""Channels at 1/2, 1/4 and 1/8 of the image, and of the output (at 1/8)."""

RESNETS: dict[str, int] = {"resnet18": 512, "resnet34": 512, "resnet50": 2048}
"""torchvision's trunks, and the channels of their output."""


def make_trunk(size: str, channels_in: int, side: int, norm: str) -> tuple[nn.Module, int]:
    """A trunk and the number of channels of its features.

    Args:
        size: a key of `OWN` or `RESNETS`.
        channels_in: of the stacked frames.
        side: the image's shorter side [px]; a torchvision trunk reduces small images less.
        norm: of a torchvision trunk, "group" or "batch".

    Raises:
        MissingExtraError: a torchvision trunk is asked for and torchvision is not installed.
    """
    if size in OWN:
        a, b, c, out = OWN[size]
        layers = (
            ConvBlock(channels_in, a, 2), ConvBlock(a, b, 2), ConvBlock(b, c, 2), ResidualBlock(c),
            ResidualBlock(c), nn.Conv2d(c, out, 1),
        )  # fmt: skip
        return nn.Sequential(*layers), out
    return _torchvision_trunk(size, channels_in, side, norm), RESNETS[size]


def load_pretrained(trunk: nn.Module, size: str) -> None:
    """Load the ImageNet weights of a torchvision trunk with batch norm; the first layer's are divided among the frames.

    Raises:
        InputError: the trunk is not torchvision's.
    """
    if size not in RESNETS:
        raise InputError(f"size '{size}' has no pretrained weights; choose one of {', '.join(RESNETS)}")
    weights = dict(_torchvision().get_model(size, weights="DEFAULT").state_dict())
    weights = {name: x for name, x in weights.items() if not name.startswith("fc.")}
    conv1_weight: torch.Tensor = trunk.conv1.weight  # type: ignore[union-attr, assignment]
    frames = conv1_weight.shape[1] // 3
    weights["conv1.weight"] = weights["conv1.weight"].repeat(1, frames, 1, 1) / frames
    trunk.load_state_dict(weights)


def _torchvision() -> Any:
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError("a torchvision trunk", "torchvision", "raft") from None
    return models


def _torchvision_trunk(size: str, channels_in: int, side: int, norm: str) -> nn.Module:
    """A torchvision ResNet up to its last feature map."""
    layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 32)
    net: Any = _torchvision().get_model(size, weights=None, norm_layer=layer)
    net.conv1 = nn.Conv2d(channels_in, 64, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    # Softmax over 3 x 3 cells cannot locate anything, so small images are reduced less.
    if side < 256:
        _undo_stride(net.layer4)
    if side < 128:
        _undo_stride(net.layer3)
    stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    return nn.Sequential(OrderedDict((name, getattr(net, name)) for name in stages))


def _undo_stride(stage: nn.Module) -> None:
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
