"""Everything a training run depends on, in one typed record that is saved beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jidm.errors import InputError, did_you_mean
from jidm.training.data.augment import PRESETS

_MAY_CHANGE = ("steps", "minutes", "out", "cache", "devices", "strategy", "accelerator", "save_minutes", "resume",
               "overwrite", "data", "log_every")  # fmt: skip
"""What a resumed run may do otherwise than it began; the budget, where it runs, and where its files are."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: folder of the data set.
        out: folder of the checkpoint to be made; the run's own state goes into `<out>.run` beside it.
        embodiment: name of the robot; without one, the data set's joint names are all that is known.
        kind: which model, see `jidm.model_registry.KINDS`; size, options: arguments of its `from_data`.
        camera: which camera of the recording.
        height, width: of the pictures the model sees [px]; chosen to fit the recording if not given.
        input_scale: pictures are seen so many times larger than height x width by closer looks; as the recording allows, 1 or
            2, if not given. Kinds other than jacobian_field have none.
        joints: names of the joints to learn; all if empty.
        train_episodes, test_episodes: see `select_episodes`; test episodes are never seen, whatever the other says.
        validation: share of the training episodes kept apart, whole, to watch the run by.
        strides: distances in time of the frames of a pair [recorded frames].
        flow: what supervises flow: "exact" (recorded geometry), "dis" (measured), "none", or "auto": the first there is.
        augment: "none", "light" or "full".
        steps, minutes: the budget, exactly one of them; the learning rate follows its share that is used up.
        batch_size: pairs a step, over all processes together.
        optimizer: "muon" for convolutions and AdamW for the rest, or "adamw" for all.
        learning_rate, weight_decay: of AdamW (Muon's follow from them); warmup_steps: steps until the full rate; final_lr_ratio: share of it left at the end.
        grad_clip: largest norm of the gradient.
        ema: decay of the running mean of the weights that is saved; 0 = save the last weights.
        precision: "32" or "bf16".
        max_bad_steps: so many steps in a row with a loss or gradient that is not finite end the run.
        log_every: steps between lines of the journal.
        validate_every: steps between validations; validation_pairs: how many pairs they take.
        patience: so many validations without a better one end the run; 0 = never.
        save_policy: "best" validation or "last" weights.
        seed: of everything random.
        save_minutes: between saved states [min].
        devices, strategy, accelerator: processes; "auto" or "ddp"; "auto", "cpu" or "gpu".
        cache: folder for decoded pictures; see `jidm.training.data.cache`.
        resume: go on from the state in `<out>.run`, or begin if there is none.
        overwrite: throw away an earlier run and checkpoint of that name.
    """

    data: str
    out: str
    embodiment: str | None = None
    kind: str = "jacobian_field"
    size: str = "tiny"
    options: Mapping[str, Any] = field(default_factory=dict)
    camera: str | None = None
    height: int | None = None
    width: int | None = None
    input_scale: int | None = None
    joints: tuple[str, ...] = ()
    train_episodes: str = "all"
    test_episodes: str = "none"
    validation: float = 0.05
    strides: tuple[int, ...] = (1, 2, 3)
    flow: Literal["auto", "exact", "dis", "none"] = "auto"
    augment: str = "light"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 32
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    final_lr_ratio: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.998
    precision: Literal["32", "bf16"] = "32"
    max_bad_steps: int = 20
    log_every: int = 50
    validate_every: int = 500
    validation_pairs: int = 128
    patience: int = 0
    save_policy: Literal["best", "last"] = "last"
    seed: int = 0
    save_minutes: float = 1.0
    devices: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    cache: str | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise InputError("a training run needs a budget: give either steps or minutes")
        budget = self.steps if self.steps is not None else self.minutes
        if not (budget and math.isfinite(budget) and budget > 0):
            raise InputError(f"the budget must be positive, got {budget}")
        if self.augment not in PRESETS:
            raise InputError(f"unknown augmentation '{self.augment}': {did_you_mean(self.augment, PRESETS)}")
        for name in ("batch_size", "devices", "log_every", "validate_every", "validation_pairs", "bad_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.input_scale is not None and self.input_scale < 1:
            raise InputError(f"detail must be at least 1, got {self.input_scale}")
        if self.batch_size % self.devices:
            raise InputError(f"batch_size {self.batch_size} does not divide over {self.devices} devices; change one")
        if not (0 <= self.ema < 1 and 0 <= self.validation < 1 and 0 <= self.final_lr_ratio <= 1):
            raise InputError(
                f"ema, validation and floor are shares below 1, got {self.ema}, {self.validation} and {self.final_lr_ratio}"
            )
        if not (self.learning_rate > 0 and self.grad_clip > 0 and self.weight_decay >= 0 and self.warmup_steps >= 0):
            raise InputError("learning_rate and clip must be positive, weight_decay and warmup not negative")

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its state, log and pictures."""
        out = Path(self.out)
        return out.with_name(out.name + ".run")

    def recipe(self) -> dict[str, Any]:
        """What made the checkpoint, as JSON values: no folders of this machine but the data set's name."""
        values = asdict(self)
        for name in ("out", "cache", "resume", "overwrite"):
            del values[name]
        return {**values, "data": Path(self.data).name, "options": dict(self.options)}

    def check_resumable(self, earlier: Mapping[str, Any]) -> None:
        """Refuse to go on with a run of another recipe.

        Raises:
            InputError: naming what differs.
        """
        mine = self.recipe()
        names = [f.name for f in fields(self) if f.name not in _MAY_CHANGE]
        changed = [x for x in names if _as_json(mine.get(x)) != _as_json(earlier.get(x))]
        if changed:
            parts = ", ".join(f"{x} {earlier.get(x)} -> {mine.get(x)}" for x in changed)
            raise InputError(f"{self.run_folder}: the run began otherwise ({parts}); give the same, or another --out")


def _as_json(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(x) for x in value] if isinstance(value, (tuple, list)) else value
