"""`jidm dataset`: summarize a recorded data set, or validate it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jidm.atomic_io import replaced_files
from jidm.cli.text import columns
from jidm.errors import DatasetError, JidmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jidm.datasets import RecordedDataset
    from jidm.datasets.image_motion import CameraSample
    from jidm.datasets.summary import DatasetSummary
    from jidm.robot.embodiment import Embodiment


@dataclass(frozen=True)
class Show:
    """Counts, joint space, steps, actions, cameras and recipe; with --out also plots."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a LeRobot data set (v3.0, v2.1, v2.0)."""

    out: Path | None = None
    """Folder for frames_<camera>.png, flow_<camera>.png and coverage.png."""

    embodiment: str | None = None
    """Robot whose joint limits define coverage; the recipe's robot if it is registered."""

    mesh_roots: tuple[Path, ...] = ()
    """Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path continues."""

    episodes: int = 6
    """Episodes per camera whose images are sampled; 0 = none."""

    flow: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Measure no optical flow in these images."""

    def run(self) -> int:
        from jidm.datasets import open_dataset
        from jidm.datasets.image_motion import sample_camera
        from jidm.datasets.summary import summarize_dataset

        dataset = open_dataset(self.folder)
        stats = summarize_dataset(dataset, _robot(dataset, self.embodiment, self.mesh_roots))
        camera_samples = {
            camera: sample_camera(dataset, camera, episodes=self.episodes, flow=self.flow)
            for camera in (dataset.cameras if self.episodes > 0 else ())
        }
        print("\n".join(_text(dataset, stats, camera_samples)))
        if self.out is not None:
            print(f"written to {self.out}/: {', '.join(_draw(dataset, stats, camera_samples, self.out))}")
        return 0


@dataclass(frozen=True)
class Validate:
    """Every problem on its own line, and notes on what is unusual; exit code 1 if there is a problem."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of a LeRobot data set (v3.0, v2.1, v2.0)."""

    embodiment: str | None = None
    """Robot to compare joints and limits with; the recipe's robot if it is registered."""

    mesh_roots: tuple[Path, ...] = ()
    """Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path continues."""

    decode: bool = False
    """Also decode every frame; slow, finds damage inside the videos."""

    def run(self) -> int:
        from jidm.datasets import open_dataset, validate_dataset

        try:
            robot = _robot(open_dataset(self.folder), self.embodiment, self.mesh_roots)
        except DatasetError:
            robot = None  # the validation below reports the problem
        problems = validate_dataset(self.folder, embodiment=robot, decode=self.decode)
        for problem in problems:
            print(problem)
        count = sum(not problem.is_note for problem in problems)
        print(f"{self.folder}: {f'{count} problem(s)' if count else 'no problem found'}")
        return 1 if count else 0


@dataclass(frozen=True)
class Dataset:
    """Summarize a recorded data set, or validate it."""

    action: Annotated[Show, tyro.conf.subcommand("show")] | Annotated[Validate, tyro.conf.subcommand("validate")]

    def run(self) -> int:
        return self.action.run()


def _robot(dataset: RecordedDataset, name: str | None, mesh_roots: tuple[Path, ...]) -> Embodiment | None:
    """The named robot, or the recipe's if it can be loaded."""
    from jidm.robot.registry import load_embodiment

    if name is not None:
        return load_embodiment(name, mesh_roots=mesh_roots)
    recorded = dataset.recipe.get("embodiment")
    try:
        return load_embodiment(recorded) if isinstance(recorded, str) else None
    except JidmError:
        return None


def _text(
    dataset: RecordedDataset, stats: DatasetSummary, camera_samples: dict[str, list[CameraSample]]
) -> Iterator[str]:
    from jidm.datasets.feature import ACTION, INDEX_COLUMNS, STATE

    seconds = stats.frames / dataset.fps
    shortest, median, longest = stats.lengths
    yield f"{dataset.root}: LeRobot {dataset.version}, robot {dataset.robot_type or 'not named'}"
    yield f"  episodes   {stats.episodes}, of {shortest} to {longest} frames (median {median})"
    if dataset.metadata.missing_tables:
        yield f"  missing    {len(dataset.metadata.missing_tables)} listed episodes have no table"
    yield f"  frames     {stats.frames} at {dataset.fps:g} per second: {seconds / 60:.1f} min"
    for camera in dataset.cameras:
        height, width = dataset.features[dataset.camera_key(camera)].shape[:2]
        yield f"  camera     {camera}: {width}x{height}"
    shown = sorted(stats.tasks.items(), key=lambda item: -item[1])[:5]
    for task, count in shown:
        yield f"  task       {task or '(none)'}: {count} episode(s)"
    if len(stats.tasks) > len(shown):
        yield f"             and {len(stats.tasks) - len(shown)} more"
    usual = (STATE, ACTION, *INDEX_COLUMNS)
    extra = [key for key in dataset.features if key not in usual and not dataset.features[key].is_image]
    yield f"  extras     {', '.join(extra) or 'none'}"
    yield f"  recipe     {', '.join(f'{k}={_truncate(v)}' for k, v in dataset.recipe.items()) or 'none'}"
    yield f"  hash       {dataset.content_hash}"
    yield ""
    joint_rows = [
        (j.name, f"{j.low:.4g}", f"{j.high:.4g}", f"{j.coverage:.0%}", f"{j.step_rms:.4g}", f"{j.step_max:.4g}", f"{j.moving_fraction:.0%}")
        for j in stats.joints
    ]  # fmt: skip
    yield columns([("JOINT", "LOW", "HIGH", "COVERED", "STEP RMS", "STEP MAX", "MOVING"), *joint_rows])
    within = "limits" if stats.uses_limits else "recorded range"
    yield f"covered: fraction of 20 bins of the {within}; of 10 x 10 bins of two joints {stats.pair_coverage:.0%} on average"
    yield "positions in rad or m as recorded, steps per frame; moving: fraction of steps above 1e-4"
    if stats.actions:
        yield ""
        ranges = [(name, f"{low:.4g}", f"{high:.4g}") for name, (low, high) in stats.actions.items()]
        yield columns([("ACTION", "LOW", "HIGH"), *ranges])
    for camera, samples in camera_samples.items():
        yield ""
        head = ("EPISODE", "REPEATED", "FLOW AT", "MOVING", "MEDIAN px", "95 % px", "WEIGHT")
        yield f"images of {camera}"
        yield columns([head, *map(_image_row, samples)])
    if camera_samples:
        yield "repeated: fraction of the faster half of the steps over which the image stays the same"
        yield "flow over one fast step; median, 95 % and weight (confidence) over pixels faster than 0.5 px"


def _image_row(sample: CameraSample) -> tuple[str, ...]:
    flow = ("",) * 5
    if (f := sample.flow) is not None:
        speeds = f"{f.speed:.2f}", f"{f.speed_p95:.2f}", f"{f.weight_moving:.2f}"
        flow = (str(f.frame), f"{f.moving_fraction:.0%}", *speeds)
    return (str(sample.episode), f"{sample.repeated_fraction:.0%}", *flow)


def _truncate(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _draw(
    dataset: RecordedDataset, stats: DatasetSummary, camera_samples: dict[str, list[CameraSample]], out: Path
) -> list[str]:
    """Write the figures, in place of those of an earlier call; returns the names of the files."""
    from jidm.visualization.dataset_plots import flow_sheet, frame_sheet, plot_coverage
    from jidm.visualization.image import write_image

    names = []
    with replaced_files(out, ("frames_*.png", "flow_*.png", "coverage.png")) as folder:
        for camera, samples in camera_samples.items():
            names.append(f"frames_{camera}.png")
            write_image(frame_sheet(samples), folder / names[-1])
            if flows := [s.flow for s in samples if s.flow is not None]:
                names.append(f"flow_{camera}.png")
                write_image(flow_sheet(flows), folder / names[-1])
        names.append("coverage.png")
        plot_coverage(stats, folder / "coverage.png", title=f"{dataset.root.name}: joint space visited")
    return names
