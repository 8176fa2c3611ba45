"""What all baselines have in common: the interface of training and decoding, saving and loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.checkpoint import RobotDescription, embodiment_record, load_checkpoint, save_checkpoint
from jidm.errors import CheckpointError
from jidm.fields.free.config import ModelConfig
from jidm.flow import Flow
from jidm.training.model import TrainableModel, restore

ModelT = TypeVar("ModelT", bound="Baseline")

BidirectionalFlow = tuple[Flow, Flow]
"""Flow of B pairs from first to second and back, each (B, 2, h, w) on the grid (h, w) = (H / 4, W / 4) of its first
image, in px of the (H, W) image; weights (B, h, w) are >= 0, 0 = unknown."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Joint steps of B pairs, and how well they explain the observed flow.

    Attributes:
        delta_q: (B, n) [rad or m].
        residual: (B,) flow that the step leaves unexplained [px rms]; None for a model that does not measure it.
        explained_fraction: (B,) share of the flow that the step explains, in [0, 1]; None likewise.
    """

    delta_q: Float[Tensor, "B n"]
    residual: Float[Tensor, " B"] | None = None
    explained_fraction: Float[Tensor, " B"] | None = None


class Baseline(TrainableModel):
    """An inverse dynamics model by others. Subclasses define `kind`, `Config`, `losses` and `predict`."""

    predicts_positions: ClassVar[bool] = False
    """Whether it regresses absolute joint positions, by `positions`; its steps are their differences."""
    measured: ClassVar[tuple[str, ...]] = ()
    """Fields of `JointMotion` that `predict` measures, besides the step."""
    q_mean: Tensor
    q_std: Tensor
    delta_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("q_mean", "q_std", "delta_std"):
            values = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every joint axis."""
        return self.config.joint_names

    @property
    def flow_estimator(self) -> str | None:
        """Name of the flow estimator that decoding uses; None for a model that needs none."""
        return None

    def predict(
        self,
        first: Float[Tensor, "B 3 H W"],
        second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
        motion: BidirectionalFlow | None = None,
    ) -> Prediction:
        """Joint steps of pairs of frames of the config's size, RGB in [0, 1].

        Args:
            before: the frames one step before `first`, for models that read three.
            motion: flow measured elsewhere, in place of the model's estimator.
        """
        raise NotImplementedError

    def positions(
        self, before: Float[Tensor, "B 3 H W"], current: Float[Tensor, "B 3 H W"], after: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B n"]:
        """Joint positions in the middle of three frames [rad or m], if `predicts_positions`."""
        raise NotImplementedError

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B n"]:  # fmt: skip
        """Joint steps of unrelated pairs of frames [rad or m]; arguments as for `predict`."""
        return self.predict(first, second, before).delta_q

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        embodiment: RobotDescription | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `config.json` and `model.safetensors` into a folder, which appears whole or not at all."""
        return save_checkpoint(
            folder,
            kind=self.kind,
            config=asdict(self.config),
            tensors=self.state_dict(),
            embodiment=None if embodiment is None else embodiment_record(embodiment),
            training=training or {},
        )

    @classmethod
    def from_pretrained(cls: type[ModelT], source: str | Path) -> ModelT:
        """A trained model of this kind, in evaluation mode; `source` as for `jidm.checkpoint.load_checkpoint`.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another kind.
        """
        checkpoint = load_checkpoint(source)
        if checkpoint.kind != cls.kind:
            raise CheckpointError(
                f"{source}: holds a model of kind '{checkpoint.kind}', not '{cls.kind}'; load it with "
                "jidm.model_registry.load_idm"
            )
        return restore(checkpoint, cls)
