"""`jidm evaluate`: trained models on held-out recordings; a table, a JSON file and plots."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jidm.atomic_io import replaced_files
from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.evaluation.config import EvalConfig
    from jidm.evaluation.evaluate import Evaluation
    from jidm.evaluation.held_out import HeldOut


@dataclass(frozen=True)
class Evaluate:
    """Measure trained models on held-out recordings."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CHECKPOINT ...]")]
    """Checkpoints: folders, bundled names or hub ids; the others are compared with the first."""

    data: Path
    """Data set (LeRobot v3.0, v2.1 or v2.0) with videos and joint positions, not used in training."""

    embodiment: str | None = None
    """Robot that was recorded: a name, a folder or a URDF; the one that the data set names if not given."""

    mesh_roots: tuple[Path, ...] = ()
    """Folders of the meshes of a URDF file, besides its own: a package, the folder above, or where a mesh's path continues."""

    out: Path = Path("jidm_evaluate")
    """Folder for evaluation.json and plots."""

    episodes: str = "all"
    """Episodes to use: 'all', numbers and ranges like '0-79,90', 'last-digit:1,6', 'every:10', 'not ...'."""

    limit: int | None = None
    """Use only this many of the chosen episodes."""

    image_key: str | None = None
    """Which of the data set's videos; the first if not given."""

    joints: tuple[str, ...] = ()
    """Joints to evaluate; all but grippers if not given."""

    stride: int = 1
    """Recorded frames per step."""

    frames: int | None = None
    """Largest number of frames of each episode."""

    corruptions: bool = False
    """Also evaluate with changed backgrounds, occlusion, JPEG and blur."""

    plots: int = 2
    """Episodes to plot: fields, and decoded and true curves."""

    def run(self) -> int:
        from jidm.cli.checks import check_at_least, check_checkpoint, check_exists, check_out_folder
        from jidm.cli.outputs import write_json
        from jidm.cli.text import columns

        if not self.checkpoints:
            raise InputError("name at least one checkpoint: jidm evaluate CKPT --data DIR")
        check_at_least(1, limit=self.limit, stride=self.stride)
        check_at_least(2, frames=self.frames)
        check_at_least(0, plots=self.plots)
        check_out_folder(self.out)
        for checkpoint in self.checkpoints:
            check_checkpoint(checkpoint)
        check_exists(self.data)
        from jidm.datasets import open_dataset
        from jidm.datasets.episode_selection import select_episodes
        from jidm.evaluation.config import EvalConfig
        from jidm.evaluation.held_out import HeldOut
        from jidm.evaluation.summary import compare_models, summarize
        from jidm.evaluation.tables import comparison_table, corruption_table, legend, summary_table
        from jidm.robot.registry import load_embodiment

        dataset = open_dataset(self.data)
        episodes = select_episodes(self.episodes, dataset.episode_indices)[: self.limit]
        config = EvalConfig(
            episodes=episodes, image_key=self.image_key, stride=self.stride, frames=self.frames, joints=self.joints or None
        )  # fmt: skip
        models = self._models(dataset, config)
        robot = None if self.embodiment is None else load_embodiment(self.embodiment, mesh_roots=self.mesh_roots)
        held_out = HeldOut(dataset, config, embodiment=robot)
        evaluations = self._evaluate(models, held_out)
        first = next(iter(evaluations))
        document: dict[str, Any] = {"models": [summarize(e) for e in evaluations.values()]}
        if len(evaluations) > 1:
            document["comparison"] = {first: compare_models(evaluations, first)}
        if self.corruptions:
            document["corruptions"] = self._corruptions(models, held_out, evaluations)
        with replaced_files(self.out, ("evaluation.json", "field_*.png", "curves_*.png")) as folder:
            write_json(folder / "evaluation.json", document)
            drawn = self._draw(held_out, evaluations, folder)
        tables = [summary_table(document["models"])]
        if "comparison" in document:
            tables.append(comparison_table(document["comparison"]))
        if "corruptions" in document:
            tables.append(corruption_table(document["corruptions"]))
        for table in tables:
            print(columns(table), *(f"  {line}" for line in columns(legend(table)).splitlines()), "", sep="\n")
        print(f"written to {self.out}/: evaluation.json{', ' if drawn else ''}{', '.join(drawn)}")
        return 0 if all(e.episodes for e in evaluations.values()) else 1

    def _models(self, dataset: Any, config: EvalConfig) -> dict[str, Any]:
        """Label -> IDM; checkpoints with equal names are labeled by their whole path."""
        from jidm.checkpoint import load_checkpoint
        from jidm.datasets.episode_selection import describe_episodes
        from jidm.model_registry import load_idm

        names = [Path(where).name or where for where in self.checkpoints]
        models = {}
        for name, where in zip(names, self.checkpoints, strict=True):
            label = name if names.count(name) == 1 else where
            checkpoint = load_checkpoint(where)
            models[label] = load_idm(checkpoint)
            data = checkpoint.training.get("data", {})
            if data.get("data_hash") == dataset.content_hash:
                trained_on = sorted({*data.get("train_episodes", ()), *data.get("validation_episodes", ())})
                if known := [k for k in config.episodes or () if k in trained_on]:
                    print(
                        f"jidm: {label} was trained on {describe_episodes(known)} of these; choose others",
                        file=sys.stderr,
                    )
        return models

    def _evaluate(self, models: dict[str, Any], held_out: HeldOut, corruption: Any = None) -> dict[str, Evaluation]:
        from jidm.evaluation.evaluate import evaluate

        out = {}
        for label, idm in models.items():
            out[label] = evaluate(idm, held_out, name=label, corruption=corruption)
            for index, problem in out[label].failed.items():
                print(f"jidm: {label}: episode {index} failed: {problem}", file=sys.stderr)
        return out

    def _corruptions(self, models: dict[str, Any], held_out: HeldOut, clean: dict[str, Evaluation]) -> dict[str, Any]:
        from jidm.evaluation.corruptions import CORRUPTIONS
        from jidm.evaluation.summary import compare_corrupted

        out: dict[str, Any] = {}
        for name, corruption in CORRUPTIONS.items():
            corrupted = self._evaluate(models, held_out, corruption)
            out[name] = {label: compare_corrupted(clean[label], corrupted[label]) for label in models}
        return out

    def _draw(self, held_out: HeldOut, evaluations: dict[str, Evaluation], folder: Path) -> list[str]:
        """Plot the first episodes into a folder; returns the names of the files."""
        from jidm.visualization.field_plots import write_field_sheet
        from jidm.visualization.plot import plot_motion

        written = []
        for index in held_out.episodes[: self.plots]:
            motions: dict[tuple[str, ...], dict[str, Any]] = {}
            for label, evaluation in evaluations.items():
                episode = next((e for e in evaluation.episodes if e.index == index), None)
                if episode is None:
                    continue
                names = evaluation.joint_names
                motions.setdefault(names, {"truth": episode.q.numpy()})[label] = episode.motion
                if (sample := episode.largest_motion_sample) is not None:
                    written.append(f"field_{label.replace('/', '_')}_{index:06d}.png")
                    exact = {"exact": sample.jacobian, "exact_mask": sample.mask, "exact_flow": sample.flow}
                    title = f"{label}, episode {index}, frame {sample.frame}"
                    write_field_sheet(
                        folder / written[-1], sample.image, sample.prediction, names, **exact, title=title
                    )
            # Models with different joints cannot share axes.
            for k, same in enumerate(motions.values()):
                written.append(f"curves_{index:06d}{f'_{k}' if k else ''}.png")
                truth = same.pop("truth")
                plot_motion(same, folder / written[-1], truth=truth, title=f"episode {index}")
        return written
