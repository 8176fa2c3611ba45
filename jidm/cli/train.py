"""`jidm train`: a recording in, a checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from jidm.errors import InputError
from jidm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model on a recording of a robot: motor babbling, in simulation or of the real robot."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    backbone: str = "own"
    """Encoder of a jacobian_field: own (built in), a torchvision classifier (resnet18, ...) or a registered name."""

    pretrained: bool = False
    """Start from torchvision's weights of that backbone, which are downloaded."""

    mesh_roots: tuple[Path, ...] = ()
    """Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path continues."""

    def run(self) -> int:
        from jidm.cli.checks import check_exists, check_out_folder

        check_exists(Path(self.config.data))
        check_out_folder(Path(self.config.out))
        from jidm.model_registry import train
        from jidm.robot.registry import load_embodiment
        from jidm.visualization.training_plots import draw_pairs

        config = self.with_encoder()
        robot = None if config.embodiment is None else load_embodiment(config.embodiment, mesh_roots=self.mesh_roots)
        out = train(config, robot=robot, report=partial(print, flush=True), visualizer=draw_pairs)
        print(f"checkpoint in {out}/; log and figures of the run in {config.run_folder}/")
        return 0

    def with_encoder(self) -> TrainConfig:
        """The configuration with the encoder among the model's options.

        Raises:
            InputError: the kind of model has no encoder to choose.
        """
        encoder = {"backbone": self.backbone, "pretrained": self.pretrained}
        if encoder == {"backbone": "own", "pretrained": False}:
            return self.config
        if self.config.kind != "jacobian_field":
            raise InputError("--backbone and --pretrained are for --kind jacobian_field; leave them out")
        return replace(self.config, options={**self.config.options, **encoder})
