"""What training asks of a model, and how a trained one is read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from jidm.checkpoint import Checkpoint
from jidm.errors import CheckpointError, InputError, did_you_mean
from jidm.fields.free.config import ModelConfig
from jidm.training.data.batch import JointStats, PairBatch
from jidm.training.data.clips import Clip

ModelT = TypeVar("ModelT", bound="TrainableModel")


class TrainableModel(nn.Module):
    """A network that can be trained on pairs of frames. Subclasses define `kind`, `Config`, `losses` and
    `predict_steps`."""

    kind: ClassVar[str]
    Config: ClassVar[type[ModelConfig]]
    extra_frames: ClassVar[tuple[str, ...]] = ()
    """Frames that it learns from besides the pair: "before", the one before the first, or none."""
    progress = 1.0
    """Fraction of the training budget that is used up, for models that learn their parts one after the other."""

    @classmethod
    def from_config(cls: type[ModelT], config: Any) -> ModelT:
        """An untrained model from its config or the config's JSON form."""
        return cls(config if isinstance(config, cls.Config) else cls.Config.from_dict(config))

    @classmethod
    def from_data(
        cls: type[ModelT], joint_names: Sequence[str], joint_types: Sequence[str], height: int, width: int,
        stats: JointStats, **options: Any,
    ) -> ModelT:  # fmt: skip
        """An untrained model for recordings of that image size [px] and those joint statistics.

        Args:
            options: further entries of `Config`.

        Raises:
            InputError: an option is unknown to this kind, or a value cannot be used.
        """
        return cls(cls.make_config(joint_names, joint_types, height, width, stats, **options))

    @classmethod
    def make_config(
        cls, joint_names: Sequence[str], joint_types: Sequence[str], height: int, width: int, stats: JointStats,
        **options: Any,
    ) -> Any:  # fmt: skip
        """The config that `from_data` builds the model from; arguments and errors as there."""
        known = {f.name for f in fields(cls.Config)}
        if unknown := sorted(set(options) - known):
            raise InputError(f"{cls.kind} has no option '{unknown[0]}'; {did_you_mean(unknown[0], known)}")
        return cls.Config(
            tuple(joint_names), tuple(joint_types), height, width, stats.q_mean, stats.q_std, stats.delta_std,
            stats.q_lower, stats.q_upper, **options,
        )  # fmt: skip

    def losses(self, batch: PairBatch) -> dict[str, Float[Tensor, ""]]:
        """Scalar terms of the loss; "loss" is the one to minimize."""
        raise NotImplementedError

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B n"]:  # fmt: skip
        """Joint steps [rad or m] of unrelated pairs of frames.

        Args:
            first, second: RGB in [0, 1], of the config's `input_size`.
            before: the frames one step before `first`, for models that read three.
        """
        raise NotImplementedError


@runtime_checkable
class Calibratable(Protocol):
    """A model that estimates its own errors, and has these estimates scaled on data that it was not trained on."""

    def calibrate_uncertainty(self, batches: Iterable[PairBatch], rounds: int) -> None:
        """Scale the uncertainty of single steps; more rounds are more exact."""
        ...

    def calibrate_video_uncertainty(self, clips: Iterable[Clip]) -> None:
        """Scale the uncertainty of steps in a video."""
        ...


def restore(checkpoint: Checkpoint, model_class: type[ModelT]) -> ModelT:
    """A trained model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: config or weights do not belong to this class.
    """
    try:
        model = model_class.from_config(checkpoint.config)
    except (InputError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.source}: its config does not make a {checkpoint.kind}: {error}") from error
    checkpoint.load_into(model)
    return model.eval()
