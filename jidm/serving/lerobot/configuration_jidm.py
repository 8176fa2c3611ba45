"""Configuration of the policy for LeRobot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot.configs.policies import PreTrainedConfig

from jidm.errors import InputError


@PreTrainedConfig.register_subclass("jidm")
@dataclass
class JidmConfig(PreTrainedConfig):
    """Planner and decoder of a policy.

    Attributes:
        planner: "package.module:function"; the function takes no arguments and returns a planner, see
            `jidm.control.Planner`. Not needed if the policy is made with planner=.
        checkpoint: of the decoder's field: a folder, the name of a bundled one, or a hub id.
        image_key: camera that the planner continues; may be omitted if there is only one.
        video_rate, control_rate, action_space: as in `jidm.control.ControlConfig`.
    """

    planner: str = ""
    checkpoint: str = ""
    image_key: str | None = None
    video_rate: float = 12.5
    control_rate: float = 50.0
    action_space: str = "joint_velocity"

    @property
    def observation_delta_indices(self) -> None:
        """None: only the latest observation is used."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """None: it is not trained."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """None: it is not trained."""
        return None

    def validate_features(self) -> None:
        """Accept all features: the batch is checked when it comes."""

    def get_optimizer_preset(self) -> Any:
        """Refused: nothing is trained here.

        Raises:
            InputError: always.
        """
        raise InputError("this policy is not trained by LeRobot: train its field with `jidm train`")

    def get_scheduler_preset(self) -> None:
        """None: it is not trained."""
        return None
