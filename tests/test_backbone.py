"""Image encoders other than the built-in one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jidm.errors import InputError
from jidm.fields.free import LearnedField, LearnedFieldConfig, register_backbone
from jidm.fields.free.backbone import make_encoder

LEVELS = (16, 32, 48, 64)


def config(backbone: str) -> LearnedFieldConfig:
    two = (0.0, 0.0), (1.0, 1.0), (0.1, 0.1), (-1.0, -1.0), (1.0, 1.0)
    return LearnedFieldConfig(("a", "b"), ("revolute",) * 2, 64, 96, *two, backbone=backbone)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 5), (5, 6), (6, 7), (7, 9)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "regnet_y_400mf", "vgg11"])
def test_torchvision_classifiers_give_all_levels(name: str) -> None:
    pytest.importorskip("torchvision")
    encoder = make_encoder(name, LEVELS)
    maps = encoder(torch.rand(2, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(c, 64 // s, 96 // s) for c, s in zip(LEVELS, (2, 4, 8, 16))]
    sum(x.square().sum() for x in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_registered_backbone_is_found_by_its_name() -> None:
    register_backbone("pyramid", Pyramid)
    with pytest.raises(InputError, match="already"):
        register_backbone("pyramid", Pyramid)
    torch.manual_seed(0)
    field = LearnedField(config("pyramid"))
    again = LearnedField.from_config(config("pyramid"))
    again.load_state_dict(field.state_dict())
    image, q = torch.rand(1, 3, 64, 96), torch.zeros(1, 2)
    a, b = (x.eval().jacobian(x.eval().encode(image), q)[0] for x in (field, again))
    assert a.shape == (1, 2, 2, 32, 48) and torch.equal(a, b)


def test_an_unsuitable_backbone_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        make_encoder("resnt18", LEVELS)
    register_backbone("flat", lambda: nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(InputError, match="1/16"):
        make_encoder("flat", LEVELS)
