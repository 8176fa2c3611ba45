"""Precomputed flow: arrays, Middlebury and KITTI files, against independent readers."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import material

from jidm.errors import InputError
from jidm.flow import PrecomputedFlow, read_flow


def write_flo(path: Path, flow: np.ndarray) -> Path:
    """(H, W, 2) written by the specification, number by number."""
    height, width, _ = flow.shape
    with path.open("wb") as f:
        f.write(b"PIEH" + struct.pack("<ii", width, height))
        for row in flow:
            for u, v in row:
                f.write(struct.pack("<ff", u, v))
    return path


def test_middlebury_by_the_specification(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(size=(4, 7, 2)).astype(np.float32)
    flow[1, 2] = 1e10  # "unknown"
    got = read_flow(write_flo(tmp_path / "x.flo", flow))
    assert got.flow.shape == (2, 4, 7)
    known = np.ones((4, 7), bool)
    known[1, 2] = False
    np.testing.assert_array_equal(got.weight.numpy(), known)
    np.testing.assert_array_equal(got.flow.permute(1, 2, 0).numpy(), np.where(known[..., None], flow, 0))


def test_third_party_middlebury() -> None:
    path = material("flow_gt") / "Middlebury_flow_gt.flo"
    got, data = read_flow(path), path.read_bytes()
    width, height = struct.unpack_from("<ii", data, 4)
    assert got.flow.shape == (2, height, width)
    for row, column in [(0, 0), (100, 200), (height - 1, width - 1), (17, 311)]:
        uv = struct.unpack_from("<ff", data, 12 + 8 * (row * width + column))
        unknown = max(map(abs, uv)) > 1e9
        assert got.weight[row, column] == (not unknown)
        assert got.flow[:, row, column].tolist() == ([0, 0] if unknown else list(uv))
    assert 0 < float((got.weight == 0).float().mean()) < 0.2 and got.flow.abs().max() < 20


def test_third_party_kitti_against_another_reader() -> None:
    import av

    path = material("flow_gt") / "KITTI_flow_gt.png"
    got = read_flow(path)
    with av.open(str(path)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb48le").astype(np.float64)
    u, v, known = (image[..., 0] - 32768) / 64, (image[..., 1] - 32768) / 64, image[..., 2] > 0
    np.testing.assert_array_equal(got.weight.numpy() > 0, known)
    np.testing.assert_allclose(got.flow[0].numpy(), u * known, atol=1e-6)
    np.testing.assert_allclose(got.flow[1].numpy(), v * known, atol=1e-6)
    assert 0.1 < known.mean() < 0.9


def test_arrays_on_disk(tmp_path: Path) -> None:
    flow, weight = np.random.default_rng(0).normal(size=(3, 2, 5, 6)), np.random.default_rng(1).random((3, 5, 6))
    np.save(tmp_path / "a.npy", flow)
    np.savez(tmp_path / "b.npz", flow=np.moveaxis(flow, 1, -1), weight=weight)
    plain, weighted = read_flow(tmp_path / "a.npy"), read_flow(tmp_path / "b.npz")
    assert torch.equal(plain.flow, weighted.flow) and plain.flow.dtype == torch.float64
    assert (plain.weight == 1).all() and torch.equal(weighted.weight, torch.from_numpy(weight))
    assert len(PrecomputedFlow.from_files(tmp_path / "a.npy")) == 3
    for k in range(3):
        write_flo(tmp_path / f"{k}.flo", np.moveaxis(flow[k], 0, -1))
    listed = PrecomputedFlow.from_files([tmp_path / f"{k}.flo" for k in range(3)])
    torch.testing.assert_close(listed.flow.flow.double(), torch.from_numpy(flow), atol=1e-6, rtol=0)


def test_broken_files_are_named(tmp_path: Path) -> None:
    import cv2

    whole = write_flo(tmp_path / "x.flo", np.zeros((4, 5, 2), np.float32)).read_bytes()
    (tmp_path / "short.flo").write_bytes(whole[:-3])
    (tmp_path / "tag.flo").write_bytes(b"PIEX" + whole[4:])
    (tmp_path / "empty.flo").write_bytes(b"")
    (tmp_path / "huge.flo").write_bytes(whole[:4] + struct.pack("<ii", 2**30, 2**30))
    (tmp_path / "text.npy").write_text("no")
    (tmp_path / "text.png").write_text("no")
    cv2.imwrite(str(tmp_path / "eight.png"), np.zeros((4, 5, 3), np.uint8))
    np.savez(tmp_path / "other.npz", motion=np.zeros((2, 4, 5)))
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "shape.npy", np.zeros((3, 4, 5)))
    (tmp_path / "x.jpg").write_bytes(b"no")
    names = [
        "short.flo",
        "tag.flo",
        "empty.flo",
        "huge.flo",
        "text.npy",
        "text.png",
        "eight.png",
        "other.npz",
        "object.npy",
    ]
    for name in [*names, "shape.npy", "x.jpg", "absent.flo"]:
        with pytest.raises(InputError) as caught:
            read_flow(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_precomputed_flow_of_all_pairs_or_one(batch: tuple[int, ...]) -> None:
    flow = torch.randn(*batch, 4, 2, 5, 6)
    weight = torch.rand(*batch, 4, 5, 6)
    source = PrecomputedFlow(flow.movedim(-3, -1).numpy(), weight, layout="HW2")
    first = torch.rand(*batch, 4, 3, 5, 6)
    whole = source(first, first)
    assert torch.equal(whole.flow, flow) and torch.equal(whole.weight, weight)
    one = source.between(first[..., 1, :, :, :], first[..., 2, :, :, :], 1, 2)
    assert torch.equal(one.flow, flow[..., 1, :, :, :]) and torch.equal(one.weight, weight[..., 1, :, :])
    assert source(first.double(), first.double()).flow.dtype == torch.float64
    for start, stop in [(0, 2), (4, 5), (-1, 0), (2, 1)]:
        with pytest.raises(InputError, match="steps of one frame"):
            source.between(first[..., 0, :, :, :], first[..., 0, :, :, :], start, stop)
    with pytest.raises(InputError, match="resize"):
        source(first[..., :-1], first[..., :-1])


def test_precomputed_flow_masks_nan() -> None:
    flow = torch.ones(3, 2, 5, 6)
    flow[1, 0, 2, 2] = torch.nan
    video = torch.rand(4, 3, 5, 6)
    video[3, 0, 0, 0] = torch.inf
    answer = PrecomputedFlow(flow)(video[:-1], video[1:])
    assert answer.flow.isfinite().all() and answer.weight.sum((-1, -2)).tolist() == [30, 29, 0]


def test_layout_is_given_or_unambiguous() -> None:
    for shape, layout in [((3, 2, 5, 2), None), ((3, 4, 5, 6), None), ((3, 2, 5, 6), "HW2")]:
        with pytest.raises(InputError, match=r"layout|displacements"):
            PrecomputedFlow(torch.zeros(shape), layout=layout)  # type: ignore[arg-type]
    assert PrecomputedFlow(torch.zeros(3, 2, 5, 2), layout="2HW").flow.flow.shape == (3, 2, 5, 2)
    with pytest.raises(InputError, match="flow\\[None\\]"):
        PrecomputedFlow(torch.zeros(2, 5, 6))
    with pytest.raises(InputError, match="weight of shape"):
        PrecomputedFlow(torch.zeros(3, 2, 5, 6), torch.zeros(5, 6))
    with pytest.raises(InputError, match="floating"):
        PrecomputedFlow(torch.zeros(3, 2, 5, 6, dtype=torch.int64))
