"""Peak memory of decoding long videos from a file: it must not grow with length. Prints JSON.

    python benchmarks/memory.py                      # 10 minutes at 30 frames per second
    python benchmarks/memory.py --minutes 2 4        # shorter, to see that it does not grow
    python benchmarks/memory.py --refine photometric --minutes 1 2

Each decode runs in a process of its own, whose peak resident set is read when it ends.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import add_save, requirements, row, save

ROBOT, WIDTH, HEIGHT, FPS = "planar_finger_3", 160, 120, 30.0
LOOP = 60  # rendered frames, shown forwards and backwards again and again


def write_loop(path: Path, frames: int) -> list[float]:
    """A video of that many frames; returns the first pose."""
    from jidm import load_embodiment
    from jidm.sim import Scene, random_motion
    from jidm.video.io import write_video

    robot = load_embodiment(ROBOT)
    q = random_motion(robot, LOOP, 1 / FPS, 0)
    with Scene(robot) as scene:
        rgb = scene.render_video(q, robot.camera().resized(WIDTH, HEIGHT)).rgb
    there_and_back = [*range(LOOP), *range(LOOP - 2, 0, -1)]
    write_video(path, (rgb[there_and_back[k % len(there_and_back)]] for k in range(frames)), FPS)
    return [float(x) for x in q[0]]


def peak_mib() -> float:
    """Peak resident set of this process. Linux carries the parent's over into `ru_maxrss`, so not that where avoidable."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def decode(path: str, q0: list[float], refine: str) -> None:
    """What the child process does."""
    from jidm import JacobianIDM, load_embodiment
    from jidm.estimation.analytic_measurement import AnalyticOptions

    robot = load_embodiment(ROBOT)
    camera = robot.camera().resized(WIDTH, HEIGHT)
    idm = JacobianIDM.from_embodiment(robot, camera=camera, options=AnalyticOptions(refine=refine))  # type: ignore[arg-type]
    began = time.perf_counter()
    motion = idm.decode(path, q0=q0)
    print(
        json.dumps(
            {
                "frames": motion.frames,
                "valid": float(motion.valid.double().mean()),
                "seconds": round(time.perf_counter() - began, 1),
                "peak_rss_mib": round(peak_mib(), 1),
            }
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0])
    parser.add_argument("--refine", default="none", choices=("none", "photometric"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    add_save(parser)
    args = parser.parse_args()
    if args.child:
        decode(args.child[0], json.loads(args.child[1]), args.refine)
        return 0
    rows = []
    for minutes in args.minutes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "long.mp4"
            q0 = write_loop(path, round(minutes * 60 * FPS))
            command = [sys.executable, __file__, "--refine", args.refine, "--child", str(path), json.dumps(q0)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"minutes": minutes, **json.loads(answer.stdout)})
    report = {"benchmark": "memory", "refine": args.refine, "runs": rows}
    print(json.dumps(report, indent=2))
    refined = "flow only" if args.refine == "none" else args.refine
    figures = [
        row(
            ROBOT,
            "analytic",
            "peak_memory",
            x["peak_rss_mib"],
            case=f"{x['frames']:,} frames of {WIDTH}x{HEIGHT}, {refined}",
        )
        for x in rows
    ]
    save(args.save, "memory", figures, raw=report, seeds=(0,))
    lines = requirements("memory", figures)
    print("\n".join(line for line, _ in lines), file=sys.stderr)
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
