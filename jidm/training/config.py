"""Everything that a training run depends on, in one typed record that is saved beside the weights.

The command line reads this class: every field is a flag of `jidm train`, and its docstring the flag's help. So nothing
heavy is imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jidm.errors import InputError

_DEFAULT_MINUTES = 10.0
_MAY_CHANGE = ("steps", "minutes", "out", "cache", "devices", "strategy", "accelerator", "save_minutes", "resume",
               "overwrite", "data", "log_every")  # fmt: skip
"""What may differ when a run is resumed: its budget, where it runs, and where its files are."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    data: str
    """Data set (LeRobot v3.0, v2.1 or v2.0) with videos and joint positions."""

    out: str
    """Folder of the checkpoint; the run's own state, log and figures go to `OUT.run` beside it."""

    embodiment: str | None = None
    """Robot: a name, URDF file or folder. Without it, joints count as revolute and keep to about their recorded range."""

    kind: str = "jacobian_field"
    """Which model: jacobian_field, direct, direct_on_flow, eva, eva_average_pool or vera."""

    size: str = "tiny"
    """Size of the network: tiny, small or base; eva also resnet18, resnet34 or resnet50."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the model's config (Python only)."""

    image_key: str | None = None
    """Which of the data set's videos, where there are several: NAME of `observation.images.NAME`."""

    height: int | None = None
    """Height of the images that the model reads [px], a multiple of 16; chosen to fit the recording if not given."""

    width: int | None = None
    """Width of the images that the model reads [px]; likewise."""

    input_scale: int | None = None
    """Factor by which images are larger for photometric refinement (jacobian_field); 2 if the recording allows, else 1."""

    joints: tuple[str, ...] = ()
    """Joints to learn; all if not given."""

    train_episodes: str = "all"
    """Episodes to train on: 'all', numbers and ranges like '0-79,90', 'last-digit:1,6', 'every:10', 'not ...'."""

    test_episodes: str = "none"
    """Episodes kept for evaluation, in the same forms; never read, even if --train-episodes names them."""

    validation: float = 0.05
    """Fraction of the training episodes that is kept apart, as whole episodes, for validation."""

    strides: tuple[int, ...] = (1, 2, 3)
    """Distances in time of the two frames of a pair [recorded frames]."""

    flow: Literal["auto", "exact", "dis", "none"] = "auto"
    """What supervises flow: exact (recorded geometry), dis (estimated) or none; auto takes the first that is available."""

    augment: Literal["none", "light", "full"] = "light"
    """Image augmentation: none, light (color and noise), or full (also blur, JPEG and occluders)."""

    steps: int | None = None
    """Budget [optimizer steps], instead of `minutes`; the result does not depend on how often the run is resumed."""

    minutes: float | None = None
    """Budget of time [min]; 10 if `steps` is not given either. The learning rate follows the fraction used up."""

    batch_size: int = 32
    """Pairs per step, over all processes together."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for convolutions and AdamW for the rest, or AdamW for all."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, after the warm-up; Muon's follows from it."""

    weight_decay: float = 1e-2
    """Weight decay of AdamW; Muon's follows from it."""

    warmup_steps: int = 100
    """Steps of linear warm-up."""

    final_lr_ratio: float = 0.01
    """Learning rate at the end, as a fraction of the peak."""

    grad_clip: float = 1.0
    """Largest norm of the gradient."""

    ema: float = 0.998
    """Decay of the exponential moving average of the weights that is saved; 0 saves the last weights."""

    precision: Literal["32", "bf16"] = "32"
    """bf16 is mixed precision."""

    max_bad_steps: int = 20
    """The run ends after this many steps in a row with a loss or gradient that is not finite."""

    log_every: int = 50
    """Steps between lines of the log."""

    validate_every: int = 500
    """Steps between validations."""

    validation_pairs: int = 128
    """Pairs of frames per validation."""

    patience: int = 0
    """The run ends after this many validations without improvement; 0 = never."""

    save_policy: Literal["best", "last"] = "last"
    """Which weights the checkpoint holds: of the best validation, or the last."""

    seed: int = 0
    """Seed of all random numbers."""

    save_minutes: float = 1.0
    """Time between saved states of the run [min]."""

    devices: int = 1
    """Processes or GPUs that share each batch."""

    strategy: Literal["auto", "ddp"] = "auto"
    """Lightning strategy; several devices use ddp."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train."""

    cache: str | None = None
    """Folder for decoded frames; else $JIDM_CACHE, else ~/.cache/jidm. Its size stays below $JIDM_CACHE_GB."""

    resume: bool = False
    """Continue the run of that name, or start it."""

    overwrite: bool = False
    """Delete an earlier run and checkpoint of that name."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise InputError("a training run has one budget: give either steps or minutes")
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "minutes", _DEFAULT_MINUTES)
        budget = self.steps if self.steps is not None else self.minutes
        if not (budget and math.isfinite(budget) and budget > 0):
            raise InputError(f"the budget must be positive, got {budget}")
        for name in ("batch_size", "devices", "log_every", "validate_every", "validation_pairs", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_scale is not None and self.input_scale < 1:
            raise InputError(f"input_scale must be at least 1, got {self.input_scale}")
        if self.batch_size % self.devices:
            raise InputError(f"batch_size {self.batch_size} does not divide over {self.devices} devices; change one")
        if not (0 <= self.ema < 1 and 0 <= self.validation < 1 and 0 <= self.final_lr_ratio <= 1):
            raise InputError(
                f"ema and validation must be in [0, 1) and final_lr_ratio in [0, 1], got {self.ema}, {self.validation} "
                f"and {self.final_lr_ratio}"
            )
        if not (self.learning_rate > 0 and self.grad_clip > 0 and self.weight_decay >= 0 and self.warmup_steps >= 0):
            raise InputError("learning_rate and grad_clip must be positive, weight_decay and warmup_steps not negative")

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its state, log and figures."""
        out = Path(self.out)
        return out.with_name(out.name + ".run")

    def recipe(self) -> dict[str, Any]:
        """What made the checkpoint, as JSON values: of this machine's paths only the names of data set and robot file."""
        values = asdict(self)
        for name in ("out", "cache", "resume", "overwrite"):
            del values[name]
        robot = None if self.embodiment is None else Path(self.embodiment).name
        return {**values, "data": Path(self.data).name, "embodiment": robot, "options": dict(self.options)}

    def check_resumable(self, earlier: Mapping[str, Any]) -> None:
        """Refuse to continue a run of another recipe, as read from its file.

        Raises:
            InputError: naming what differs.
        """
        recipe = json.loads(json.dumps(self.recipe()))  # as it is read back: lists in place of tuples
        names = [f.name for f in fields(self) if f.name not in _MAY_CHANGE]
        changed = [x for x in names if recipe.get(x) != earlier.get(x)]
        if changed:
            parts = ", ".join(f"{x} {earlier.get(x)} -> {recipe.get(x)}" for x in changed)
            raise InputError(
                f"{self.run_folder}: the run was started with another recipe ({parts}); give the same, or another --out"
            )
