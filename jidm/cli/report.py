"""`jidm report`: one page about one video: what was decoded, and what speaks against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from jidm.cli.score import ModelArgs


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML page about how executable the motion in a video is."""

    video: tyro.conf.Positional[Path]
    """Video file."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """What judges."""

    scales: Path | None = None
    """Scales of good videos, written by `jidm calibrate`; those beside the checkpoint if not given."""

    out: Path = Path("report.html")
    """The page."""

    def run(self) -> int:
        from jidm.video.io import read_video
        from jidm.visualization.report import write_report

        config = self.model.reward_config(self.scales, self.video)
        reward = config.build()
        score, analysis = reward.explain(self.video, q0=config.initial_pose(str(self.video)), fps=self.model.fps)
        assert score.motion is not None and score.by_step is not None
        write_report(
            self.out, title=self.video.name, frames=read_video(self.video).frames, motion=score.motion,
            limits=(analysis.lower.double().numpy(), analysis.upper.double().numpy(), analysis.velocity.double().numpy()), reward=float(score.reward),
            metrics={"EVA's reward": score.eva, **(score.penalties or {})}, by_step=score.by_step,
            unexplained=analysis.residuals.unexplained_map, misplaced=analysis.residuals.misplaced_map, reasons=score.reasons,
        )  # fmt: skip
        print(f"{self.video}: {float(score.reward):.2f} of 10; written to {self.out}")
        for reason in score.reasons:
            print(f"  {reason}")
        return 0
