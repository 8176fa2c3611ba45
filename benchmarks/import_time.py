"""Time of `import jidm` with its main names, over the time of `import torch`; and whether `jidm --help` loads torch.

Runs are interleaved, so that a busy machine slows both alike; the figure is the ratio of medians. Exit status 1 where
that is too much.

    python benchmarks/import_time.py [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from results import add_save, requirements, row, save

PROGRAMS = {
    "torch": "import torch",
    "jidm": "import jidm; jidm.JacobianIDM, jidm.Embodiment, jidm.Camera, jidm.JointMotion",
    "help": "import sys; from jidm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)",
}


def seconds(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    add_save(parser)
    args = parser.parse_args()
    runs = args.runs
    for program in PROGRAMS.values():
        seconds(program)  # fills the disk cache and writes the byte code
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(runs):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["jidm"] / medians["torch"]
    figures = {f"{name}_s": round(value, 3) for name, value in medians.items()}
    report = {"benchmark": "import_time", "ratio": round(ratio, 3), **figures, "runs": runs}
    print(json.dumps(report))
    measured = [row("any", "package", "import_ratio", ratio, case="import jidm")]
    save(args.save, "import_time", measured, raw=report)
    lines = requirements("import-time", measured)
    print("\n".join(line for line, _ in lines), file=sys.stderr)
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
