"""Checkpoints: trained models as folders of two files, `config.json` and `model.safetensors`; written atomically.

Nothing is ever unpickled. Reading checks that a checkpoint is complete, undamaged, finite, and made for the robot it is
used with. The meaning of the weights is defined by the model named by `kind`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from jidm.atomic_io import atomic_write, remove_stale_temporaries
from jidm.bundled import bundled_folder
from jidm.errors import CheckpointError, did_you_mean
from jidm.git_lfs import refuse_lfs_pointer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
REWARD_SCALES = "reward.json"
"""File of the reward's scales, which a checkpoint's folder may hold besides, see `jidm.rewards.TermScales`."""
FORMAT, VERSION = "jidm-checkpoint", 1

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@runtime_checkable
class RobotDescription(Protocol):
    """The properties of a robot that a checkpoint records and compares; `Embodiment` has them."""

    @property
    def name(self) -> str: ...
    @property
    def content_hash(self) -> str: ...
    @property
    def joint_names(self) -> tuple[str, ...]: ...
    @property
    def joint_types(self) -> tuple[str, ...]: ...
    @property
    def lower(self) -> Any: ...
    @property
    def upper(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A saved model.

    Attributes:
        kind: kind of model, for instance "jacobian_field".
        config: arguments of the model; JSON values.
        tensors: its weights by name, on the CPU, all finite.
        embodiment: the robot it was trained for (see `embodiment_record`); None if there is none.
        training: recipe, seed, data, versions.
        source: its folder, or hub id and revision.
        content_hash: sha256 over both files.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Shaped[Tensor, "..."]]
    embodiment: dict[str, Any] | None
    training: dict[str, Any]
    source: str
    content_hash: str

    def load_into(self, model: torch.nn.Module) -> None:
        """Load the model's parameters and buffers; nothing is changed unless all of them fit.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or type.
        """
        state = model.state_dict()
        differences = {
            "lacks": sorted(set(state) - set(self.tensors)),
            "has unknown": sorted(set(self.tensors) - set(state)),
        }
        if problem := " and ".join(f"{what} {_abbreviate(names)}" for what, names in differences.items() if names):
            raise CheckpointError(
                f"{self.source}: the {self.kind} {problem}; it was saved by another version, train it again"
            )
        for name, tensor in self.tensors.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise CheckpointError(
                    f"{self.source}: tensor '{name}' is {_describe(tensor)}, the {self.kind} needs {_describe(state[name])}; "
                    f"its {CONFIG} does not belong to its weights"
                )
        model.load_state_dict(self.tensors)

    def check_embodiment(self, robot: RobotDescription) -> None:
        """Check that the model was trained for this robot, or for none in particular.

        Raises:
            CheckpointError: it was trained for another; the message names the differences.
        """
        if self.embodiment is None or self.embodiment.get("content_hash") == robot.content_hash:
            return
        raise CheckpointError(
            f"{self.source}: trained for '{self.embodiment.get('name', 'unnamed')}', which is not this '{robot.name}': "
            f"{_difference(self.embodiment, embodiment_record(robot))}; use the robot it was trained for, or train again"
        )

    def training_camera(self) -> Mapping[str, Any]:
        """The camera of all episodes of the training data, in a form of `Camera.from_dict`.

        Raises:
            CheckpointError: the data contain none, as recordings of real robots.
        """
        data = self.training.get("data") or {}
        cameras = (data.get("data_recipe") or {}).get("cameras") or {}
        camera: Mapping[str, Any] | None = cameras.get(data.get("image_key"))
        if camera is None:
            raise CheckpointError(f"{self.source}: its training data contain no camera; pass camera=")
        return camera


def embodiment_record(robot: RobotDescription) -> dict[str, Any]:
    """The record of a robot in a checkpoint: JSON values; limits in rad or m, None where unlimited."""

    def finite(values: Any) -> list[float | None]:
        return [float(x) if abs(float(x)) != float("inf") else None for x in values]

    return {
        "name": robot.name,
        "content_hash": robot.content_hash,
        "joint_names": list(robot.joint_names),
        "joint_types": list(robot.joint_types),
        "lower": finite(robot.lower),
        "upper": finite(robot.upper),
    }


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    embodiment: Mapping[str, Any] | None,
    training: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, or replace one, atomically.

    If the process dies at any moment, `load_checkpoint` finds either the old or the new checkpoint.

    Args:
        folder: the folder; its parent must exist. An existing folder must be a checkpoint itself.
        kind, config, tensors, embodiment, training: see `Checkpoint`.

    Raises:
        CheckpointError: a weight is not finite, a value is not JSON, or the folder contains other files.
    """
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise CheckpointError(f"{folder}: cannot be written, the folder {folder.parent} does not exist; make it first")
    refuse_other_files(folder)
    copied = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    _refuse_non_finite(copied, f"the {kind} to be saved in {folder}", "go back to an earlier state of the training")
    remove_stale_temporaries(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(temporary, copied, {"kind": kind, "config": config, "embodiment": embodiment, "training": training})
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(folder: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(dict(sorted(tensors.items())), folder / WEIGHTS)
    body = {"format": FORMAT, "format_version": VERSION, **document, "weights_sha256": _sha256(folder / WEIGHTS)}
    try:
        text = json.dumps(body, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the checkpoint's record is not JSON: {error}; use plain values") from None
    with atomic_write(folder / CONFIG) as path:
        path.write_text(text + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors creates a file that only its owner can read
    for file in (WEIGHTS, CONFIG):  # a rename may reach the disk before the content
        with open(folder / file, "rb") as stream:
            os.fsync(stream.fileno())


def _backup_folder(folder: Path) -> Path:
    """Place of the old checkpoint between the two renames of its replacement."""
    return folder.with_name(f".{folder.name}.previous")


def _replace_folder(new: Path, folder: Path) -> None:
    backup = _backup_folder(folder)
    if folder.exists():
        shutil.rmtree(backup, ignore_errors=True)
        os.replace(folder, backup)
    os.replace(new, folder)
    shutil.rmtree(backup, ignore_errors=True)


def refuse_other_files(folder: Path) -> None:
    """Check that a checkpoint may be saved there: files of another kind would be lost.

    Raises:
        CheckpointError: there are such files.
    """
    if not folder.exists():
        return
    foreign = sorted(x.name for x in folder.iterdir() if x.name not in (CONFIG, WEIGHTS)) if folder.is_dir() else ["it"]
    if foreign and (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: besides a checkpoint it holds {_abbreviate(foreign)}, which would be lost; move that or choose another"
        )
    if foreign:
        raise CheckpointError(
            f"{folder}: is not a checkpoint folder ({_abbreviate(foreign)}) and is not overwritten; choose another"
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        name_or_path: a folder; the name of a bundled checkpoint (see `bundled_names`); or a hub id, `user/repo` or
            `user/repo@revision`, of which only the two files are downloaded, and the scales of the reward if it has some.

    Raises:
        CheckpointError: it does not exist, is incomplete, damaged or of another format, or a weight is not finite.
    """
    folder, source = find_checkpoint(name_or_path)
    document = _read_config(folder / CONFIG)
    digest = _sha256(folder / WEIGHTS)
    if digest != document["weights_sha256"]:
        raise CheckpointError(
            f"{source}: {WEIGHTS} is not the file that was saved (its sha256 differs); download it again"
        )
    tensors = _read_tensors(folder / WEIGHTS)
    _refuse_non_finite(tensors, source, "it cannot be used, train it again")
    content = hashlib.sha256((folder / CONFIG).read_bytes() + digest.encode()).hexdigest()
    fields = {key: document[key] for key in ("kind", "config", "embodiment", "training")}
    return Checkpoint(**fields, tensors=tensors, source=source, content_hash=content)


def find_checkpoint(name_or_path: str | Path) -> tuple[Path, str]:
    """The folder of a checkpoint and its name in messages; arguments and errors as for `load_checkpoint`."""
    path = Path(name_or_path)
    if not path.exists() and _backup_folder(path).is_dir():
        path = _backup_folder(path)  # a replacement was interrupted between its two renames
    if path.is_dir():
        return _require_complete(path, str(path)), str(path)
    if path.suffix.lower() in (*_PICKLE_SUFFIXES, ".safetensors") or path.is_file():
        raise CheckpointError(
            f"{name_or_path}: a checkpoint is a folder with {CONFIG} and {WEIGHTS}; single files are not read"
        )
    name = str(name_or_path)
    if name in bundled_names():
        return _require_complete(bundled_folder("checkpoints") / name, name), f"bundled '{name}'"
    if isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        return _from_hub(name), name
    raise CheckpointError(
        f"no checkpoint '{name_or_path}': not a folder, and not a bundled one; {did_you_mean(name, bundled_names())}"
    )


def bundled_names() -> tuple[str, ...]:
    """Names of the checkpoints that come with jidm, sorted."""
    folder = bundled_folder("checkpoints")
    return tuple(sorted(x.parent.name for x in folder.glob(f"*/{CONFIG}"))) if folder.is_dir() else ()


def _require_complete(folder: Path, source: str) -> Path:
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if not missing:
        for file in (CONFIG, WEIGHTS):
            refuse_lfs_pointer(folder / file, CheckpointError)
        return folder
    pickled = sorted(x.name for x in folder.iterdir() if x.suffix.lower() in _PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{source}: holds {_abbreviate(pickled)}, which could run code when read, but no {' and no '.join(missing)}; "
            f"only safetensors are read"
        )
    raise CheckpointError(f"{source}: is not a checkpoint, it has no {' and no '.join(missing)}; give its folder")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS, REWARD_SCALES]
        )
    except Exception as error:  # the hub's client has dozens of exceptions, all of which mean that it is not available
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"no folder '{name}', and not available on the hub: {reason[:300]}") from error
    return _require_complete(Path(folder), name)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON: {error}; download or train the checkpoint again"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not the record of a {FORMAT}; give a folder written by jidm")
    if document.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {document.get('format_version')} is not {VERSION}; use the jidm that wrote it"
        )
    entries: dict[str, Any] = {
        "kind": str, "config": dict, "embodiment": (dict, type(None)), "training": dict, "weights_sha256": str
    }  # fmt: skip
    for key, kind in entries.items():
        if key not in document or not isinstance(document[key], kind):
            raise CheckpointError(
                f"{path}: its entry '{key}' is missing or of a wrong type; download or train it again"
            )
    return document


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file: {error}; download or train it again") from None


# ---- messages and checksums ------------------------------------------------------------------------------------------


def _difference(trained: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Description of the differences between two robots' records."""
    before, after = list(trained.get("joint_names", [])), list(now["joint_names"])
    removed, added = [x for x in before if x not in after], [x for x in after if x not in before]
    if removed or added:
        changes = {"removed": removed, "added": added}
        return "; ".join(f"joints {change}: {_abbreviate(names)}" for change, names in changes.items() if names)
    if before != after:
        moved = [x for x, y in zip(before, after) if x != y]
        return f"the same joints in another order, from {_abbreviate(moved)} on"
    changed = []
    for key, word in (("joint_types", "type"), ("lower", "lower limit"), ("upper", "upper limit")):
        for joint, old, new in zip(before, trained.get(key, []), now[key]):
            if not _same(old, new):
                changed.append(f"{word} of {joint} {_format_value(old)} -> {_format_value(new)}")
    if changed:
        return _abbreviate(changed)
    return (
        f"same joints and limits, but its shapes or its descriptor differ "
        f"(content hash {str(trained.get('content_hash'))[:12]}, now {now['content_hash'][:12]})"
    )


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return abs(old - new) <= 1e-9
    return bool(old == new)


def _format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else "none" if value is None else str(value)


def _abbreviate(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _refuse_non_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise CheckpointError(f"{what}: weights of {_abbreviate(bad)} are not finite; {remedy}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
