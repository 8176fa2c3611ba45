"""`jidm train`: a recording in, a checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.training.config import TrainConfig

_DEFAULT_MINUTES = 10.0  # where no budget is given


@dataclass(frozen=True)
class Train:
    """Train a model on a recording of a robot: self-play, or a real robot's."""

    data: Path
    """Data set (LeRobot v3.0, v2.1 or v2.0) with videos and joint positions."""

    out: Path
    """Folder of the checkpoint; the run's own state, log and pictures go to `OUT.run` beside it."""

    embodiment: str | None = None
    """Robot: a name from `jidm embodiments`, a URDF file, or a folder with an embodiment.toml. Without one, the data set's
    joint names are all that is known."""

    kind: str = "jacobian_field"
    """Which model: jacobian_field, direct, direct_on_flow, eva, eva_average_pool or vera."""

    size: str = "tiny"
    """How large: tiny, small or base; eva also resnet18, resnet34 or resnet50."""

    backbone: str = "own"
    """What encodes pictures for a jacobian_field: our small network, a torchvision classifier (resnet18, ...), or a name
    that the program registered."""

    pretrained: bool = False
    """Begin with torchvision's weights of that backbone; they are fetched from its hub."""

    minutes: float | None = None
    """Budget of time; 10 if --steps is not given either. The learning rate follows it."""

    steps: int | None = None
    """Budget of optimiser steps, instead of --minutes; such a run is the same whenever and however often it is resumed."""

    camera: str | None = None
    """Which camera, where the recording has several."""

    height: int | None = None
    """Height of the pictures the model sees [px]; chosen to fit the recording if not given."""

    width: int | None = None
    """Width of the pictures the model sees [px]; likewise."""

    input_scale: int | None = None
    """How many times larger a jacobian_field's closer looks see the pictures; 2 where the recording allows, if not given."""

    joints: tuple[str, ...] = ()
    """Joints to learn; all if not given."""

    train_episodes: str = "all"
    """Episodes to train on: 'all', numbers and ranges like '0-79,90', 'last-digit:1,6', 'every:10', 'not ...'."""

    test_episodes: str = "none"
    """Episodes that are never seen, for evaluation; in the same forms."""

    strides: tuple[int, ...] = (1, 2, 3)
    """Distances in time of the two frames of a pair [recorded frames]."""

    flow: Literal["auto", "exact", "dis", "none"] = "auto"
    """What supervises flow: recorded geometry, DIS in the pictures, or nothing; auto takes the first there is."""

    augment: Literal["none", "light", "full"] = "light"
    """How much the pictures are changed: colour and noise, or also blur, JPEG and things in front."""

    batch_size: int = 32
    """Pairs a step, over all devices together."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for convolutions and AdamW for the rest, or AdamW for all."""

    learning_rate: float = 1e-3
    """Highest learning rate, after the warm-up."""

    ema: float = 0.998
    """Decay of the running mean of the weights that is saved; 0 saves the last weights."""

    precision: Literal["32", "bf16"] = "32"
    """bf16 is mixed precision."""

    validation: float = 0.05
    """Share of the training episodes kept apart to watch the run by."""

    validate_every: int = 500
    """Steps between validations."""

    patience: int = 0
    """So many validations without a better one end the run; 0 never."""

    save_policy: Literal["best", "last"] = "last"
    """Which weights the checkpoint holds: of the best validation, or the last."""

    seed: int = 0
    """Of everything random."""

    devices: int = 1
    """Processes or GPUs that share each batch."""

    strategy: Literal["auto", "ddp"] = "auto"
    """ddp is what several devices use."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train."""

    cache: Path | None = None
    """Folder for decoded pictures; else the environment variable JIDM_CACHE, else ~/.cache/jidm. Kept below JIDM_CACHE_GB."""

    resume: bool = False
    """Go on with the run of that name, or begin it."""

    overwrite: bool = False
    """Throw away an earlier run and checkpoint of that name."""

    def run(self) -> int:
        from functools import partial

        from jidm.training.train import train
        from jidm.visualization.training_pictures import draw_pairs

        robot = None
        if self.embodiment is not None:
            from jidm.cli.inputs import find_robot

            robot = find_robot(self.embodiment)
        config = self.config()
        out = train(config, robot=robot, report=partial(print, flush=True), visualizer=draw_pairs)
        print(f"checkpoint in {out}/; run's log and pictures in {config.run_folder}/")
        return 0

    def config(self) -> TrainConfig:
        """The same as the record that is saved."""
        from dataclasses import asdict

        from jidm.training.config import TrainConfig

        values: dict[str, Any] = asdict(self)
        for name in ("data", "out", "cache"):
            values[name] = None if values[name] is None else str(values[name])
        encoder = {"backbone": values.pop("backbone"), "pretrained": values.pop("pretrained")}
        if encoder != {"backbone": "own", "pretrained": False}:
            if self.kind != "jacobian_field":
                raise InputError("--backbone and --pretrained are for --kind jacobian_field; leave them out")
            values["options"] = encoder
        if self.steps is None and self.minutes is None:
            values["minutes"] = _DEFAULT_MINUTES
        return TrainConfig(**values)
