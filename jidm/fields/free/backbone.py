"""Image encoders: the built-in small network, the convolutions of a torchvision classifier, or a registered module."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from jidm.errors import InputError, MissingExtraError, did_you_mean
from jidm.fields.free.blocks import ConvBlock, Encoder

Levels = tuple[int, int, int, int]
"""Channels at 1/2, 1/4, 1/8 and 1/16 of the image."""

OWN = "own"

_REGISTERED: dict[str, Callable[[], nn.Module]] = {}
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of ImageNet's pixels, RGB


def register_backbone(name: str, make: Callable[[], nn.Module]) -> None:
    """Register a backbone under a name, by which configurations and checkpoints refer to it.

    Args:
        name: not yet taken.
        make: returns a module that maps images (B, 3, H, W), RGB in [0, 1], to four feature maps of any channels, at
            1/2, 1/4, 1/8 and 1/16 of their size.

    Raises:
        InputError: the name is taken.
    """
    if name == OWN or name in _REGISTERED:
        raise InputError(f"there is a backbone '{name}' already; choose another name")
    _REGISTERED[name] = make


def make_encoder(name: str, levels: Levels, *, pretrained: bool = False) -> nn.Module:
    """An encoder (B, 3, H, W) -> four maps of `levels` channels.

    Args:
        name: "own", a registered name, or one of torchvision's classifiers ("resnet18", "mobilenet_v3_small", ...).
        levels: channels at 1/2, 1/4, 1/8 and 1/16 of the image.
        pretrained: start from torchvision's default weights, which it downloads; else random ones.

    Raises:
        InputError: no such backbone, or its convolutions do not halve the image step by step.
        MissingExtraError: torchvision is needed and absent.
    """
    if name == OWN:
        return Encoder(levels)
    if name in _REGISTERED:
        return _Projected(_REGISTERED[name](), levels)
    return _Projected(_TorchvisionStages(name, pretrained), levels)


class _Projected(nn.Module):
    """A backbone with 1x1 convolutions to the channels that the field's decoder takes."""

    def __init__(self, backbone: nn.Module, levels: Levels) -> None:
        super().__init__()
        self.backbone = backbone
        side = 64
        with torch.no_grad():
            maps = list(backbone.eval()(torch.zeros(1, 3, side, side)))
        backbone.train()
        shapes = [tuple(x.shape[2:]) for x in maps]
        expected_shapes = [(side // s,) * 2 for s in (2, 4, 8, 16)]
        if shapes != expected_shapes:
            raise InputError(
                f"a backbone must give maps at 1/2, 1/4, 1/8 and 1/16: of 64 px {expected_shapes}, got {shapes}"
            )
        self.project = nn.ModuleList(nn.Conv2d(x.shape[1], c, 1) for x, c in zip(maps, levels, strict=True))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(project(x) for project, x in zip(self.project, self.backbone(image), strict=True))


class _TorchvisionStages(nn.Module):
    """A classifier cut into four stages that end at 1/2, 1/4, 1/8 and 1/16 of the image."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        for key, value in zip(("mean", "std"), _IMAGENET, strict=True):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)
        self.stages = nn.ModuleList(_stages(_classifier(name, pretrained), name))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x, maps = (image - self.mean) / self.std, []
        for stage in self.stages:
            # A classifier whose first layer reduces by 4 has no map at half the size; a small one of our own replaces
            # it.
            if isinstance(stage, ConvBlock):
                maps.append(stage(x))
            else:
                x = stage(x)
                maps.append(x)
        return tuple(maps)


def _classifier(name: str, pretrained: bool) -> nn.Module:
    try:
        from torchvision import models
    except ImportError:
        raise MissingExtraError(f"the backbone '{name}'", "torchvision", "raft") from None
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"unknown backbone '{name}': {did_you_mean(name, [OWN, *_REGISTERED, *known])}")
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    return model


def _stages(model: nn.Module, name: str) -> list[nn.Module]:
    """The model's layers in four groups, each of which ends at half the resolution of the one before."""
    groups: dict[int, list[nn.Module]] = {2: [], 4: [], 8: [], 16: []}
    x = torch.zeros(1, 3, 64, 64)
    features = getattr(model, "features", None)
    body = features if isinstance(features, nn.Module) else model
    body.eval()
    try:
        with torch.no_grad():
            for layer, y in _layers(body, x):
                stride = 64 // y.shape[-1] if y.dim() == 4 and y.shape[-1] else 0
                if stride == 1:
                    stride = 2
                if stride not in groups:
                    break
                groups[stride].append(layer)
    except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
        raise InputError(f"'{name}' is no chain of convolutions ({error}); choose another backbone") from None
    model.train()
    if not groups[2]:
        groups[2] = [ConvBlock(3, 16, 2)]
    if not all(groups.values()):
        raise InputError(f"'{name}' has no maps at 1/4, 1/8 and 1/16 of the image; choose another backbone")
    return [group[0] if isinstance(group[0], ConvBlock) else nn.Sequential(*group) for group in groups.values()]


def _layers(body: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """Layers in order, each with its output; a container that reduces the resolution more than once is opened."""
    for layer in body.children():
        y = layer(x)
        if y.dim() == 4 and y.shape[-1] * 2 < x.shape[-1] and isinstance(layer, nn.Sequential) and len(layer) > 1:
            for inner, y in _layers(layer, x):
                yield inner, y
        else:
            yield layer, y
        x = y
