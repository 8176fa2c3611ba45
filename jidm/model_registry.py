"""Which trainable models there are, by kind. A table is data: nothing is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from jidm.checkpoint import Checkpoint, load_checkpoint
from jidm.errors import CheckpointError, InputError, did_you_mean

KINDS: dict[str, tuple[str, str]] = {
    "jacobian_field": ("jidm.training.losses", "TrainableField"),
    "direct": ("jidm.baselines", "DirectIDM"),
    "direct_on_flow": ("jidm.baselines", "DirectOnFlowIDM"),
    "eva": ("jidm.baselines", "EvaIDM"),
    "eva_average_pool": ("jidm.baselines", "EvaAveragePoolIDM"),
    "vera": ("jidm.baselines", "VeraField"),
}
"""Kind -> (module, class). Every class has `kind`, `config`, `losses(batch)`, `from_data(...)` and `from_config(...)`."""


_EXTRA_FRAMES = {"eva": ("before",), "eva_average_pool": ("before",)}


def extra_frames(kind: str) -> tuple[str, ...]:
    """Which frames a model learns from besides the pair: "before", "third", both or none.

    A class may say so itself in `declared`.
    """
    model: Any = model_class(kind)
    if (declared := getattr(model, "wants", None)) is not None:
        return tuple(declared)
    composition = getattr(getattr(model, "weights", None), "compose", 0.0) > 0
    return (*_EXTRA_FRAMES.get(kind, ()), *("third",) * composition)


def model_class(kind: str) -> Any:
    """The class of that kind.

    Raises:
        InputError: there is no such kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of model '{kind}': {did_you_mean(kind, KINDS)}")
    module, name = KINDS[kind]
    return getattr(import_module(module), name)


def build_model(kind: str, config: dict[str, Any]) -> nn.Module:
    """An untrained model of that kind from the JSON form of its config.

    Raises:
        InputError: unknown kind, or the config is not one of this kind.
    """
    model: nn.Module = model_class(kind).from_config(config)
    return model


def load_model(where: str | Path | Checkpoint) -> nn.Module:
    """A trained model, in evaluation mode, on the CPU; `where` as for `load_checkpoint`, or a checkpoint already read.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit its kind.
    """
    checkpoint = where if isinstance(where, Checkpoint) else load_checkpoint(where)
    if checkpoint.kind not in KINDS:
        raise CheckpointError(
            f"{checkpoint.source}: unknown kind of model '{checkpoint.kind}': {did_you_mean(checkpoint.kind, KINDS)}"
        )
    try:
        model = build_model(checkpoint.kind, checkpoint.config)
    except (InputError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.source}: its config does not make a {checkpoint.kind}: {error}") from error
    checkpoint.load_into(model)
    return model.eval()


def load_idm(where: str | Path | Checkpoint, **options: Any) -> Any:
    """What decodes a video with a trained model: a JacobianIDM for ours, a BaselineIDM for the others.

    Raises:
        CheckpointError: as for `load_model`.
    """
    checkpoint = where if isinstance(where, Checkpoint) else load_checkpoint(where)
    if checkpoint.kind == "jacobian_field":
        from jidm.idm import JacobianIDM

        return JacobianIDM.from_pretrained(checkpoint, **options)
    return import_module("jidm.baselines.idm").BaselineIDM.from_pretrained(checkpoint, **options)
