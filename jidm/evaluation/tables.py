"""Evaluations as tables of text, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MODEL_COLUMNS = (
    ("nve", "NVE", ".3f"),
    ("nve_pairs", "NVE PAIRS", ".3f"),
    ("nve_smoothed", "SMOOTHED", ".3f"),
    ("action_mse", "ACTION MSE", ".2e"),
    ("position_share", "WITHIN {tolerance}", ".1%"),
    ("tip_error_mm", "TIP [mm]", ".1f"),
    ("correlation_mean", "CORR", ".3f"),
    ("flow_epe_px", "FLOW [px]", ".2f"),
    ("field_error_mean", "FIELD", ".2f"),
    ("coverage_68", "IN 68%", ".0%"),
    ("coverage_95", "IN 95%", ".0%"),
    ("valid_share", "VALID", ".0%"),
    ("frames_per_second", "FRAMES/S", ".1f"),
)
"""Key of the summary, heading and format of the columns for a model."""

_CORRUPTION_COLUMNS = (
    ("nve_clean", "NVE CLEAN", ".3f"),
    ("nve", "NVE", ".3f"),
    ("nve_rise", "RISE", ".2f"),
    ("nve_trusted_rise", "RISE TRUSTED", ".2f"),
    ("invalid_share", "INVALID", ".0%"),
    ("unobservable_share", "UNOBSERVABLE", ".0%"),
    ("widened_share", "WIDENED", ".0%"),
    ("coverage_95", "IN 95%", ".0%"),
)

MEANINGS = {
    "NVE": "mean |error| / mean |motion| of the steps of a video: 0 is perfect, 1 an answer of zero",
    "NVE PAIRS": "the same of every pair of frames by itself, without a given pose",
    "SMOOTHED": "NVE after smoothing over the whole video",
    "ACTION MSE": "mean squared error of a step [rad² or m²]",
    "WITHIN": "share of frames and joints whose position is off by less [rad or m]",
    "TIP [mm]": "mean error of the tip's position",
    "CORR": "correlation of decoded and true steps, mean over the joints that move",
    "FLOW [px]": "mean error of the network's optical flow on the robot",
    "FIELD": "relative error of the Jacobian field on the robot",
    "IN 68%": "share of errors inside the claimed 68 % interval; 68 % is right",
    "IN 95%": "share of errors inside the claimed 95 % interval; 95 % is right",
    "VALID": "share of steps that count as measured",
    "FRAMES/S": "speed of decoding",
    "EPISODES": "decoded episodes of all that were tried",
    "MSE RATIO": "action MSE of MODEL / that of OTHER: below 1, MODEL is better",
    "PAIRS": "the same of pairs of frames",
    "NVE CLEAN": "NVE on the images as recorded",
    "RISE": "NVE / NVE CLEAN",
    "RISE TRUSTED": "the same over steps that are valid and whose claimed deviation is not wider than usual",
    "INVALID": "share of steps marked as not valid",
    "UNOBSERVABLE": "share of joints and steps marked as not observable",
    "WIDENED": "share of steps whose claimed deviation is above the 95th percentile of the clean ones",
}
"""Heading of a column -> what it says; WITHIN stands without its tolerance."""


def legend(table: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    """A row for each column of a table that holds a number: its heading and what it says."""
    rows = []
    for heading, *cells in zip(*table, strict=True):
        meaning = MEANINGS.get(heading) or MEANINGS.get(heading.split()[0])
        if meaning is not None and any(cell != "-" for cell in cells):
            rows.append((heading, meaning))
    return rows


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of text: a header, then one row per model; "-" where a metric does not exist.

    Args:
        summaries: from `jidm.evaluation.summary.summarize`, one per model.
    """
    tolerance = next((f["tolerance"] for f in summaries if f.get("tolerance")), 0.05)
    rows = [("MODEL", *(heading.format(tolerance=tolerance) for _, heading, _ in MODEL_COLUMNS), "EPISODES")]
    for f in summaries:
        count = f"{f['episodes']}/{f['episodes'] + len(f['failed'])}"
        rows.append((str(f["name"]), *_cells(f, MODEL_COLUMNS), count))
    return rows


def comparison_table(comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of text: action MSE of one model divided by that of each other one.

    Args:
        comparisons: model -> result of `jidm.evaluation.summary.compare_models`.
    """
    rows: list[tuple[str, ...]] = [("MODEL", "OTHER", "MSE RATIO", "PAIRS", "SMOOTHED")]
    for model, others in comparisons.items():
        for other, ratios in others.items():
            cells = [ratios[f"action_mse{kind}_ratio"] for kind in ("", "_pairs", "_smoothed")]
            rows.append((model, other, *("-" if x is None else f"{x:.3f}" for x in cells)))
    return rows


def corruption_table(comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of text: how much the error rises under corruptions.

    Args:
        comparisons: corruption -> model -> result of `jidm.evaluation.summary.compare_corrupted`.
    """
    rows = [("CORRUPTION", "MODEL", *(heading for _, heading, _ in _CORRUPTION_COLUMNS))]
    for corruption, models in comparisons.items():
        for model, values in models.items():
            rows.append((corruption, model, *_cells(values, _CORRUPTION_COLUMNS)))
    return rows


def _cells(values: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    return ["-" if values.get(key) is None else format(values[key], form) for key, _, form in columns]
