"""From a data set and a configuration to what the training loop runs on: batches, an untrained model, its record."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jidm.checkpoint import embodiment_record
from jidm.datasets.episode_selection import describe_episodes, select_episodes
from jidm.errors import DatasetError, InputError
from jidm.fields.free.network import LearnedField
from jidm.model_registry import extra_frames, model_class
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import load_embodiment
from jidm.training.config import TrainConfig
from jidm.training.data.augment import Augment, make_augmentation
from jidm.training.data.batch import PairBatch
from jidm.training.data.clips import Clip, iter_clips
from jidm.training.data.flow_cache import EstimatedFlow, estimate_flow
from jidm.training.data.frame_store import FrameStore, image_size, load_frame_store, select_camera
from jidm.training.data.pairs import PairSampler, PairSource
from jidm.video.letterbox import scaled_size

_MAX_SIDE, _MULTIPLE = 128, 16
"""The model's pictures, where nobody chose: longest side and what both sides are multiples of [px]."""

_CLIP_FRAMES = 600  # frames of all films together

_MIN_UPSCALE = 1.5
"""How much larger a recording must be than the model's pictures for a closer look to show more."""

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of every training step, for any process, and some to validate by.

    `min_stride_sampler` draws pairs as near in time as they come: those of a video that is followed.
    """

    sampler: PairSampler
    min_stride_sampler: PairSampler
    source: PairSource
    augment: Augment | None
    batch_size: int

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The pairs of training step `step` that process `rank` of `world` learns from."""
        pairs = self.sampler.sample(step, self.batch_size)
        if self.augment is not None and self.augment.options.background:
            pairs = replace(
                pairs,
                background=self.sampler.sample_backgrounds(step, self.batch_size, self.augment.options.background),
            )
        batch = self.source.batch(pairs.shard(rank, world))
        random = np.random.default_rng((self.sampler.seed, step, 3)).random((self.batch_size, 2, batch.q.shape[1] + 2))
        batch = replace(batch, random=torch.from_numpy(random[rank::world]).to(batch.q))
        if self.augment is not None:
            batch = self.augment.apply(batch, self.augment.sample(step, self.batch_size).shard(rank, world))
        return batch

    def validation_batches(self, count: int) -> list[PairBatch]:
        """The same pairs every time, unchanged, in batches of this size."""
        return self._fixed_batches(self.sampler, count)

    def calibration_batches(self, count: int) -> list[PairBatch]:
        """Likewise of the nearest pairs: errors grow with the step, and uncertainties are for steps of videos."""
        return self._fixed_batches(self.min_stride_sampler, count)

    def clips(self) -> Iterator[Clip]:
        """The beginnings of all episodes, as they are decoded."""
        return iter_clips(self.source, self.min_stride_sampler.min_stride, _CLIP_FRAMES)

    def _fixed_batches(self, sampler: PairSampler, count: int) -> list[PairBatch]:
        pairs = sampler.fixed_sample(count)
        world = -(-count // self.batch_size)
        return [self.source.batch(pairs.shard(rank, world)) for rank in range(world)]


@dataclass(frozen=True, eq=False)
class TrainingSetup:
    """What a run needs.

    Attributes:
        model: untrained, its weights drawn from the seed.
        train: batches to learn from. validation: to watch the run by; None where too few episodes are there.
        embodiment: record of the robot for the checkpoint, or None.
        record: of the data, for the checkpoint's `training`.
    """

    model: nn.Module
    train: Batches
    validation: Batches | None
    embodiment: dict[str, Any] | None
    record: dict[str, Any]


def prepare_training(
    config: TrainConfig, dataset: Any, robot: Embodiment | None, report: Report, device: str | torch.device = "cpu"
) -> TrainingSetup:
    """Read the recording, build the model, decide where flow comes from.

    Args:
        robot: the robot `config.embodiment` names.
        device: where batches are put together.

    Raises:
        DatasetError, InputError: what is asked for is not in the data, or the robot is another.
    """
    order = joint_order(dataset, robot)
    train, validation, test = split_episodes(config, dataset)
    camera = select_camera(dataset, config.camera)
    height, width = _image_size(config, dataset, camera)
    input_scale = _input_scale(config, dataset, camera, height, width)
    stores = [
        load_frame_store(
            dataset, episodes, height=height, width=width, input_scale=input_scale, downsampled=episodes is train, camera=camera,
            joints=config.joints, order=order, cache=config.cache, progress=report,
        )
        for episodes in (train, validation) if episodes
    ]  # fmt: skip
    train_store = stores[0]
    if still := train_store.static_joints():
        report(f"these joints never move in the recording, nothing can be learned of them: {', '.join(still)}")
    kinematics, flow_kind = _flow_source(config, dataset, robot, train_store)
    batches = []
    model_type = model_class(config.kind)
    extra = extra_frames(config.kind)
    for store, augment in zip(stores, (make_augmentation(config.augment, config.seed), None)):
        estimated_flow = None
        if flow_kind == "dis":
            estimated_flow = _estimated_flow(config, dataset, store, camera, report)
        source = PairSource(
            store, kinematics=kinematics, estimated_flow=estimated_flow, device=device, before="before" in extra,
            third="third" in extra, static_background=dataset.recipe.get("background_static") is True,
        )  # fmt: skip
        sampler, min_stride_sampler = (
            PairSampler(store, strides, seed=config.seed, third="third" in extra)
            for strides in (config.strides, (min(config.strides),))
        )
        batches.append(Batches(sampler, min_stride_sampler, source, augment, config.batch_size))
    report(
        f"{config.kind} ({config.size}) of {len(train_store.joint_names)} joints from {describe_episodes(train)}, {len(train_store)} frames "
        f"of {height}x{width}{f' in {input_scale} times the detail' * (input_scale > 1)}, flow: {flow_kind}"
    )
    torch.manual_seed(config.seed)
    model = model_type.from_data(
        train_store.joint_names,
        _joint_types(train_store, robot),
        height,
        width,
        train_store.stats(config.strides),
        **_model_options(config),
        **({"detail": input_scale} if input_scale > 1 else {}),
    )
    record = {
        "data_hash": dataset.content_hash, "data_recipe": dict(dataset.recipe), "fps": train_store.fps, "camera": camera,
        "train_episodes": list(train), "validation_episodes": list(validation), "test_episodes": list(test),
        "frames": len(train_store), "flow": flow_kind,
    }  # fmt: skip
    embodiment = None if robot is None else embodiment_record(robot)
    return TrainingSetup(model, batches[0], batches[1] if len(batches) > 1 else None, embodiment, record)


def joint_order(dataset: Any, robot: Embodiment | None) -> tuple[str, ...]:
    """The robot's joint names if the data set records exactly those, in whatever order; the data set's without a robot.

    A data set that names no joints ("joint_0", ...) is taken at its word about their order.

    Raises:
        DatasetError: names or number differ; the message says which.
    """
    recorded = tuple(dataset.joint_names)
    if robot is None:
        return recorded
    nameless = recorded == tuple(f"joint_{i}" for i in range(len(recorded)))
    if set(recorded) == set(robot.joint_names):
        return robot.joint_names
    if nameless and len(recorded) == robot.n:
        return recorded
    missing = [x for x in robot.joint_names if x not in recorded]
    extra = [x for x in recorded if x not in robot.joint_names]
    parts = [f"it lacks {', '.join(missing[:4])}"] * bool(missing) + [f"has also {', '.join(extra[:4])}"] * bool(extra)
    raise DatasetError(
        f"{dataset.root}: records {len(recorded)} joints, '{robot.name}' has {robot.n}: {' and '.join(parts)}; "
        f"name the right embodiment, or none to train from the data alone"
    )


def split_episodes(config: TrainConfig, dataset: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Episodes to train on, to validate by, and to test on; no episode is in two of them."""
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


def provenance() -> dict[str, Any]:
    """Versions, and the commit of the repository if this runs in one."""
    from importlib.metadata import PackageNotFoundError, version

    from jidm import __version__

    versions = {"jidm": __version__, "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        versions["lightning"] = version("lightning")
    root = Path(__file__).parents[2]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    return {
        "versions": versions,
        "commit": commit,
        "modified": bool(commit and _git(root, "status", "--porcelain", "-uno")),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _image_size(config: TrainConfig, dataset: Any, camera: str) -> tuple[int, int]:
    if config.height is None and config.width is None:
        return scaled_size(*image_size(dataset, camera), max_side=_MAX_SIDE, multiple=_MULTIPLE)
    if config.height is None or config.width is None:
        raise InputError("give both height and width, or neither")
    for name, side in (("height", config.height), ("width", config.width)):
        if side < _MULTIPLE or side % _MULTIPLE:
            raise InputError(f"{name} must be a multiple of {_MULTIPLE} px, got {side}")
    return config.height, config.width


def _input_scale(config: TrainConfig, dataset: Any, camera: str, height: int, width: int) -> int:
    if config.kind != LearnedField.kind:
        if config.input_scale not in (None, 1):
            raise InputError(f"a {config.kind} looks no closer, it has no detail; give a larger height and width")
        return 1
    if config.input_scale is not None:
        return config.input_scale
    height_in, width_in = image_size(dataset, camera)
    return 2 if min(height_in / height, width_in / width) >= _MIN_UPSCALE else 1


def _flow_source(
    config: TrainConfig, dataset: Any, robot: Embodiment | None, store: FrameStore
) -> tuple[Kinematics | None, str]:
    """Kinematics if flow is exact, and the word for where it comes from."""
    if config.flow in ("dis", "none"):
        return None, config.flow
    problem = ""
    recorded_robot = dataset.recipe.get("embodiment")
    if store.geometry is None:
        problem = "it holds no depth, links and cameras"
    elif robot is None and recorded_robot is None:
        problem = "nobody named the robot"
    else:
        robot = robot or load_embodiment(str(recorded_robot))
        if dataset.recipe.get("embodiment_hash") not in (None, robot.content_hash):
            problem = f"it was made with another version of '{robot.name}'"
        elif store.state_names != robot.joint_names and len(store.state_names) != robot.n:
            problem = f"its joints are not those of '{robot.name}'"
    if not problem and robot is not None:
        return Kinematics.from_embodiment(robot), "exact"
    if config.flow == "exact":
        raise DatasetError(f"{dataset.root}: exact flow is not to be had, {problem}; use --flow dis")
    return None, "dis"


def _estimated_flow(
    config: TrainConfig, dataset: Any, store: FrameStore, camera: str, report: Report
) -> EstimatedFlow:  # fmt: skip
    from jidm.flow.dis import DisFlow

    return estimate_flow(
        dataset, store, camera, config.strides, DisFlow(), cache=config.cache, progress=report
    )  # fmt: skip


def _joint_types(store: FrameStore, robot: Embodiment | None) -> tuple[str, ...]:
    """Types of the learned joints; revolute where nobody knows, for recordings of robots are in rad."""
    if robot is None:
        return ("revolute",) * len(store.joint_names)
    known = dict(zip(store.state_names, robot.joint_types))
    if set(store.state_names) == set(robot.joint_names):
        known = dict(zip(robot.joint_names, robot.joint_types))
    return tuple(known[name] for name in store.joint_names)


def _model_options(config: TrainConfig) -> dict[str, Any]:
    return {"size": config.size, **config.options}
