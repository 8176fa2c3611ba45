"""embodiment.toml: the file that describes one robot. Read strictly, checked against its URDF.

name, title, license, source     texts; name is the folder's
urdf                             "robot.urdf" beside the file, or "package:path" of an installed pip package
control_dt                       control period [s]
tip_links, gripper_joints        names
[joints]                         names = the order of q; home, exploration_range, acceleration, jerk (one number per joint);
                                 lower, upper, velocity, effort only where the URDF lacks them or is wrong;
                                 reordered = true if names are not in the URDF's depth-first order
[locked]                         joint = value [rad or m] it is held at
[notes]                          where each number comes from
[cameras.<name>]                 a look-at or matrix form of `Camera.from_dict`
[conventions.<name>]             order, and tables sign, scale, offset, unit, normalized by joint: `JointConvention.make`
[compose.<part>]                 embodiment, xyz [m], rpy [rad]: other robots on one base, instead of urdf and joints
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from jidm.errors import EmbodimentError, JidmError, MissingExtraError, did_you_mean
from jidm.robot import factory
from jidm.robot.composition import compose, rigid_transform
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import Embodiment
from jidm.robot.mesh_resolver import package_file, package_roots
from jidm.robot.model import RobotModel
from jidm.robot.urdf.reader import read_urdf

DESCRIPTOR_FILE = "embodiment.toml"
_loading: ContextVar[tuple[Path, ...]] = ContextVar("descriptors being read", default=())
_STRING_KEYS = ("name", "title", "license", "source", "urdf")
_NAME_LIST_KEYS = ("tip_links", "gripper_joints")
_TABLE_KEYS = ("joints", "locked", "notes", "cameras", "conventions", "compose")
_VECTOR_KEYS = ("home", "exploration_range", "acceleration", "jerk", "lower", "upper", "velocity", "effort")
_CAMERA_KEYS = ("width", "height", "K", "T_camera_base", "eye", "target", "up", "fov_y")
_CONVENTION_KEYS = ("order", "sign", "scale", "offset", "unit", "normalized")


def read_descriptor(path: str | Path, load_part: Callable[[str], Embodiment]) -> Embodiment:
    """The embodiment described by a folder's `embodiment.toml`.

    Args:
        path: the folder, or the file.
        load_part: gives the embodiment of a name, for the parts of a robot that is composed of others.

    Raises:
        EmbodimentError: unknown key, wrong length or type, or a contradiction with the URDF; names file and key.
        UrdfError: the URDF is malformed.
        MissingExtraError: the URDF is in a package that is not installed.
    """
    path = Path(path)
    path = path / DESCRIPTOR_FILE if path.is_dir() else path
    data = _read_toml(path)
    _check_schema(data, path)
    if (file := path.resolve()) in _loading.get():
        raise EmbodimentError(f"{path}: this robot is made of itself; compose it of others")
    token = _loading.set((*_loading.get(), file))
    try:
        return _build_composed(data, path, load_part) if "compose" in data else _build_single(data, path)
    except MissingExtraError:
        raise
    except JidmError as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path}: {text}") from None
    finally:
        _loading.reset(token)


def _build_single(data: dict[str, Any], path: Path) -> Embodiment:
    for key in ("urdf", "joints"):
        if key not in data:
            raise EmbodimentError(
                f"{path}: key '{key}' is missing; a descriptor has urdf and [joints], or [compose.<part>]"
            )
    urdf, roots = _locate_urdf(data["urdf"], path)
    model = read_urdf(urdf, mesh_roots=roots)
    joints, locked = dict(data["joints"]), dict(data.get("locked", {}))
    names = tuple(joints.pop("names", ()))
    _check_joints(model, names, locked, bool(joints.pop("reordered", False)), path)
    for key, values in joints.items():
        if len(values) != len(names):
            raise EmbodimentError(f"{path}: joints.{key} has {len(values)} values, joints.names has {len(names)}")
    types = {j.name: j.type for j in model.joints}
    conventions = _conventions(data, names, tuple(types[x] for x in names), path)
    return factory.embodiment_from_model(
        model, name=data["name"], joints=names, locked=locked, conventions=conventions,
        fingerprint=[factory.urdf_fingerprint(urdf, model), data], **joints, **_metadata(data),
    )  # fmt: skip


def _build_composed(data: dict[str, Any], path: Path, load_part: Callable[[str], Embodiment]) -> Embodiment:
    for key in ("urdf", "joints", "locked"):
        if key in data:
            raise EmbodimentError(f"{path}: a descriptor has {key} or [compose], not both")
    parts: dict[str, Any] = {}
    for prefix, part in data["compose"].items():
        embodiment = load_part(part["embodiment"])
        parts[prefix] = (embodiment, rigid_transform(part.get("xyz", (0, 0, 0)), part.get("rpy", (0, 0, 0))))
    composed = compose(data["name"], **parts)
    metadata = _metadata(data)
    if "cameras" in metadata:
        metadata["cameras"] = {**composed.cameras, **metadata["cameras"]}
    metadata["notes"] = {**composed.notes, **metadata.get("notes", {})}
    conventions = _conventions(data, composed.joint_names, composed.joint_types, path)
    return replace(
        composed,
        content_hash=factory.digest([composed.content_hash, data]),
        conventions={**composed.conventions, **conventions},
        **metadata,
    )


def _metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("title", "license", "source", "control_dt", "tip_links", "gripper_joints", "cameras", "notes")
    return {key: tuple(v) if isinstance(v := data[key], list) else v for key in keys if key in data}


def _locate_urdf(reference: str, path: Path) -> tuple[Path, list[Path]]:
    """The URDF file and the folders its meshes may lie in."""
    if ":" in reference:
        return package_file(reference), list(package_roots(reference))
    file = path.parent / reference
    if not file.is_file() or not file.resolve().is_relative_to(path.parent.resolve()):
        raise EmbodimentError(f"{path}: urdf '{reference}' is not there; put the file beside the descriptor")
    return file, [path.parent]


def _conventions(
    data: Mapping[str, Any], names: tuple[str, ...], types: tuple[str, ...], path: Path
) -> dict[str, JointConvention]:
    out = {}
    for key, table in data.get("conventions", {}).items():
        try:
            out[key] = JointConvention.make(names, joint_types=types, **table)
        except EmbodimentError as error:
            raise EmbodimentError(f"{path}: conventions.{key}: {error}") from None
    return out


# ---- checks ---------------------------------------------------------------------------------------------------------


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EmbodimentError(
            f"cannot read {path}: {error.strerror}; give a folder with an {DESCRIPTOR_FILE}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EmbodimentError(f"{path} is not TOML: {error}") from None


def _check_schema(data: dict[str, Any], path: Path) -> None:
    """Keys and types, before any meaning."""
    _check_keys(data, (*_STRING_KEYS, *_NAME_LIST_KEYS, *_TABLE_KEYS, "control_dt"), str(path))
    for key in ("name", "title", "license", "source"):
        if key not in data:
            raise EmbodimentError(f"{path}: key '{key}' is missing")
    for key in _STRING_KEYS:
        if key in data and not (isinstance(data[key], str) and data[key].strip()):
            raise EmbodimentError(f"{path}: {key} must be a text")
    for key in _NAME_LIST_KEYS:
        _check_names(data.get(key, []), f"{path}: {key}")
    for key in _TABLE_KEYS:
        if not isinstance(data.get(key, {}), dict):
            raise EmbodimentError(f"{path}: [{key}] must be a table")
    if not _is_number(data.get("control_dt", 1.0)):
        raise EmbodimentError(f"{path}: control_dt must be a number of seconds")
    joints = data.get("joints", {})
    _check_keys(joints, ("names", "reordered", *_VECTOR_KEYS), f"{path}: joints")
    _check_names(joints.get("names", []), f"{path}: joints.names")
    for key in _VECTOR_KEYS:
        if key in joints:
            _check_numbers(joints[key], None, f"{path}: joints.{key}")
    for key, value in data.get("locked", {}).items():
        if not _is_number(value):
            raise EmbodimentError(f"{path}: locked.{key} must be a number [rad or m]")
    for key, text in data.get("notes", {}).items():
        if not isinstance(text, str):
            raise EmbodimentError(f"{path}: notes.{key} must be a text")
    for key, camera in data.get("cameras", {}).items():
        where = f"{path}: cameras.{key}"
        _check_keys(camera, _CAMERA_KEYS, where)
        for vector in ("eye", "target", "up"):
            if vector in camera:
                _check_numbers(camera[vector], 3, f"{where}.{vector}")
    for key, table in data.get("conventions", {}).items():
        _check_convention(table, f"{path}: conventions.{key}")
    for key, part in data.get("compose", {}).items():
        where = f"{path}: compose.{key}"
        _check_keys(part, ("embodiment", "xyz", "rpy"), where)
        if not isinstance(part.get("embodiment"), str):
            raise EmbodimentError(f"{where} lacks embodiment, the name of the robot to mount")
        for vector in ("xyz", "rpy"):
            _check_numbers(part.get(vector, [0.0, 0.0, 0.0]), 3, f"{where}.{vector}")


def _check_convention(table: Any, where: str) -> None:
    _check_keys(table, _CONVENTION_KEYS, where)
    _check_names(table.get("order", []), f"{where}.order")
    for field in ("sign", "scale", "offset", "unit", "normalized"):
        values = table.get(field, {})
        if not isinstance(values, dict):
            raise EmbodimentError(f"{where}.{field} must be a table from joint to value")
        for joint, value in values.items():
            if field == "normalized":
                _check_numbers(value, 2, f"{where}.{field}.{joint}")
            elif field == "unit" and not isinstance(value, str):
                raise EmbodimentError(f"{where}.{field}.{joint} must be a text")
            elif field != "unit" and not _is_number(value):
                raise EmbodimentError(f"{where}.{field}.{joint} must be a number")


def _check_joints(
    model: RobotModel, names: tuple[str, ...], locked: Mapping[str, float], reordered: bool, path: Path
) -> None:
    free = [j.name for j in model.movable_joints if j.mimic is None]
    movable = [j.name for j in model.movable_joints]
    for name in (*names, *locked):
        if name not in movable:
            raise EmbodimentError(
                f"{path}: joint '{name}' is no movable joint of the URDF: {did_you_mean(name, movable)}"
            )
    if len(set(names)) != len(names):
        raise EmbodimentError(f"{path}: joints.names holds a name twice")
    if mimics := [name for name in names if name not in free]:
        raise EmbodimentError(f"{path}: joint '{mimics[0]}' is a mimic in the URDF; leave it out of joints.names")
    if forgotten := [name for name in free if name not in names and name not in locked]:
        raise EmbodimentError(f"{path}: joint '{forgotten[0]}' of the URDF is neither in joints.names nor in [locked]")
    in_order = [name for name in free if name in names]
    if list(names) != in_order and not reordered:
        raise EmbodimentError(
            f"{path}: joints.names is not in the URDF's order ({', '.join(in_order)}); "
            "say joints.reordered = true if that is meant"
        )


def _check_keys(table: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(table, dict):
        raise EmbodimentError(f"{where} must be a table")
    for key in table:
        if key not in (known := tuple(known)):
            raise EmbodimentError(f"{where}: unknown key '{key}': {did_you_mean(key, known)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_numbers(value: Any, length: int | None, where: str) -> None:
    if not isinstance(value, list) or not all(_is_number(x) for x in value) or (length and len(value) != length):
        raise EmbodimentError(f"{where} must be a list of {length or 'as many numbers as joints, all'} numbers")


def _check_names(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise EmbodimentError(f"{where} must be a list of names")
