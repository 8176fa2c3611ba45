"""RAFT optical flow, by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.errors import InputError, JidmError, MissingExtraError, did_you_mean, first_line
from jidm.flow.base import (
    Flow,
    check_pair,
    finite_items,
    forward_backward_weight,
    mask_invalid,
    resize_flow,
    resize_images,
)

MODELS = ("raft_large", "raft_small")
_MIN_SIZE = 128  # RAFT's four correlation levels need 16 cells of 8 px
_STRIDE = 8


class RaftFlow:
    """RAFT (Teed and Deng 2020), with forward-backward consistency as confidence.

    Sizes that are not a multiple of 8 are padded by border replication, images below 128 px are enlarged; the flow is
    returned on the input's grid in the input's pixels.

    Args:
        model: "raft_large", "raft_small", or a module with the call signature of torchvision's RAFT.
        weights: a local file (.safetensors, or .pth / .pt with a state dict, never unpickled), or a name of weights in
            torchvision ("DEFAULT", "C_T_SKHT_V2", ...; downloaded from its hub). Not needed with a module.
        iterations: flow updates; fewer are faster.

    Raises:
        MissingExtraError: torchvision is not installed.
        JidmError: torchvision does not fit the installed torch.
        InputError: the weights cannot be read or belong to another model.
    """

    def __init__(
        self, model: str | nn.Module = "raft_large", *, weights: str | Path | None = None, iterations: int = 12
    ) -> None:
        if iterations < 1:
            raise InputError(f"iterations={iterations} must be at least 1")
        self.iterations = iterations
        self.module = (model if isinstance(model, nn.Module) else _build(model, weights)).eval()

    def __call__(self, first: Float[Tensor, "*batch 3 H W"], second: Float[Tensor, "*batch 3 H W"]) -> Flow:
        """Flow from `first` to `second`, RGB in [0, 1], on their device; see `FlowEstimator`. No gradients."""
        check_pair(first, second)
        batch, (height, width) = first.shape[:-3], first.shape[-2:]
        finite = finite_items(first, second).reshape(-1)
        a, b = (_preprocess(x.detach().reshape(-1, 3, height, width)) for x in (first, second))
        self.module.to(first.device)
        flows = [self._estimate_pair(a[k : k + 1], b[k : k + 1], height, width) for k in range(len(a))]
        forward, backward = (
            (torch.stack(x) for x in zip(*flows, strict=True)) if flows else (first.new_zeros(0, 2, height, width),) * 2
        )
        weight = forward_backward_weight(forward, backward)
        flow = mask_invalid(forward.to(first.dtype), weight.to(first.dtype), finite)
        return Flow(flow.flow.reshape(*batch, 2, height, width), flow.weight.reshape(*batch, height, width))

    @torch.no_grad()
    def _estimate_pair(self, first: Tensor, second: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Forward and backward flow (2, H, W) of one item: the correlation volume of a batch would not fit."""
        tall, wide = first.shape[-2:]
        padding = (0, -wide % _STRIDE, 0, -tall % _STRIDE)
        images = torch.nn.functional.pad(torch.cat([first, second]), padding, mode="replicate")
        flow = self.module(images, images.flip(0), num_flow_updates=self.iterations)[-1][..., :tall, :wide]
        forward, backward = resize_flow(flow, height, width) if (tall, wide) != (height, width) else flow
        return forward, backward


def _preprocess(frames: Tensor) -> Tensor:
    """Frames in [-1, 1] float32, enlarged so that no side is below 128 px; zero where not finite."""
    x = frames.to(torch.float32).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0) * 2 - 1
    scale = _MIN_SIZE / min(x.shape[-2:])
    if scale <= 1:
        return x
    height, width = (max(_MIN_SIZE, round(n * scale)) for n in x.shape[-2:])
    return resize_images(x, height, width)


def _build(model: str, weights: str | Path | None) -> nn.Module:
    if model not in MODELS:
        raise InputError(f"unknown RAFT model '{model}'; {did_you_mean(model, MODELS)}")
    if weights is None:
        raise InputError(f"{model} needs weights: pass weights= (a file, or 'DEFAULT' from torchvision's hub)")
    optical_flow = _torchvision_optical_flow()
    path = Path(weights)
    module: nn.Module
    if path.suffix in (".pth", ".pt", ".safetensors") or path.exists():
        module = getattr(optical_flow, model)(weights=None)
        _load(module, path, model)
        return module
    known = getattr(optical_flow, {"raft_large": "Raft_Large_Weights", "raft_small": "Raft_Small_Weights"}[model])
    name = str(weights)
    if name not in known.__members__:
        raise InputError(
            f"no weights file '{name}' and no such weights of {model}: {did_you_mean(name, known.__members__)}"
        )
    try:
        module = getattr(optical_flow, model)(weights=known[name])
    except OSError as error:
        raise InputError(
            f"cannot download the weights '{name}' of {model} ({error}); pass a local file as weights="
        ) from None
    return module


def _torchvision_optical_flow() -> Any:
    try:
        from torchvision.models import optical_flow
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "torchvision":
            raise MissingExtraError("RAFT flow", "torchvision", "raft") from None
        raise
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        # For instance "operator torchvision::nms does not exist": a torchvision built for another torch.
        raise JidmError(
            f"torchvision does not fit torch {torch.__version__} ({first_line(error)}): "
            "install the pair pinned in constraints.txt: pip install -c constraints.txt torch torchvision"
        ) from None
    return optical_flow


def _load(module: nn.Module, path: Path, model: str) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of zip, pickle and safetensors have no common base class
        raise InputError(
            f"{path}: not a readable file of weights ({first_line(error)}); save a plain state dict"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no state dict (names -> tensors); save model.state_dict()")
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: not weights of {model}: {' '.join(str(error).split())[:200]}") from None
