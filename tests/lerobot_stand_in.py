"""A stand-in for LeRobot, written from the protocol of its version 0.6: registry of policies, factories by naming convention,
processors, `rollout` and `eval_policy` over a vectorized environment, and the tick of its rollout on a robot.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn


@dataclass
class PreTrainedConfig:
    registry: ClassVar[dict[str, type]] = {}
    device: str | None = None
    use_amp: bool = False
    input_features: dict[str, Any] = field(default_factory=dict)
    output_features: dict[str, Any] = field(default_factory=dict)
    pretrained_path: str | None = None

    def __post_init__(self) -> None:
        self.device = self.device or "cpu"

    @classmethod
    def register_subclass(cls, name: str) -> Callable[[type], type]:
        def register(subclass: type) -> type:
            cls.registry[name] = subclass
            return subclass

        return register

    @property
    def type(self) -> str:
        return next(name for name, one in self.registry.items() if one is type(self))

    def _save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"type": self.type, **asdict(self)}))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PreTrainedConfig:
        values = json.loads((Path(folder) / "config.json").read_text())
        made: PreTrainedConfig = cls.registry[values.pop("type")](**values)
        return made


class PreTrainedPolicy(nn.Module):
    def __init__(self, config: PreTrainedConfig, *_: Any, **__: Any) -> None:
        super().__init__()
        if not isinstance(config, PreTrainedConfig):
            raise ValueError("config must be a PreTrainedConfig")
        self.config = config

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not getattr(cls, "config_class", None) or not getattr(cls, "name", None):
            raise TypeError(f"{cls.__name__} must define config_class and name")
        for method in ("get_optim_params", "reset", "forward", "predict_action_chunk", "select_action"):
            if method not in vars(cls):
                raise TypeError(f"{cls.__name__} must define {method}")

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        self._save_pretrained(folder)


class Step:
    def __init__(self, **values: Any) -> None:
        self.values = values


class PolicyProcessorPipeline:
    """Its steps are data here: the observation is a batch already, on the CPU."""

    def __init__(self, steps: list[Step], name: str, to_transition: Any = None, to_output: Any = None) -> None:
        self.steps, self.name = steps, name

    def __call__(self, data: Any) -> Any:
        return data

    def reset(self) -> None:
        pass

    def save_pretrained(self, folder: Path) -> None:
        (folder / f"{self.name}.json").write_text(
            json.dumps({"name": self.name, "steps": [x.values for x in self.steps]})
        )


MODULES: dict[str, dict[str, Any]] = {
    "lerobot": {},
    "lerobot.configs": {},
    "lerobot.configs.policies": {"PreTrainedConfig": PreTrainedConfig},
    "lerobot.policies": {},
    "lerobot.policies.pretrained": {"PreTrainedPolicy": PreTrainedPolicy},
    "lerobot.processor": {
        "AddBatchDimensionProcessorStep": Step,
        "DeviceProcessorStep": Step,
        "RenameObservationsProcessorStep": Step,
        "PolicyProcessorPipeline": PolicyProcessorPipeline,
    },
    "lerobot.processor.converters": {"policy_action_to_transition": None, "transition_to_policy_action": None},
    "lerobot.utils": {},
    "lerobot.utils.constants": {
        "POLICY_PREPROCESSOR_DEFAULT_NAME": "policy_preprocessor",
        "POLICY_POSTPROCESSOR_DEFAULT_NAME": "policy_postprocessor",
    },
}


@contextmanager
def installed() -> Iterator[None]:
    """LeRobot can be imported inside; what was imported through it is forgotten afterwards."""
    before = dict(sys.modules)
    for name, values in MODULES.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        vars(module).update(values)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in [x for x in sys.modules if x.split(".")[0] == "lerobot" or x.startswith("jidm.serving.lerobot")]:
            del sys.modules[name]
        sys.modules.update({k: v for k, v in before.items() if k.split(".")[0] == "lerobot"})


def make_policy(config: PreTrainedConfig, **given: Any) -> PreTrainedPolicy:
    """The policy of a configuration: a class `<Name>Policy` in the module `modeling_*` beside `configuration_*`."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    policy_class = getattr(module, type(config).__name__.removesuffix("Config") + "Policy")
    policy = policy_class(config=config, dataset_stats={}, dataset_meta=None, **given)
    policy.to(config.device)
    assert isinstance(policy, nn.Module)
    return policy


def make_pre_post_processors(config: PreTrainedConfig) -> tuple[Any, Any]:
    module = importlib.import_module(type(config).__module__.replace("configuration_", "processor_"))
    pair: tuple[Any, Any] = getattr(module, f"make_{config.type}_pre_post_processors")(config, dataset_stats=None)
    return pair


def rollout(env: Any, policy: Any, before: Any, after: Any) -> dict[str, torch.Tensor]:
    """One episode in every environment of a batch."""
    assert isinstance(policy, nn.Module), "Policy must be a PyTorch nn module."
    policy.reset()
    observation, actions, done, step = env.reset(), [], np.zeros(env.num_envs, bool), 0
    while not done.all() and step < env.max_episode_steps:
        batch = {
            "observation.images.top": torch.from_numpy(observation["pixels"]).permute(0, 3, 1, 2).float(),
            "observation.state": torch.from_numpy(observation["agent_pos"]).float(),
            "task": [""] * env.num_envs,
        }
        with torch.inference_mode():
            action = after(policy.select_action(before(batch)))
        array = action.to("cpu").numpy()
        assert array.ndim == 2, "Action dimensions should be (batch, action_dim)"
        observation, terminated = env.step(array)
        done, step = done | terminated, step + 1
        actions.append(action)
    return {"action": torch.stack(actions, dim=1)}


def eval_policy(env: Any, policy: Any, before: Any, after: Any, n_episodes: int) -> list[torch.Tensor]:
    """Episodes in batches; only policies of LeRobot are accepted."""
    if not isinstance(policy, PreTrainedPolicy):
        raise ValueError(f"Policy of type 'PreTrainedPolicy' is expected, but type '{type(policy)}' was provided.")
    assert policy.training in (True, False)
    policy.eval()
    rounds = -(-n_episodes // env.num_envs)
    return [action for _ in range(rounds) for action in rollout(env, policy, before, after)["action"]][:n_episodes]


class RobotLoop:
    """The rollout on one robot while a data set is recorded: one tick per call."""

    def __init__(self, policy: Any, before: Any, after: Any) -> None:
        self._policy, self._before, self._after = policy, before, after
        self.recorded: list[np.ndarray] = []
        self._task = ""
        policy.reset()

    def tick(self, picture: np.ndarray, state: np.ndarray, task: str = "") -> np.ndarray:
        with torch.inference_mode():
            if task != self._task:
                self._task = task
                self._policy.drop_queued_actions()
            assert not self._policy.config.use_amp
            batch = {
                "observation.images.top": torch.from_numpy(picture).permute(2, 0, 1)[None].float(),
                "observation.state": torch.from_numpy(state)[None].float(),
                "task": task,
                "robot_type": "",
            }
            action = self._after(self._policy.select_action(self._before(batch)))
        self.recorded.append(action.squeeze(0).cpu().numpy())
        return self.recorded[-1]


def config_fields(config: Any) -> set[str]:
    return {x.name for x in fields(config)}
