"""`jidm rank`: the best of many scored videos, and a contact sheet to check the order by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jidm.errors import InputError


@dataclass(frozen=True)
class Rank:
    """Sort scored videos, best first: rejection sampling, best of N."""

    scores: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SCORES ...]")]
    """Files written by `jidm score`, all shards together."""

    best: int | None = None
    """List only this many."""

    by: str = "reward"
    """Sort by reward, or by eva (EVA's own reward)."""

    out: Path = Path("ranking.png")
    """Contact sheet: a row per video, best first."""

    rows: int = 16
    """Largest number of rows of the contact sheet."""

    def run(self) -> int:
        from jidm.cli.checks import check_at_least, check_out_file
        from jidm.cli.text import columns

        if not self.scores:
            raise InputError("name at least one file of scores; write it with `jidm score`")
        check_at_least(1, best=self.best, rows=self.rows)
        check_out_file(self.out)
        for path in self.scores:
            if not path.is_file():
                raise InputError(f"{path}: no such file; write it with `jidm score`")
        if self.by not in ("reward", "eva"):
            raise InputError(f"--by must be reward or eva, got '{self.by}'")
        from jidm.rewards.scoring import read_scores
        from jidm.visualization.contact_sheet import write_contact_sheet

        records = {record["video"]: record for path in self.scores for record in read_scores(path)}
        if len({record.get("config_hash") for record in records.values()}) > 1:
            raise InputError("these files hold scores of different rewards, which cannot be compared")
        scored = [record for record in records.values() if not record.get("problem")]
        if not scored:
            raise InputError("none of the videos could be scored; see `problem` in the files")
        ordered = sorted(scored, key=lambda record: (-float(record[self.by]), record["video"]))[: self.best]
        table = [("", "video", "reward", "EVA's", "first reason")]
        table += [
            (str(k + 1), r["video"], f"{r['reward']:.2f}", f"{r['eva']:.2f}", next(iter(r["reasons"]), ""))
            for k, r in enumerate(ordered)
        ]
        print(columns(table))
        if len(scored) < len(records):
            print(f"{len(records) - len(scored)} videos that could not be scored are left out")
        shown = [(r["video"], f"{k + 1}.  {r[self.by]:.2f}  {Path(r['video']).name}") for k, r in enumerate(ordered)]
        write_contact_sheet(self.out, shown[: self.rows])
        print(f"written to {self.out}")
        return 0
