"""`jidm report`: one page about one video: what was decoded, and what speaks against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from jidm.cli.score import Judge


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML page about how executable the motion in a video is."""

    video: tyro.conf.Positional[Path]
    """Video file."""

    judge: tyro.conf.OmitArgPrefixes[Judge] = field(default_factory=Judge)
    """What judges."""

    calibration: Path | None = None
    """Scales of good videos, written by `jidm calibrate`; those beside the checkpoint if not given."""

    out: Path = Path("report.html")
    """The page."""

    def run(self) -> int:
        from jidm.motion.video import read_video
        from jidm.view.report import write_report

        recipe = self.judge.recipe(self.calibration, self.video)
        reward = recipe.make()
        score, reading = reward.explain(self.video, q0=recipe.start(str(self.video)), fps=self.judge.fps)
        assert score.motion is not None and score.by_step is not None
        write_report(
            self.out, title=self.video.name, frames=read_video(self.video).frames, motion=score.motion,
            limits=(reading.lower.double().numpy(), reading.upper.double().numpy(), reading.velocity.double().numpy()), reward=float(score.reward),
            figures={"EVA's reward": score.eva, **(score.penalties or {})}, by_step=score.by_step,
            unexplained=reading.seen.unexplained_at, misplaced=reading.seen.misplaced_at, reasons=score.reasons,
        )  # fmt: skip
        print(f"{self.video}: {float(score.reward):.2f} of 10; written to {self.out}")
        for reason in score.reasons:
            print(f"  {reason}")
        return 0
