"""From a data set and a configuration to batches, an untrained model, and a record of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jidm.checkpoint import embodiment_record
from jidm.datasets.episode_selection import describe_episodes, select_episodes
from jidm.datasets.feature import generic_joint_names
from jidm.errors import DatasetError, InputError, JidmError
from jidm.fields.free.config import ENCODER_STRIDE
from jidm.fields.free.network import LearnedField
from jidm.flow.dis import DisFlow
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import load_embodiment
from jidm.training.config import TrainConfig
from jidm.training.data.augment import make_augmentation
from jidm.training.data.batches import Batches
from jidm.training.data.flow_cache import estimate_flow
from jidm.training.data.frame_store import FrameStore, image_size, load_frame_store, select_image_key
from jidm.training.data.pairs import PairSource
from jidm.training.model import TrainableModel
from jidm.video.letterbox import scaled_size

_MAX_SIDE = 128
"""[px] Longest side of the model's images where no size is given."""

_MIN_UPSCALE = 1.5
"""How much larger a recording must be than the model's images for photometric refinement to gain from it."""

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """What a run needs.

    Attributes:
        model: untrained, its weights drawn from the seed.
        train: batches to learn from.
        validation: batches to validate on; None where there are too few episodes.
        embodiment: record of the robot for the checkpoint, or None.
        record: of the data, for the checkpoint's `training`.
    """

    model: TrainableModel
    train: Batches
    validation: Batches | None
    embodiment: dict[str, Any] | None
    record: dict[str, Any]


def prepare_training(
    config: TrainConfig, model_class: type[TrainableModel], dataset: Any, robot: Embodiment | None, report: Report,
    device: str | torch.device = "cpu",
) -> TrainingSetup:  # fmt: skip
    """Read the recording, choose the source of flow, build the model.

    Args:
        model_class: what is trained, of the kind `config.kind`.
        dataset: the data set.
        robot: the robot that `config.embodiment` names.
        report: called with lines about the progress.
        device: where batches are assembled.

    Raises:
        DatasetError, InputError: the data lack what the configuration names, or are of another robot.
    """
    order = joint_order(dataset, robot)
    train, validation, test = split_episodes(config, dataset)
    image_key = select_image_key(dataset, config.image_key)
    height, width = _image_size(config, dataset, image_key)
    input_scale = _input_scale(config, dataset, image_key, height, width)
    stores = [
        load_frame_store(
            dataset, episodes, height=height, width=width, input_scale=input_scale, downsampled=episodes is train,
            image_key=image_key, joints=config.joints, order=order, cache=config.cache, progress=report,
        )
        for episodes in (train, validation) if episodes
    ]  # fmt: skip
    store = stores[0]
    if static := store.static_joints():
        report(f"these joints never move in the recording and cannot be learned: {', '.join(static)}")
    kinematics, flow_kind = _flow_source(config, dataset, robot, store)
    batches = []
    for part, augment in zip(stores, (make_augmentation(config.augment, config.seed), None)):
        flow = None
        if flow_kind == "dis":
            flow = estimate_flow(
                dataset, part, image_key, config.strides, DisFlow(), cache=config.cache, progress=report
            )
        source = PairSource(
            part, kinematics=kinematics, estimated_flow=flow, device=device,
            before="before" in model_class.extra_frames,
            static_background=dataset.recipe.get("background_static") is True,
        )  # fmt: skip
        batches.append(Batches(source, config.strides, config.seed, augment, config.batch_size))
    scale_note = f" with input scale {input_scale}" if input_scale > 1 else ""
    report(
        f"{config.kind} ({config.size}) of {len(store.joint_names)} joints from {describe_episodes(train)}, "
        f"{len(store)} frames of {height}x{width}{scale_note}, flow: {flow_kind}"
    )
    torch.manual_seed(config.seed)
    model = model_class.from_data(
        store.joint_names, _joint_types(store, robot), height, width, store.stats(config.strides),
        **{"size": config.size, **config.options}, **({"input_scale": input_scale} if input_scale > 1 else {}),
    )  # fmt: skip
    record = {
        "data_hash": dataset.content_hash, "data_recipe": dict(dataset.recipe), "fps": store.fps, "image_key": image_key,
        "train_episodes": list(train), "validation_episodes": list(validation), "test_episodes": list(test),
        "frames": len(store), "flow": flow_kind,
    }  # fmt: skip
    embodiment = None if robot is None else embodiment_record(robot)
    return TrainingSetup(model, batches[0], batches[1] if len(batches) > 1 else None, embodiment, record)


def joint_order(dataset: Any, robot: Embodiment | None) -> tuple[str, ...]:
    """The robot's joint names if the data set records exactly those, in any order; the data set's own without a robot.

    A data set with generic names ("joint_0", ...) is taken to have the robot's joints in the robot's order.

    Raises:
        DatasetError: names or number differ; the message states which.
    """
    recorded = tuple(dataset.joint_names)
    if robot is None:
        return recorded
    if set(recorded) == set(robot.joint_names):
        return robot.joint_names
    if recorded == generic_joint_names(robot.n):
        return recorded
    missing = [x for x in robot.joint_names if x not in recorded]
    extra = [x for x in recorded if x not in robot.joint_names]
    parts = [f"it lacks {', '.join(missing[:4])}"] * bool(missing) + [f"has also {', '.join(extra[:4])}"] * bool(extra)
    raise DatasetError(
        f"{dataset.root}: records {len(recorded)} joints, '{robot.name}' has {robot.n}: {' and '.join(parts)}; "
        f"name the right embodiment, or none to train from the data alone"
    )


def split_episodes(config: TrainConfig, dataset: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Episodes to train on, to validate on, and to test on; no episode is in two of them.

    Raises:
        DatasetError: none are left to train on.
    """
    test = select_episodes(config.test_episodes, dataset.episode_indices)
    chosen = [x for x in select_episodes(config.train_episodes, dataset.episode_indices) if x not in test]
    if not chosen:
        raise DatasetError(
            f"{dataset.root}: no episodes are left to train on: it has {describe_episodes(dataset.episode_indices)}, "
            f"{len(test)} of them for testing; choose others"
        )
    count = max(1, round(config.validation * len(chosen))) if config.validation > 0 and len(chosen) >= 4 else 0
    # Evenly spread, and the same for every seed, so that runs can be compared.
    validation = {chosen[(2 * i + 1) * len(chosen) // (2 * count)] for i in range(count)}
    return tuple(x for x in chosen if x not in validation), tuple(sorted(validation)), test


def _image_size(config: TrainConfig, dataset: Any, image_key: str) -> tuple[int, int]:
    if config.height is None and config.width is None:
        return scaled_size(*image_size(dataset, image_key), max_side=_MAX_SIDE, multiple=ENCODER_STRIDE)
    if config.height is None or config.width is None:
        raise InputError("give both height and width, or neither")
    for name, side in (("height", config.height), ("width", config.width)):
        if side < ENCODER_STRIDE or side % ENCODER_STRIDE:
            raise InputError(f"{name} must be a multiple of {ENCODER_STRIDE} px, got {side}")
    return config.height, config.width


def _input_scale(config: TrainConfig, dataset: Any, image_key: str, height: int, width: int) -> int:
    if config.kind != LearnedField.kind:
        if config.input_scale not in (None, 1):
            raise InputError(
                f"a {config.kind} has no photometric refinement and so no input_scale; give a larger height and width"
            )
        return 1
    if config.input_scale is not None:
        return config.input_scale
    height_in, width_in = image_size(dataset, image_key)
    return 2 if min(height_in / height, width_in / width) >= _MIN_UPSCALE else 1


def _flow_source(
    config: TrainConfig, dataset: Any, robot: Embodiment | None, store: FrameStore
) -> tuple[Kinematics | None, str]:
    """Kinematics if flow is exact, and the name of its source: "exact", "dis" or "none"."""
    if config.flow in ("dis", "none"):
        return None, config.flow
    problem = ""
    recorded_robot = dataset.recipe.get("embodiment")
    if store.geometry is None:
        problem = "it holds no depth, links and cameras"
    elif robot is None and recorded_robot is None:
        problem = "the robot is not known"
    else:
        try:
            robot = robot or load_embodiment(str(recorded_robot))
        except JidmError as error:
            raise DatasetError(
                f"{dataset.root}: the robot that was recorded is not found here ({error}); pass --embodiment"
            ) from None
        if dataset.recipe.get("embodiment_hash") not in (None, robot.content_hash):
            problem = f"it was made with another version of '{robot.name}'"
        elif len(store.state_names) != robot.n:
            problem = f"its joints are not those of '{robot.name}'"
        elif store.state_names != robot.joint_names and set(store.state_names) == set(robot.joint_names):
            problem = f"its joints are not in the order of '{robot.name}'; pass --embodiment"
    if not problem and robot is not None:
        return Kinematics.from_embodiment(robot), "exact"
    if config.flow == "exact":
        raise DatasetError(f"{dataset.root}: exact flow is not available, {problem}; use --flow dis")
    return None, "dis"


def _joint_types(store: FrameStore, robot: Embodiment | None) -> tuple[str, ...]:
    """Types of the learned joints; without a robot revolute, because recordings of robots are in rad."""
    if robot is None:
        return ("revolute",) * len(store.joint_names)
    known = dict(zip(store.state_names, robot.joint_types))  # both are in the order of `joint_order`
    return tuple(known[name] for name in store.joint_names)
