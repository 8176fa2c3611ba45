"""Public modules, names and command-line flags use the field's standard terms, not private ones that need translating."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jidm"

# Names that were in use once, and what stands in their place.
PRIVATE = {
    "decode_whole": "decode(..., smooth=True)", "told": "correct", "looking_back": "smooth", "remembers": "keep_history",
    "step_pairs": "predict_steps", "fitted": "letterbox", "flow_side": "flow_resolution", "explained": "explained_fraction",
    "belief": "kalman", "looks": "refinement", "learned_step": "step_estimation", "relinearise": "gauss_newton",
    "bounded_solve": "solve_box_qp", "atlas": "reference_appearance", "outline": "contour", "first_pose": "initialization",
    "CloserLook": "RefinementStage", "StepField": "JacobianPredictor", "SeenAt": "FieldEvaluation", "Matched": "FlowMeasurement",
    "Compared": "PhotometricMeasurement", "Rim": "SilhouetteBoundary", "livelier": "adapt_process_noise",
    "unlike": "photometric_error", "carry_back": "warp", "persistence": "velocity_time_constant", "surprise": "process_noise_floor",
    "repeats": "correlation_length", "confused": "max_unexplained", "lasting": "use_reference_appearance", "excused": "part_scale",
    "easing": "annealing", "step_spread": "step_std_scale", "state_spread": "pose_std_scale", "guess": "step_regression",
    "GuessHead": "StepRegressionHead", "looks_closer": "use_refinement", "Encoded": "Features", "PairHead": "CorrelationHead",
    "carried": "warp_frame", "timed": "timestamps", "video_flow": "flow_source", "both_ways": "bidirectional", "films": "clips",
    "film": "video_file", "together": "distributed", "estimated": "flow_cache", "zoo": "model_registry", "journal": "logger",
    "optimiser": "optimizer", "conditions": "corruptions", "exact_view": "ground_truth", "field_probe": "field_metrics",
    "told_start": "given_initial_pose", "Measured": "Prediction", "evidence": "video_residuals",
    "judge": "score", "universal": "lingbot_format", "contract": "handshake", "coast": "hold", "dream": "generated video",
    "things": "objects", "look": "appearance", "artifacts": "failures", "freespace": "collision", "framing": "camera_placement",
    "backdrop": "textures", "Stage": "Recorder", "survey": "summary", "listing": "metadata", "cropped": "crop_fraction",
    "most_behind": "max_tracking_error", "colour": "color", "grey": "gray", "centre": "center", "licence": "license",
    "normalise": "normalize", "neighbour": "neighbor", "linearise": "linearize",
}  # fmt: skip
# Words that are ordinary English elsewhere, but once named a file.
MODULES = {
    "build", "mount", "contour", "resources", "files", "cluster", "fit", "layout", "choose", "tracks", "follow", "track", "smooth",
    "rows", "bounded", "background", "brightness", "align", "forward", "learned", "guess", "matching", "recording", "loop",
    "objective", "prepare", "scores", "reading", "labels", "quantiles", "take", "world", "truth", "reach", "stage", "meta", "read",
    "write", "check", "view", "learn", "adapters", "motion", "solve", "field", "data",
}  # fmt: skip
ALLOWED_MODULES = {
    "estimation.factors.contour",
    "estimation.factors.learned",  # the factors of a learned field
    "baselines.matching",  # the matching network of a baseline
    "sim.motion",  # random joint motion
    "training.data",  # the training data pipeline
}


def defined_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Public classes, functions, parameters and attributes that a file defines, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id, item.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield argument.arg, argument.lineno


def private_names(root: Path) -> list[str]:
    """One line for every definition below `root` under a name that needs translating."""
    found = []
    for file in sorted(root.rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        name = module.rpartition(".")[2]
        if (name in MODULES or name in PRIVATE) and module not in ALLOWED_MODULES:
            found.append(f"module {module}")
        for name, line in defined_names(ast.parse(file.read_text(encoding="utf-8"))):
            if name in PRIVATE:
                found.append(f"{file.relative_to(root)}:{line}: '{name}' is {PRIVATE[name]}")
    return found


def test_names_are_those_of_the_field() -> None:
    assert not private_names(PACKAGE), "\n".join(private_names(PACKAGE))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("solve.py", ""),
        ("robot/build.py", ""),
        ("a.py", "def f(persistence: float): ..."),
        ("a.py", "class CloserLook: ..."),
        ("a.py", "class A:\n    remembers: bool = False"),
        ("a.py", "class A:\n    def told(self): ..."),
    ],
)
def test_a_private_name_is_seen(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(source)
    assert len(private_names(tmp_path)) == 1


def test_flags_are_those_of_the_field() -> None:
    from jidm.cli import VERBS

    private = {f"--{name.replace('_', '-')}" for name in PRIVATE} | {
        "--field-camera",
        "--calibration",
        "--view",
        "--keep",
        "--detail",
    }
    for verb in VERBS:
        done = subprocess.run([sys.executable, "-m", "jidm.cli", verb, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, (verb, done.stderr)
        flags = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
        assert not flags & private, (verb, flags & private)
