"""Read URDF files written by others and compare with pinocchio. Prints JSON; --markdown writes the page of the docs.

    python benchmarks/urdf_conformance.py --markdown docs/urdf_conformance.md

Where the third-party files are absent, only those of installed robot packages are read (--packages).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from results import add_save, material, rows, save  # noqa: E402
from urdf_oracle import PinocchioModel, disagreements  # noqa: E402

from jidm.atomic_io import atomic_write  # noqa: E402
from jidm.errors import UrdfError  # noqa: E402
from jidm.robot.mesh_resolver import package_roots  # noqa: E402
from jidm.robot.urdf.reader import read_urdf  # noqa: E402

PACKAGES = ("example_robot_data", "pybullet_data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=material("urdf_conformance"), help="holds real/ and edge/")
    parser.add_argument("--packages", action="store_true", help="the robots of installed packages as well")
    parser.add_argument("--poses", type=int, default=20, help="random poses compared per file")
    parser.add_argument("--markdown", type=Path, help="write the page of the docs here")
    add_save(parser)
    args = parser.parse_args()

    sets: dict[str, tuple[Path, tuple[Path, ...]]] = {}
    if args.folder.is_dir():
        sets |= {name: (args.folder / name, ()) for name in ("real", "edge")}
    if args.packages or not sets:
        sets |= {name: (package_roots(f"{name}:")[-1], package_roots(f"{name}:")) for name in PACKAGES}
    report = {
        name: summary([check_file(path, root, roots, args.poses) for path in urdfs(root)])
        for name, (root, roots) in sets.items()
    }
    print(json.dumps(report, indent=2))
    if args.markdown:
        with atomic_write(args.markdown) as temporary:
            temporary.write_text(page(report), encoding="utf-8")
    listed = "refused", "loaded_here_only"  # these are on the page that --markdown writes
    raw = {name: {k: v for k, v in found.items() if k not in listed} for name, found in report.items()}
    save(args.save, "urdf_conformance", figures(report), raw=raw, seeds=(0,))


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result."""
    made = []
    for name, x in report.items():
        measured = {
            "files": x["files"],
            "files_loaded": x["loaded"],
            "files_compared": x["compared"],
            "joint_disagreements": len(x["joint_disagreements"]),
            "limit_disagreements": len(x["limit_disagreements"]),
            "origin_error_m": x["largest_difference_m"],
            "orientation_error": x["largest_difference_rad"],
        }
        made += rows(name, "urdf", measured) + rows(name, "pinocchio", {"files_loaded": x["loaded_by_pinocchio"]})
    return made


def urdfs(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() == ".urdf")


def check_file(path: Path, root: Path, roots: tuple[Path, ...], poses: int) -> dict[str, Any]:
    """One file: refused or not, here and there, and where both read it, what they disagree about."""
    row: dict[str, Any] = {"file": path.relative_to(root).as_posix()}
    try:
        reference = PinocchioModel(path)
    except Exception as error:  # pinocchio raises ValueError, RuntimeError or its own
        reference = None
        row["pinocchio_refuses"] = str(error).replace(f"{path}", "").splitlines()[0]
    try:
        model = read_urdf(path, mesh_roots=roots)
    except UrdfError as error:
        return row | {"refused": str(error).removeprefix(f"{path}: ")}
    row |= {"links": len(model.links), "joints": len(model.movable_joints)}
    return row if reference is None else row | {"compared": disagreements(model, reference, poses=poses)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    compared = {row["file"]: row["compared"] for row in rows if "compared" in row}
    return {
        "files": len(rows),
        "loaded": sum("refused" not in row for row in rows),
        "loaded_by_pinocchio": sum("pinocchio_refuses" not in row for row in rows),
        "compared": len(compared),
        "links": sum(row["links"] for row in rows if "links" in row),
        "movable_joints": sum(row["joints"] for row in rows if "joints" in row),
        "joint_disagreements": {file: x["joints"] for file, x in compared.items() if x["joints"]},
        "limit_disagreements": {file: x["limits"] for file, x in compared.items() if x["limits"]},
        "largest_difference_m": max((x["meters"] for x in compared.values()), default=None),
        "largest_difference_rad": max((x["radians"] for x in compared.values()), default=None),
        "refused": [
            {
                "file": row["file"],
                "reason": row["refused"],
                "pinocchio": "refuses" if "pinocchio_refuses" in row else "loads",
            }
            for row in rows
            if "refused" in row
        ],
        "loaded_here_only": [row["file"] for row in rows if "refused" not in row and "pinocchio_refuses" in row],
    }


INTRODUCTION = """# URDF files written by others

Written by `python benchmarks/urdf_conformance.py --packages --markdown docs/urdf_conformance.md`; do not edit.

`real`: a third of [urdf_files_dataset](https://github.com/Daniella1/urdf_files_dataset) (81f4cdac), without meshes.
`edge`: odd and malformed files from the test suites of drake, sdformat, pinocchio and yourdfpy. The other two are the
robots in the pip packages example-robot-data and pybullet. Every file that both load is compared with pinocchio: the
names of its movable joints, the limits of each, and the poses of all links at random joint positions.
"""


def page(report: dict[str, Any]) -> str:
    lines = [
        INTRODUCTION,
        "| files | number | loaded | by pinocchio | compared | joints differ | limits differ | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, x in report.items():
        worst = f"{x['largest_difference_m']:.1e} m, {x['largest_difference_rad']:.1e} rad"
        counts = (x["files"], x["loaded"], x["loaded_by_pinocchio"], x["compared"])
        differ = (len(x["joint_disagreements"]), len(x["limit_disagreements"]))
        lines.append(f"| {name} | {' | '.join(map(str, (*counts, *differ)))} | {worst} |")
    for name, x in report.items():
        lines += ["", f"## Refused in `{name}`", "", "| file | reason | pinocchio |", "|---|---|---|"]
        for row in x["refused"]:
            reason = row["reason"] if len(row["reason"]) < 240 else row["reason"][:237] + "..."
            lines.append(f"| {row['file']} | {reason.replace('|', ' ').replace('<', '&lt;')} | {row['pinocchio']} |")
        if x["loaded_here_only"]:
            lines += ["", "Loaded here and refused by pinocchio: " + ", ".join(x["loaded_here_only"]) + "."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
