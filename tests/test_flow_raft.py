"""RAFT: equal to torchvision's network, weights from files, and sizes the network does not support."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jidm.errors import InputError, JidmError, MissingExtraError
from jidm.flow import RaftFlow, as_flow_estimator, resize_flow


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, Path]]:
    """torchvision's raft_small with random weights, and these weights in files."""
    optical_flow = pytest.importorskip("torchvision.models.optical_flow")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = optical_flow.raft_small(weights=None).eval()
    folder = tmp_path_factory.mktemp("raft")
    torch.save(model.state_dict(), folder / "small.pth")
    save_file(model.state_dict(), folder / "small.safetensors")
    yield model, folder


def frames(*batch: int, height: int = 128, width: int = 136) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(*batch, 3, height, width, generator=g), torch.rand(*batch, 3, height, width, generator=g)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_equals_torchvisions_raft(small: tuple[nn.Module, Path], suffix: str) -> None:
    model, folder = small
    a, b = frames()
    estimator = RaftFlow("raft_small", weights=folder / f"small.{suffix}", iterations=3)
    assert as_flow_estimator(estimator) is estimator
    answer = estimator(a, b)
    with torch.no_grad():
        truth = model(a[None] * 2 - 1, b[None] * 2 - 1, num_flow_updates=3)[-1][0]
    torch.testing.assert_close(answer.flow, truth, atol=1e-3, rtol=1e-3)
    assert (answer.weight >= 0).all() and (answer.weight <= 1).all()


@pytest.mark.slow
def test_raft_large_equals_torchvisions(tmp_path: Path) -> None:
    optical_flow = pytest.importorskip("torchvision.models.optical_flow")
    torch.manual_seed(0)
    model = optical_flow.raft_large(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / "large.pt")
    a, b = frames()
    with torch.no_grad():
        truth = model(a[None] * 2 - 1, b[None] * 2 - 1, num_flow_updates=2)[-1][0]
    answer = RaftFlow(weights=tmp_path / "large.pt", iterations=2)(a, b)
    torch.testing.assert_close(answer.flow, truth, atol=1e-3, rtol=1e-3)


def test_batches_non_finite_frames_and_dtypes(small: tuple[nn.Module, Path]) -> None:
    estimator = RaftFlow("raft_small", weights=small[1] / "small.pth", iterations=1)
    a, b = frames(2, height=37, width=50)
    whole = estimator(a, b)
    assert whole.flow.shape == (2, 2, 37, 50)
    for k in range(2):
        single = estimator(a[k], b[k])
        torch.testing.assert_close(whole.flow[k], single.flow)
        torch.testing.assert_close(whole.weight[k], single.weight)
    a[0, 0, 3, 3] = torch.nan
    answer = estimator(a.double(), b.double())
    assert answer.flow.dtype == torch.float64 and (answer.flow[0] == 0).all() and (answer.weight[0] == 0).all()
    torch.testing.assert_close(answer.flow[1].float(), whole.flow[1])
    assert estimator(a[:0], b[:0]).flow.shape == (0, 2, 37, 50)


class Known(nn.Module):
    """A fake RAFT that returns the true motion and refuses the sizes that RAFT refuses."""

    def __init__(self, share: tuple[float, float]) -> None:
        super().__init__()
        self.share, self.picture = share, (0, 0)

    def forward(self, first: Tensor, second: Tensor, num_flow_updates: int) -> list[Tensor]:
        n, _, height, width = first.shape
        assert height % 8 == 0 and width % 8 == 0 and min(height, width) >= 128 and first.abs().max() <= 1
        # The motion is a share of the image size without the padding.
        per_pixel = torch.tensor([self.share[0] * self.picture[1], self.share[1] * self.picture[0]])
        sign = torch.tensor([1.0, -1.0])[:, None, None, None]
        return [(sign * per_pixel[None, :, None, None]).expand(n, 2, height, width)]


@pytest.mark.parametrize("size", [(128, 136), (131, 200), (40, 50), (64, 300), (150, 33)])
def test_unsupported_sizes_are_resized_and_flow_is_in_the_inputs_pixels(size: tuple[int, int]) -> None:
    model = Known((0.02, -0.01))
    enlarge = max(1.0, 128 / min(size))
    model.picture = tuple(max(128, round(n * enlarge)) if enlarge > 1 else n for n in size)
    answer = RaftFlow(model)(*frames(height=size[0], width=size[1]))
    torch.testing.assert_close(answer.flow[0], torch.full(size, 0.02 * size[1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer.flow[1], torch.full(size, -0.01 * size[0]), atol=1e-4, rtol=1e-4)
    assert answer.weight[size[0] // 2, size[1] // 2] > 0.99 and (answer.weight[:, -1] == 0).all()


def test_wrong_weights_are_named(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    folder = small[1]
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "dict.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")  # a pickled object: never unpickled
    cases = [
        ("raft_large", folder / "small.pth", "not weights of raft_large"),
        ("raft_small", tmp_path / "absent.pth", "no such weights file"),
        ("raft_small", tmp_path / "text.pth", "not a readable file"),
        ("raft_small", tmp_path / "text.safetensors", "not a readable file"),
        ("raft_small", tmp_path / "dict.pth", "state dict"),
        ("raft_small", tmp_path / "module.pth", "not a readable file"),
        ("raft_small", "C_T_V9", "C_T_V2"),
        ("raft_small", None, "pass weights="),
        ("raft_smal", "DEFAULT", "did you mean 'raft_small'"),
    ]
    for model, weights, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            RaftFlow(model, weights=weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="iterations"):
        RaftFlow("raft_small", weights=folder / "small.pth", iterations=0)


class Refusing:
    """An import hook that makes `import torchvision` fail in a chosen way."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "torchvision":
            raise self.error


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), MissingExtraError, r"\[raft\]"),
        (RuntimeError("operator torchvision::nms does not exist"), JidmError, r"nms does not exist.*constraints\.txt"),
        (AttributeError("partially initialized module 'torchvision'"), JidmError, r"constraints\.txt"),
    ],
)
def test_missing_or_mismatched_torchvision(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refusing(error), *sys.meta_path])
    with pytest.raises(kind, match=message):
        RaftFlow("raft_small", weights="DEFAULT")


def test_torchvision_is_imported_on_use_only() -> None:
    program = (
        "import sys, jidm.flow, jidm.video.io; print([m for m in ('torchvision', 'cv2', 'av') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


def test_resize_flow_scales_the_channels() -> None:
    """A frequent bug of RAFT wrappers: the grid is resized, the displacements are not scaled."""
    flow = torch.ones(2, 16, 16)
    assert torch.equal(resize_flow(flow, 8, 32)[0], torch.full((8, 32), 2.0))
    assert torch.equal(resize_flow(flow, 8, 32)[1], torch.full((8, 32), 0.5))
