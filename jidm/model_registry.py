"""The kinds of trainable models, by name, and what a name is enough for: train, load, decode.

The table is data: no model's module is imported before its kind is asked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.checkpoint import Checkpoint, load_checkpoint
from jidm.errors import CheckpointError, InputError, did_you_mean

if TYPE_CHECKING:
    import torch

    from jidm.flow import FlowEstimator
    from jidm.idm import InverseDynamicsModel
    from jidm.robot.embodiment import Embodiment
    from jidm.training.config import TrainConfig
    from jidm.training.model import TrainableModel

KINDS: dict[str, tuple[str, str]] = {
    "jacobian_field": ("jidm.training.trainable_field", "TrainableField"),
    "direct": ("jidm.baselines", "DirectIDM"),
    "direct_on_flow": ("jidm.baselines", "DirectOnFlowIDM"),
    "eva": ("jidm.baselines", "EvaIDM"),
    "eva_average_pool": ("jidm.baselines", "EvaAveragePoolIDM"),
    "vera": ("jidm.baselines", "VeraField"),
}
"""Kind -> (module, class). Every class is a `jidm.training.model.TrainableModel`."""


def model_class(kind: str) -> type[TrainableModel]:
    """The class of that kind.

    Raises:
        InputError: there is no such kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of model '{kind}': {did_you_mean(kind, KINDS)}")
    module, name = KINDS[kind]
    found: type[TrainableModel] = getattr(import_module(module), name)
    return found


def train(config: TrainConfig, **arguments: Any) -> Path:
    """Train a model of the kind `config.kind`; further arguments, result and errors as of
    `jidm.training.train.train`."""
    from jidm.training.train import train as train_model

    return train_model(config, model_class(config.kind), **arguments)


def load_model(source: str | Path | Checkpoint) -> TrainableModel:
    """A trained model, in evaluation mode, on the CPU.

    Args:
        source: a checkpoint folder, the name of a bundled one, a hub id, or a checkpoint that is already read.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit its kind.
    """
    from jidm.training.model import restore

    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    if checkpoint.kind not in KINDS:
        raise CheckpointError(
            f"{checkpoint.source}: unknown kind of model '{checkpoint.kind}': {did_you_mean(checkpoint.kind, KINDS)}"
        )
    return restore(checkpoint, model_class(checkpoint.kind))


def load_idm(
    source: str | Path | Checkpoint,
    *,
    embodiment: str | Embodiment | None = None,
    flow: str | FlowEstimator | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> InverseDynamicsModel:
    """An inverse dynamics model that decodes video: a `JacobianIDM` for a field, a `BaselineIDM` for the others.

    Args:
        source: as for `load_model`.
        embodiment: the robot, as for `load_embodiment`; refused if the checkpoint was trained for another.
        flow: estimator that measures the motion in place of the model's own way.
        device: where the network computes.
        options: further arguments of `JacobianIDM.from_pretrained`; there are none for baselines.

    Raises:
        CheckpointError: as for `load_model`, or it was trained for another robot.
        InputError: the model takes no flow estimator.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    if checkpoint.kind == "jacobian_field":
        from jidm.idm import JacobianIDM

        return JacobianIDM.from_pretrained(checkpoint, embodiment=embodiment, flow=flow, device=device, **options)
    from jidm.baselines import Baseline, BaselineIDM

    if embodiment is not None:
        from jidm.robot.registry import load_embodiment

        checkpoint.check_embodiment(load_embodiment(embodiment))
    model = load_model(checkpoint)
    if not isinstance(model, Baseline):
        raise InputError(f"{checkpoint.source}: a {checkpoint.kind} decodes no video")
    name = f"{checkpoint.source} ({checkpoint.content_hash[:12]})"
    return BaselineIDM(model.to(device), flow=flow, source=name, **options)
