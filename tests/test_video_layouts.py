"""`as_video`: every common layout becomes the same video; ambiguous input is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jidm.errors import VideoError
from jidm.video.io import Video
from jidm.video.layouts import as_video

PIL = pytest.importorskip("PIL.Image")


def bytes_video(*batch: int, t: int = 5, h: int = 17, w: int = 23) -> Tensor:
    """(*batch, T, 3, H, W) uint8 with dark and bright pixels; odd sizes."""
    x = torch.randint(0, 256, (*batch, t, 3, h, w), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x[..., 0, 0], x[..., 0, 1] = 0, 255
    return x


def same(got: Tensor, truth: Tensor, dtype: torch.dtype = torch.float32, tolerance: float = 1e-6) -> None:
    assert got.dtype == dtype and got.shape == truth.shape
    torch.testing.assert_close(got.double(), truth.double() / 255, rtol=0, atol=tolerance)


# ---- inferred layouts -----------------------------------------------------------------------------------------------


def test_ecosystem_layouts_are_one_video() -> None:
    x = bytes_video(2)
    unit = x.double() / 255
    handed = {
        "(B,F,C,H,W) float in [0,1], diffusers pt, flow_grpo": unit.float(),
        "(B,F,H,W,C) float32 in [0,1], diffusers np": unit.float().movedim(-3, -1).numpy(),
        "(B,3,T,H,W) in [-1,1], EVA's fork": (unit * 2 - 1).float().transpose(1, 2),
        "(B,T,3,H,W) in [-1,1]": (unit * 2 - 1).float(),
        "(B,T,H,W,3) uint8": x.movedim(-3, -1),
        "(B,T,3,H,W) uint8": x,
        "(B,3,T,H,W) uint8": x.transpose(1, 2).numpy(),
        "list of (T,H,W,3) uint8 arrays": [v.movedim(-3, -1).numpy() for v in x],
        "list of lists of PIL, diffusers pil": [
            [PIL.fromarray(f.permute(1, 2, 0).numpy()) for f in video] for video in x
        ],
    }
    for name, frames in handed.items():
        try:
            same(as_video(frames), x)
        except (VideoError, AssertionError) as error:
            raise AssertionError(f"{name}: {error}") from error


def test_one_video_without_batch() -> None:
    x = bytes_video()
    same(as_video(x.permute(0, 2, 3, 1).numpy()), x)
    same(as_video([PIL.fromarray(f.permute(1, 2, 0).numpy()) for f in x]), x)
    same(as_video([f.permute(1, 2, 0) for f in x]), x)
    same(as_video(Video(x, None)), x)
    same(as_video((x.float() / 127.5 - 1).transpose(0, 1)), x)


@settings(max_examples=40, deadline=None)
@given(st.permutations("TCHW"), st.integers(0, 2), st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (1.0, 0.0)]))
def test_given_layout_and_range_are_applied(axes: list[str], batch: int, value_range: tuple[float, float]) -> None:
    x = bytes_video(*(2,) * batch, t=3)
    black, white = value_range
    values = x.double() / 255 * (white - black) + black
    moved = values.permute(*range(batch), *(batch + "TCHW".index(a) for a in axes))
    got = as_video(moved, layout="B" * (batch > 0) + "".join(axes), value_range=value_range)
    same(got, x, torch.float64)


def test_type_device_and_gradient_are_kept() -> None:
    unit = bytes_video().double() / 255
    assert as_video(unit).dtype == torch.float64
    assert as_video(unit.half()).dtype == torch.float32 and as_video(unit.bfloat16()).dtype == torch.float32
    canonical = unit.float()
    assert as_video(canonical).data_ptr() == canonical.data_ptr()  # no conversion, no copy
    signed = (unit * 2 - 1).requires_grad_()
    as_video(signed).sum().backward()
    assert signed.grad is not None and torch.all(signed.grad == 0.5)


@pytest.mark.gpu
def test_gpu_video_stays_there() -> None:
    assert as_video(bytes_video().cuda()).device.type == "cuda"


def test_numpy_strides_byte_orders_and_read_only_arrays() -> None:
    x = bytes_video().permute(0, 2, 3, 1).numpy()
    same(as_video(x[::-1]), torch.from_numpy(x[::-1].copy()).permute(0, 3, 1, 2))
    readonly = x.copy()
    readonly.flags.writeable = False
    same(as_video(readonly), bytes_video())
    same(as_video((x / 255).astype(">f8")), bytes_video(), torch.float64)


def test_gray_is_repeated_and_alpha_is_composited_over_black() -> None:
    x = bytes_video()
    gray = x[:, :1]
    for frames in (gray[:, 0], gray, gray.movedim(1, -1), [PIL.fromarray(f[0].numpy()) for f in gray]):
        same(as_video(frames), gray.expand(-1, 3, -1, -1))
    alpha = torch.randint(0, 256, gray.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    rgba = torch.cat([x, alpha], 1)
    over_black = x.double() * alpha.double() / 255
    last = rgba.permute(0, 2, 3, 1)
    for frames in (rgba, last, last.float() / 255, [PIL.fromarray(f.numpy()) for f in last]):
        same(as_video(frames), over_black)
    # The same palette image with a transparent color: PIL hides alpha in `info`.
    palette = PIL.new("P", (4, 4), 0)
    palette.putpalette([200, 100, 50] * 256)
    palette.info["transparency"] = 0
    assert as_video([palette]).max() == 0


def test_sixteen_bit_pil_is_not_clipped() -> None:
    image = PIL.fromarray(np.full((4, 5), 32768, np.uint16))
    torch.testing.assert_close(as_video([image]), torch.full((1, 3, 4, 5), 32768 / 65535))


def test_rounding_overshoot_is_clamped() -> None:
    unit = bytes_video().float() / 255
    unit[0, 0, 0, 0], unit[0, 0, 0, 1] = -5e-4, 1.02
    got = as_video(unit)
    assert got.min() == 0 and got.max() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("signed", [False, True])
def test_non_finite_frames_stay_non_finite(bad: float, signed: bool) -> None:
    x = bytes_video(2)
    unit = x.float() / 255
    handed = unit * 2 - 1 if signed else unit.clone()
    handed[1, 2] = bad
    got = as_video(handed)
    assert got[1, 2].isnan().all()
    good = torch.ones(2, 5, dtype=torch.bool)
    good[1, 2] = False
    same(got[good], x[good])
    assert as_video(torch.full_like(unit, bad)).isnan().all()


# ---- refused input --------------------------------------------------------------------------------------------------

RGB = torch.linspace(0, 1, 2 * 5 * 3 * 16 * 20).reshape(2, 5, 3, 16, 20)

REFUSED = {
    "two axes may be channels": (RGB[:, :3], "layout="),
    "one frame or one channel": (RGB[:1, :1].transpose(1, 2)[0], "layout="),
    "rows or channels": (torch.rand(5, 3, 16, 4), "layout="),
    "image or short gray video": (RGB[0, 0], "x[None]"),
    "image, channels last": (RGB[0, 0].permute(1, 2, 0), "x[None]"),
    "batch of gray": (torch.rand(2, 5, 16, 20), "layout="),
    "bright (B,3,T,H,W)": (RGB.transpose(1, 2), "value_range="),
    "0..255 in floating point": (RGB * 255, "value_range="),
    "overshoot or signed": (RGB - 0.02, "value_range="),
    "int64 bytes": ((RGB * 255).long(), "value_range="),
    "latents, 4 channels": (torch.randn(2, 4, 5, 16, 20), "VAE"),
    "latents, 4 channels after time": (torch.randn(2, 5, 4, 16, 20), "VAE"),
    "latents, 16 channels": (torch.randn(2, 16, 5, 16, 20), "VAE"),
    "latents, 16 channels after time": (torch.randn(2, 5, 16, 16, 20), "VAE"),
    "latents that look like three channels": (torch.randn(2, 16, 3, 16, 20) * 2, "VAE"),
    "a path": ("video.mp4", "read_video"),
    "one PIL image": (PIL.new("RGB", (8, 8)), "list of images"),
    "nothing": ([], "empty"),
    "no frames": (torch.zeros(0, 3, 8, 8), "empty"),
    "frames of two sizes": ([torch.zeros(8, 8, 3), torch.zeros(8, 9, 3)], "differ"),
    "bool": (torch.zeros(4, 3, 8, 8, dtype=torch.bool), "uint8 or float"),
    "strings": (np.array([["a"]]), "uint8 or float"),
    "PIL of unknown range": ([PIL.new("F", (8, 8))], "value_range="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_remedy(case: str) -> None:
    frames, remedy = REFUSED[case]
    with pytest.raises(VideoError) as caught:
        as_video(frames)
    assert remedy in str(caught.value) and "\n" not in str(caught.value)


def test_ambiguity_is_resolved_by_arguments() -> None:
    assert as_video(RGB[:, :3], layout="BTCHW").shape == (2, 3, 3, 16, 20)
    assert as_video(torch.rand(2, 5, 16, 20), layout="BTHW").shape == (2, 5, 3, 16, 20)
    torch.testing.assert_close(as_video(RGB.transpose(1, 2), value_range=(0, 1)), RGB)
    torch.testing.assert_close(as_video(RGB * 255, value_range=(0, 255)), RGB)
    torch.testing.assert_close(as_video(RGB.transpose(1, 2) * 2 - 1), RGB)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "THW"}, None),
        ({"layout": "XYZ"}, "must name T"),
        ({"layout": "TCHB"}, "must name T"),
        ({"layout": "TBCHW"}, "comes first"),
        ({"layout": "CTHW"}, "puts 5 channels"),
        ({"value_range": (0, 0.2)}, "outside value_range"),
        ({"value_range": (1, 1)}, "two different"),
        ({"min_frames": 6}, "at least 6"),
    ],
)
def test_wrong_arguments_are_detected(options: dict, message: str | None) -> None:
    if message is None:
        assert as_video(RGB, **options).shape == (2, 5, 3, 3, 16, 20)  # gray as given: three videos
        return
    with pytest.raises(VideoError, match=message):
        as_video(RGB[0], **options)


def test_one_frame_is_too_few_for_motion() -> None:
    one = RGB[0, :1]
    assert as_video(one).shape == (1, 3, 16, 20)
    with pytest.raises(VideoError, match="motion lies between frames"):
        as_video(one, min_frames=2)


def test_an_inferred_layout_is_the_only_possible_one() -> None:
    """Over all small shapes: a layout is inferred only if exactly one axis can be the channels."""
    for shape in itertools.product((1, 2, 3, 4, 16), (1, 3, 4, 6), (5, 3), (7, 3, 4)):
        x = torch.linspace(0, 255, int(np.prod(shape))).to(torch.uint8).reshape(shape)
        try:
            got = as_video(x)
        except VideoError:
            continue
        colored = [layout for layout, axis in (("TCHW", -3), ("THWC", -1), ("CTHW", -4)) if shape[axis] == 3]
        assert len(colored) <= 1, shape
        if colored:
            assert torch.equal(got, as_video(x, layout=colored[0])), shape


def test_objects_with_a_known_layout_are_never_ambiguous() -> None:
    """Three frames of three channels, four pixels wide, which are ambiguous as a plain array."""
    x = bytes_video(t=3, h=4, w=4)
    same(as_video(Video(x, None)), x)
    same(as_video([PIL.fromarray(f.permute(1, 2, 0).numpy()) for f in x]), x)
    same(as_video([Video(x, None), Video(x, None)]), torch.stack([x, x]))
