"""Scoring 1,000 clips while processes are killed: is anything lost, or scored twice? Prints JSON.

    python benchmarks/reward_killed.py --out plain.jsonl
    python benchmarks/reward_killed.py --ray --out ray.jsonl

Plain: the process is killed (SIGKILL) after 200 and after 500 videos and started again. With Ray and two workers: a
worker is killed after 150 videos, the driver after 400, and a worker of the next driver after 600. The newest process
named ray::MapWorker is killed, so run this where no other job uses Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import add_save, rows, save
from reward_validity import FPS, EpisodeGenerator

from jidm.json_lines import parse_json_lines
from jidm.video.io import write_video

_CHECKPOINT, _SEED = "panda-sim", 4900
_CLIPS, _RENDERED, _FRAMES, _SIDE = 1000, 20, 8, 128
_PLAIN, _RAY = (200, 500), (150, 400, 600)


def write_clips(folder: Path) -> None:
    """Many files of a few clips: their content does not matter here."""
    generator = EpisodeGenerator("panda", _SEED, side=_SIDE, frames=_FRAMES)
    for k in range(_RENDERED):
        write_video(folder / f"{k:04d}.mp4", generator.episode(k).rendering.rgb, FPS)
    for k in range(_RENDERED, _CLIPS):
        os.link(folder / f"{k % _RENDERED:04d}.mp4", folder / f"{k:04d}.mp4")


def score_while_killing(folder: Path, out: Path, ray: bool) -> dict[str, Any]:
    """Score them all, with the killing."""
    command = [sys.executable, "-m", "jidm.cli", "score", str(folder), "--checkpoint", _CHECKPOINT, "--out", str(out)]
    command += ["--ray", "local", "--workers", "2"] if ray else []

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_until(count: int) -> int:
        while (there := out.read_bytes().count(b"\n") if out.exists() else 0) < count:
            if process.poll() is not None:
                raise SystemExit(f"ended with {process.returncode} after {there} videos")
            time.sleep(0.2)
        return there

    def kill_driver() -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    process, at = started(), []
    for k, count in enumerate(_RAY if ray else _PLAIN):
        at.append(wait_until(count))
        if ray and k != 1:
            subprocess.run(["pkill", "-9", "-n", "-f", "ray::MapWorker"], check=True)
            continue
        kill_driver()
        process = started()
    code = process.wait()
    videos = [line["video"] for line in parse_json_lines(out.read_text(encoding="utf-8"))]
    return {"killed_at": at, "exit_status": code, "lines": len(videos), "videos": len(set(videos)), "of": _CLIPS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="on a local cluster of two workers")
    parser.add_argument("--out", type=Path, required=True, help="file of scores; must not be there")
    add_save(parser)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already; name another")
    with tempfile.TemporaryDirectory() as temporary:
        write_clips(Path(temporary))
        found = score_while_killing(Path(temporary), args.out, args.ray)
    print(json.dumps(found, indent=1))
    measured = {"lines": found["lines"], "videos": found["videos"], "exit_status": found["exit_status"]}
    case = "Ray, workers and driver killed in turn" if args.ray else "process killed twice"
    note = f"{_CLIPS:,} clips of {_FRAMES} frames, {_SIDE}x{_SIDE}; killed by SIGKILL at videos {found['killed_at']}."
    figures = rows("panda", "ours", measured, case=case)
    save(args.save, "reward_killed", figures, raw=found, seeds=(_SEED,), note=note)
