"""Logs a run: lines on the screen, JSON lines in its folder, and TensorBoard where that is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jidm.atomic_io import atomic_write


class RunLogger:
    """Writes `log.jsonl` into a run's folder.

    Args:
        folder: of the run.
        step: that the run continues from; lines of later steps, left by an interrupted session, are dropped.
        report: gets a readable line for each logged one.
    """

    def __init__(self, folder: Path, step: int, report: Callable[[str], None]) -> None:
        self.file, self.report = folder / "log.jsonl", report
        kept = [line for line in _lines(self.file) if line["step"] <= step]
        with atomic_write(self.file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._writer = _tensorboard(folder / "tensorboard", step)

    def log(self, part: str, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Log one line: part ("train" or "validation"), step, time used up so far [s], values by name."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(
                json.dumps({"part": part, "step": step, "seconds": round(seconds, 3), "values": dict(values)}) + "\n"
            )
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{part}/{name}", value, step)
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "progress")
        progress = f" ({100 * values['progress']:.0f} %)" if "progress" in values else ""
        if values:
            self.report(f"step {step}{progress} {part}: {shown}")

    def log_image(self, file: Path, step: int) -> None:
        """Add an image file to TensorBoard."""
        if self._writer is None or not file.exists():
            return
        import cv2

        if (pixels := cv2.imread(str(file))) is not None:
            self._writer.add_image("images", pixels[..., ::-1].copy(), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of earlier sessions; an incomplete line is ignored."""
    records = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)
