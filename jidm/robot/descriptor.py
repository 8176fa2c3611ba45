"""embodiment.toml, the file that describes one robot: read strictly and checked against its URDF.

name, title, license, source     texts; name is the folder's
urdf                             "robot.urdf" beside the file, or "package:path" of an installed pip package
control_dt                       control period [s]
tip_links, gripper_joints        names
[joints]                         names = the order of q; one number per joint in home, exploration_range, acceleration,
                                 jerk; lower, upper, velocity, effort only where the URDF lacks them or is wrong;
                                 reordered = true if names are not in the URDF's depth-first order
[locked]                         joint = value [rad or m] at which it is held
[notes]                          where each number comes from
[cameras.<name>]                 a look-at or matrix form of `Camera.from_dict`
[conventions.<name>]             arguments of `JointConvention.make`: order, and by joint sign, scale, offset, unit,
                                 normalized
[compose.<part>]                 embodiment, xyz [m], rpy [rad]: other robots on one base, instead of urdf and joints
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from jidm.errors import EmbodimentError, JidmError, MissingExtraError, did_you_mean
from jidm.robot import factory
from jidm.robot.composition import compose
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import JOINT_VECTORS, Embodiment
from jidm.robot.mesh_resolver import package_file, package_roots
from jidm.robot.model import RobotModel
from jidm.robot.transforms import rigid_transform
from jidm.robot.urdf.reader import read_urdf

DESCRIPTOR_FILE = "embodiment.toml"
_loading: ContextVar[tuple[Path, ...]] = ContextVar("descriptors being read", default=())
"""Guards against a robot that is composed of itself."""


def read_descriptor(path: str | Path, load_part: Callable[[str], Embodiment]) -> Embodiment:
    """The embodiment described by a folder's `embodiment.toml`.

    Args:
        path: the folder, or the file.
        load_part: returns the embodiment of a name, for the parts of a composed robot.

    Raises:
        EmbodimentError: unknown key, wrong length or type, or a contradiction with the URDF; the message names file and
            key.
        UrdfError: the URDF is malformed.
        MissingExtraError: the URDF is in a package that is not installed.
    """
    path = Path(path)
    path = path / DESCRIPTOR_FILE if path.is_dir() else path
    data = _read_toml(path)
    _check_schema(data, path)
    if (file := path.resolve()) in _loading.get():
        raise EmbodimentError(f"{path}: this robot is composed of itself; compose it of others")
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
    return factory.select_metadata({key: value for key, value in data.items() if key != "conventions"})


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
    _SCHEMA(data, str(path))
    for key in ("name", "title", "license", "source"):
        if key not in data:
            raise EmbodimentError(f"{path}: key '{key}' is missing")
    for key, part in data.get("compose", {}).items():
        if "embodiment" not in part:
            raise EmbodimentError(f"{path}: compose.{key} lacks embodiment, the name of the robot to mount")


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
            "write joints.reordered = true if that is intended"
        )


Check = Callable[[Any, str], None]
"""Takes a value and its place in the file (`<path>: joints.home`); raises EmbodimentError if the value is wrong."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _anything(value: Any, where: str) -> None:
    """Checked where it is used."""


def _boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise EmbodimentError(f"{where} must be true or false, without quotes")


def _text(value: Any, where: str) -> None:
    if not (isinstance(value, str) and value.strip()):
        raise EmbodimentError(f"{where} must be a text")


def _number(value: Any, where: str) -> None:
    if not _is_number(value):
        raise EmbodimentError(f"{where} must be a number")


def _names(value: Any, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise EmbodimentError(f"{where} must be a list of names")


def _numbers(length: int | None = None) -> Check:
    """A list of `length` numbers; without it any number of them, which is compared with the joints later."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not all(_is_number(x) for x in value) or (length and len(value) != length):
            raise EmbodimentError(f"{where} must be a list of {length or 'as many numbers as joints, all'} numbers")

    return check


def _each(check: Check) -> Check:
    """A table of any keys, all of one kind."""

    def check_table(table: Any, where: str) -> None:
        if not isinstance(table, dict):
            raise EmbodimentError(f"{where} must be a table")
        for key, value in table.items():
            check(value, f"{where}.{key}")

    return check_table


def _fields(checks: Mapping[str, Check], separator: str = ".") -> Check:
    """A table of known keys."""

    def check_table(table: Any, where: str) -> None:
        if not isinstance(table, dict):
            raise EmbodimentError(f"{where} must be a table")
        for key in table:
            if key not in checks:
                raise EmbodimentError(f"{where}: unknown key '{key}': {did_you_mean(key, checks)}")
        for key, value in table.items():
            checks[key](value, f"{where}{separator}{key}")

    return check_table


_CAMERA: dict[str, Check] = {
    "width": _anything, "height": _anything, "K": _anything, "T_camera_base": _anything, "fov_y": _anything,
    "eye": _numbers(3), "target": _numbers(3), "up": _numbers(3),
}  # fmt: skip
_CONVENTION: dict[str, Check] = {
    "order": _names, "sign": _each(_number), "scale": _each(_number), "offset": _each(_number), "unit": _each(_text),
    "normalized": _each(_numbers(2)),
}  # fmt: skip
_SCHEMA = _fields(
    {
        **dict.fromkeys(("name", "title", "license", "source", "urdf"), _text),
        "control_dt": _number,
        "tip_links": _names,
        "gripper_joints": _names,
        "joints": _fields({"names": _names, "reordered": _boolean, **dict.fromkeys(JOINT_VECTORS, _numbers())}),
        "locked": _each(_number),
        "notes": _each(_text),
        "cameras": _each(_fields(_CAMERA)),
        "conventions": _each(_fields(_CONVENTION)),
        "compose": _each(_fields({"embodiment": _text, "xyz": _numbers(3), "rpy": _numbers(3)})),
    },
    separator=": ",
)
