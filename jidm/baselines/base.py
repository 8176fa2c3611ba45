"""What all baselines have in common: a config, scales taken from the training data, saving, loading, steps of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.checkpoint import RobotDescription, embodiment_record, save_checkpoint
from jidm.errors import CheckpointError, InputError, did_you_mean
from jidm.training.data.batch import JointStats, PairBatch

_MULTIPLE = 16  # the coarsest level of the trunks [px of the picture]

ConfigT = TypeVar("ConfigT", bound="BaselineConfig")
ModelT = TypeVar("ModelT", bound="Baseline")


@dataclass(frozen=True)
class BaselineConfig:
    """What a baseline is made for; the options of each kind follow in its own config.

    Attributes:
        joint_names, joint_types: of the n joints, the order of every joint axis.
        height, width: of the pictures it reads [px], multiples of 16.
        q_mean, q_std: mean and standard deviation of the training poses, per joint [rad or m].
        delta_std: standard deviation of the training steps, per joint [rad or m].
        q_lower, q_upper: range of the training poses, per joint [rad or m].
        size: of the network; each kind says which there are.
    """

    joint_names: tuple[str, ...]
    joint_types: tuple[str, ...]
    height: int
    width: int
    q_mean: tuple[float, ...]
    q_std: tuple[float, ...]
    delta_std: tuple[float, ...]
    q_lower: tuple[float, ...]
    q_upper: tuple[float, ...]
    size: str = "tiny"

    SIZES: ClassVar[tuple[str, ...]] = ("tiny", "small", "base")

    def __post_init__(self) -> None:
        n = len(self.joint_names)
        for name in ("joint_types", "q_mean", "q_std", "delta_std", "q_lower", "q_upper"):
            if len(getattr(self, name)) != n:
                raise InputError(f"{name} has {len(getattr(self, name))} entries for {n} joints; give one per joint")
        scales = ("q_mean", "q_std", "delta_std", "q_lower", "q_upper")
        if bad := [name for name in scales if not all(math.isfinite(x) for x in getattr(self, name))]:
            raise InputError(f"{', '.join(bad)} must be finite; check the recorded joint positions")
        if n == 0 or min(*self.q_std, *self.delta_std) <= 0:
            raise InputError("a baseline needs joints, each with a positive q_std and delta_std")
        if self.height % _MULTIPLE or self.width % _MULTIPLE or min(self.height, self.width) < 2 * _MULTIPLE:
            raise InputError(
                f"height and width must be multiples of {_MULTIPLE} and at least {2 * _MULTIPLE}, "
                f"got {self.height} x {self.width}; resize the pictures"
            )
        check_choice("size", self.size, self.SIZES)

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.joint_names)

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """The inverse of `dataclasses.asdict`, from JSON.

        Raises:
            CheckpointError: an entry is unknown or missing.
        """
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise CheckpointError(f"{cls.__name__} has no entries {', '.join(unknown)}; another version wrote them")
        try:
            made: Any = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
            return cls(**made)
        except TypeError as error:
            raise CheckpointError(f"{cls.__name__} is incomplete: {error}; train the model again") from None


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise InputError(f"unknown {option} '{value}'; {did_you_mean(value, known)}")


@dataclass(frozen=True, eq=False)
class BidirectionalFlow:
    """What moved between the pictures of B pairs, on the grid (h, w) = (H / 4, W / 4), in px of the (H, W) picture.

    Attributes:
        flow: (B, 2, h, w) from first to second, on first's grid; weight: (B, h, w) its confidence, >= 0, 0 = unknown.
        flow_back, weight_back: from second to first, on second's grid; None where nothing measured it.
    """

    flow: Float[Tensor, "B 2 h w"]
    weight: Float[Tensor, "B h w"]
    flow_back: Float[Tensor, "B 2 h w"] | None = None
    weight_back: Float[Tensor, "B h w"] | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """Joint steps of B pairs, and how well they explain the motion seen.

    Attributes:
        delta_q: (B, n) [rad or m].
        residual: (B,) motion that the step leaves unexplained [px rms]; None for a model that cannot tell.
        explained_fraction: (B,) share of the motion that it explains, in [0, 1]; None likewise.
    """

    delta_q: Float[Tensor, "B n"]
    residual: Float[Tensor, " B"] | None = None
    explained_fraction: Float[Tensor, " B"] | None = None


class Baseline(nn.Module):
    """A trainable inverse dynamics model. Children say `kind`, `Config`, `losses` and `measure`."""

    kind: ClassVar[str]
    Config: ClassVar[type[BaselineConfig]]
    q_mean: Tensor
    q_std: Tensor
    delta_std: Tensor

    def __init__(self, config: BaselineConfig) -> None:
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
        """Name of the flow estimator that decoding asks; None for a model that needs none."""
        return None

    @classmethod
    def from_config(cls: type[ModelT], config: BaselineConfig | Mapping[str, Any]) -> ModelT:
        """An untrained model from its config or the config's JSON form."""
        return cls(config if isinstance(config, cls.Config) else cls.Config.from_dict(config))  # type: ignore[arg-type]

    @classmethod
    def from_data(
        cls: type[ModelT], joint_names: Sequence[str], joint_types: Sequence[str], height: int, width: int,
        stats: JointStats, **options: Any,
    ) -> ModelT:  # fmt: skip
        """An untrained model for recordings of that size and those joint statistics.

        Raises:
            InputError: an option is unknown to this kind, or a value cannot be used.
        """
        known = {f.name for f in fields(cls.Config)}
        if unknown := sorted(set(options) - known):
            raise InputError(f"{cls.kind} has no option '{unknown[0]}'; {did_you_mean(unknown[0], known)}")
        return cls(
            cls.Config(
                tuple(joint_names), tuple(joint_types), height, width, stats.q_mean, stats.q_std, stats.delta_std,
                stats.q_lower, stats.q_upper, **options,
            )
        )  # fmt: skip

    def losses(self, batch: PairBatch) -> dict[str, Float[Tensor, ""]]:
        """Scalar parts of the loss; "loss" is what to minimise."""
        raise NotImplementedError

    def predict(
        self,
        first: Float[Tensor, "B 3 H W"],
        second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
        motion: BidirectionalFlow | None = None,
    ) -> Prediction:
        """Joint steps of pairs of frames at the config's size, RGB in [0, 1].

        Args:
            before: the frames one step before `first`, for models that look at three.
            motion: flow measured elsewhere, in place of asking the estimator.
        """
        raise NotImplementedError

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B n"]:  # fmt: skip
        """Joint steps of unrelated pairs of frames [rad or m], arguments as for `measure`."""
        return self.predict(first, second, before).delta_q

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        embodiment: RobotDescription | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `config.json` and `model.safetensors` into a folder; whole or not at all."""
        return save_checkpoint(
            folder,
            kind=self.kind,
            config=asdict(self.config),
            tensors=self.state_dict(),
            embodiment=None if embodiment is None else embodiment_record(embodiment),
            training=training or {},
        )

    @classmethod
    def from_pretrained(cls: type[ModelT], where: str | Path) -> ModelT:
        """A trained model of this kind, in evaluation mode; `where` as for `jidm.checkpoint.load_checkpoint`.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another kind.
        """
        from jidm.model_registry import load_model

        model = load_model(where)
        if not isinstance(model, cls):
            raise CheckpointError(f"{where}: holds a {getattr(model, 'kind', '?')}, not a {cls.kind}; use load_idm")
        return model
