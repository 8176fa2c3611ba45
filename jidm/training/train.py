"""Training a model on a recording; `jidm.model_registry.train` does it for a kind of model by name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jidm.atomic_io import atomic_write
from jidm.checkpoint import load_checkpoint, refuse_other_files, save_checkpoint
from jidm.errors import CheckpointError, InputError, MissingExtraError
from jidm.training.config import TrainConfig
from jidm.training.data.datamodule import Report, TrainingSetup, prepare_training
from jidm.training.model import TrainableModel
from jidm.training.provenance import provenance

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment
    from jidm.training.lightning_module import Visualizer


_RECORD = "run.json"


def quiet(line: str) -> None:
    """A report that discards the line."""


def train(
    config: TrainConfig, model_class: type[TrainableModel], *, dataset: Any = None, robot: Embodiment | None = None,
    report: Report = quiet, visualizer: Visualizer | None = None,
) -> Path:  # fmt: skip
    """Train a model; its checkpoint is at `config.out` from the first validation on, and is replaced by better ones.

    The run's state goes to `config.run_folder`; with `config.resume` the run is continued from there.

    Args:
        model_class: what is trained, of the kind `config.kind`.
        dataset: the data set, if it is open already; else `config.data` is opened.
        robot: the robot that `config.embodiment` names, if it is loaded already.
        report: called with lines about the progress. With several processes it must be a plain function of a module.
        visualizer: draws predictions at every validation; see `jidm.training.lightning_module.Visualizer`. Likewise.

    Returns:
        The checkpoint's folder.

    Raises:
        DatasetError, InputError: data, robot and configuration do not fit; or there is an earlier run.
        JidmError: the loss was not finite for too many steps in a row.
        MissingExtraError: Lightning is not installed.
    """
    try:
        import lightning  # noqa: F401
    except ImportError:
        raise MissingExtraError("training", "lightning", "train") from None
    if dataset is None:
        from jidm.datasets import open_dataset

        dataset = open_dataset(config.data)
    if robot is None and config.embodiment is not None:
        from jidm.robot.registry import load_embodiment

        robot = load_embodiment(config.embodiment)
    _prepare_run_folder(config, dataset)
    if config.devices > 1 and "LOCAL_RANK" not in os.environ:
        prepare_training(config, model_class, dataset, robot, report)  # decodes once, for all processes
        _launch(config, model_class, dataset, robot, report, visualizer)
    else:
        _run(config, model_class, dataset, robot, report, visualizer)
    return Path(config.out)


def _run(
    config: TrainConfig, model_class: type[TrainableModel], dataset: Any, robot: Embodiment | None, report: Report,
    visualizer: Visualizer | None,
) -> None:  # fmt: skip
    """This process's part of a run whose folder is prepared."""
    from jidm.training.lightning_module import LAST_CHECKPOINT, TrainingModule, make_trainer
    from jidm.training.logger import RunLogger

    _quiet_lightning()
    is_rank_zero = int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0
    trainer = make_trainer(config)
    root = trainer.strategy.root_device
    # Batches are assembled on the GPU if there is one, where they are used.
    setup = prepare_training(
        config, model_class, dataset, robot, report if is_rank_zero else quiet, root if root.type == "cuda" else "cpu"
    )
    state = config.run_folder / LAST_CHECKPOINT
    resuming = config.resume and state.exists()
    run_logger = None
    if is_rank_zero:
        _create_run_folder(config, setup)
        step = int(torch.load(state, map_location="cpu", weights_only=True)["global_step"]) if resuming else 0
        run_logger = RunLogger(config.run_folder, step, report)
        if resuming:
            report(f"resuming from step {step}")
    module = TrainingModule(setup, config, _make_saver(config, setup), run_logger, visualizer if is_rank_zero else None)
    try:
        trainer.fit(module, ckpt_path=str(state) if resuming else None)
    finally:
        if run_logger:
            run_logger.close()


# ---- the run's folder ------------------------------------------------------------------------------------------------


def _prepare_run_folder(config: TrainConfig, dataset: Any) -> None:
    """Check that the run may start or be resumed, and delete an earlier one if `config.overwrite` is set.

    Raises:
        InputError: there is an earlier run, or the one to resume is not this one.
        CheckpointError: the checkpoint's folder holds other files, reward scales for instance.
    """
    out, folder = Path(config.out), config.run_folder
    if config.resume or config.overwrite:
        refuse_other_files(out)
    if config.overwrite and not config.resume:
        if out.exists():
            load_checkpoint(out)  # refuses to delete anything that is not a checkpoint
            shutil.rmtree(out)
        shutil.rmtree(folder, ignore_errors=True)
    if not config.resume and (out.exists() or folder.exists()):
        raise InputError(f"{out}: there is an earlier run of that name; --resume continues it, --overwrite deletes it")
    record = folder / _RECORD
    if record.exists():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        config.check_resumable(earlier["recipe"])
        if earlier["data_hash"] != dataset.content_hash:
            raise InputError(f"{folder}: the data set has changed since the run began; train anew under another --out")
    elif out.exists():
        raise InputError(f"{out}: its run {folder.name} is gone, so it cannot be resumed; train under another --out")


def _create_run_folder(config: TrainConfig, setup: TrainingSetup) -> None:
    """Make the run's folder, after everything was checked."""
    config.run_folder.mkdir(parents=True, exist_ok=True)
    if not (config.run_folder / _RECORD).exists():
        record = {"recipe": config.recipe(), "data_hash": setup.record["data_hash"]}
        with atomic_write(config.run_folder / _RECORD) as path:
            path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _make_saver(config: TrainConfig, setup: TrainingSetup) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    facts = {"recipe": config.recipe(), "seed": config.seed, "data": setup.record, **provenance()}

    def save(tensors: dict[str, torch.Tensor], result: dict[str, Any]) -> None:
        model: Any = setup.model
        try:
            save_checkpoint(
                config.out, kind=config.kind, config=asdict(model.config), tensors=tensors,
                embodiment=setup.embodiment, training={**facts, "result": result},
            )  # fmt: skip
        except CheckpointError as error:
            if "finite" not in str(error):
                raise
            # Averaged weights that are not finite must not end a run that may recover; the earlier checkpoint stays.

    return save


# ---- several processes -----------------------------------------------------------------------------------------------


def _launch(config: TrainConfig, *arguments: Any) -> None:
    """Run `config.devices` processes; arguments as of `_run`."""
    from torch.multiprocessing.spawn import ProcessRaisedException, spawn

    try:
        spawn(_worker, args=(_free_port(), torch.get_num_threads(), config, *arguments), nprocs=config.devices)
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(f"a training process failed: {last}") from error


def _worker(rank: int, port: int, threads: int, config: TrainConfig, *arguments: Any) -> None:
    # With these variables set, Lightning takes this process for one that was launched by others and launches none
    # itself.
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0",
        "WORLD_SIZE": str(config.devices),
    }  # fmt: skip
    torch.set_num_threads(max(1, threads // config.devices))
    _run(config, *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet_lightning() -> None:
    """Silence Lightning's advice (more workers, a logger), which does not apply to this loop."""
    import logging
    import warnings

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
