"""The policy that LeRobot's `rollout`, `eval_policy` and rollout strategies call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from jidm.control import ActionDecoder, ControlConfig, Planner
from jidm.errors import InputError
from jidm.idm import JacobianIDM
from jidm.serving.lerobot.configuration_jidm import JidmConfig
from jidm.serving.lerobot.processor_jidm import make_jidm_pre_post_processors
from jidm.serving.planner_policy import PlannerPolicy


class JidmPolicy(PreTrainedPolicy):
    """A `PlannerPolicy` as a policy of LeRobot.

    Args:
        config: names planner and checkpoint.
        planner: in place of the one that the configuration names.
        make_decoder: in place of decoders of the configuration's checkpoint.

    Raises:
        InputError: the configuration names no planner or no checkpoint, and none is given.
    """

    config_class = JidmConfig
    name = "jidm"

    def __init__(
        self,
        config: JidmConfig,
        *_: Any,
        planner: Planner | None = None,
        make_decoder: Callable[[], ActionDecoder] | None = None,
        **__: Any,
    ) -> None:
        super().__init__(config)
        self._policy = PlannerPolicy(
            planner or _load_planner(config.planner),
            make_decoder or _decoder_factory(config),
            image_key=config.image_key,
            config=config,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **options: Any
    ) -> JidmPolicy:
        """The policy that a folder or hub id describes. Only its configuration is stored there: weights are the checkpoint's."""
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path)
        return cls(config, **options).eval()

    def _save_pretrained(self, save_directory: Path, **_: Any) -> None:
        self.config._save_pretrained(save_directory)
        for processor in make_jidm_pre_post_processors(self.config):
            processor.save_pretrained(save_directory)

    @property
    def problems(self) -> tuple[str | None, ...]:
        """See `PlannerPolicy`."""
        return self._policy.problems

    def reset(self) -> None:
        """Start an episode."""
        self._policy.reset()

    def drop_queued_actions(self) -> None:
        """Generate a new video at the next call."""
        self._policy.drop_queued_actions()

    def select_action(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """(B, n) the next command of each environment, see `PlannerPolicy`."""
        return self._policy.select_action(batch, **options)

    def predict_action_chunk(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """(B, M, n) the commands of one generated video, see `PlannerPolicy`."""
        return self._policy.predict_action_chunk(batch, **options)

    def get_optim_params(self) -> dict[str, Any]:
        """Nothing to train."""
        return {}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        """Refused: nothing is trained here.

        Raises:
            InputError: always.
        """
        raise InputError("this policy is not trained by LeRobot: train its field with `jidm train`")


def _load_planner(path: str) -> Planner:
    module, colon, function = path.partition(":")
    if not (module and colon and function):
        raise InputError(f"policy.planner must be 'package.module:function', got '{path}'")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"policy.planner: {error}") from None
    planner: Planner = make()
    return planner


def _decoder_factory(config: JidmConfig) -> Callable[[], ActionDecoder]:
    if not config.checkpoint:
        raise InputError("policy.checkpoint must name the decoder's checkpoint, for instance panda-sim")
    idm = JacobianIDM.from_pretrained(config.checkpoint, device=config.device or "cpu")
    control = ControlConfig(
        video_rate=config.video_rate, control_rate=config.control_rate, action_space=config.action_space
    )
    return lambda: ActionDecoder(idm, control)
