"""`jidm doctor`: check which packages are installed and work, and what to install."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from threading import Timer

from jidm.errors import install_command

CORE = (
    "torch", "numpy", "scipy", "roma", "trimesh", "opencv-python-headless", "av", "pillow", "pyarrow", "safetensors", "huggingface_hub",
    "tyro", "tqdm", "matplotlib", "defusedxml", "jaxtyping",
)  # fmt: skip
EXTRAS = {
    "robots": ("example-robot-data", "pycollada"),
    "sim": ("pybullet", "example-robot-data", "pycollada"),
    "raft": ("torchvision",),
    "train": ("lightning", "tensorboard", "kornia"),
    "control": ("clarabel",),
    "serve": ("clarabel", "websockets", "msgpack", "prometheus-client"),
    "ray": ("ray",),
    "view": ("viser",),
    "pytorch3d": ("pytorch3d",),
}
_REMEDY = {
    "pytorch3d": "no Linux wheel exists; build it from source for your torch: "
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/pytorch3d.git'",
    "torchvision": "torchvision must match the installed torch; install both together from one index: "
    "pip install -c constraints.txt torch torchvision",
    "opencv-python-headless": "opencv-python and opencv-python-headless overwrite each other: "
    "uninstall both, then pip install opencv-python-headless",
}


@dataclass(frozen=True)
class Probe:
    """A functional check of a package.

    Attributes:
        name: function in `jidm.cli.probes`.
        label: the function that is checked.
        package: required package; the probe is skipped if it is not installed.
        extra: the extra that the package belongs to; None for a core package.
    """

    name: str
    label: str
    package: str
    extra: str | None = None


PROBES = (
    Probe("torch", "tensors", "torch"),
    Probe("gpu", "GPU", "torch", "a CUDA build of torch"),
    Probe("flow", "DIS flow", "opencv-python-headless"),
    Probe("video", "video files", "av"),
    Probe("sim", "simulator", "pybullet", "sim"),
    Probe("meshes", "robot files", "example-robot-data", "robots"),
    Probe("torchvision", "RAFT flow", "torchvision", "raft"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; status is ok, missing, none (nothing to check) or broken."""

    label: str
    status: str
    detail: str


@dataclass(frozen=True)
class Doctor:
    """Check which packages are installed and work, and what to install."""

    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        from jidm import __version__

        groups = {"core": CORE, **EXTRAS}
        packages = {group: {name: installed_version(name) for name in names} for group, names in groups.items()}
        findings = [*missing(packages), *run_probes()]
        system = {"jidm": __version__, "python": platform.python_version(), "platform": platform.platform()}
        if self.json:
            print(json.dumps({**system, "packages": packages, "findings": [asdict(f) for f in findings]}, indent=2))
        else:
            print("jidm {jidm}, Python {python}, {platform}\n".format(**system))
            print("\n".join(_text(packages, findings)))
        return 1 if any(finding.status == "broken" for finding in findings) else 0


def installed_version(package: str) -> str | None:
    """Version of an installed package, None if it is not installed; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing(packages: dict[str, dict[str, str | None]]) -> list[Finding]:
    """A finding for every package that is not installed: broken for a core package, missing for one of an extra."""
    found = []
    for group, versions in packages.items():
        for name in (name for name, number in versions.items() if number is None):
            if group == "core":
                found.append(Finding(name, "broken", f"pip install '{name}'"))
            elif group == "pytorch3d":
                found.append(Finding(name, "missing", _REMEDY[name]))
            else:
                found.append(Finding(name, "missing", install_command(group)))
    return found


def run_probes(probes: Sequence[Probe] = PROBES, *, limit: float = 60.0) -> list[Finding]:
    """Run every probe whose package is installed.

    One process runs them one after the other, because loading torch takes most of the time. A probe that kills the process
    or hangs is broken, and another process runs the rest.

    Args:
        probes: to run.
        limit: timeout of each [s].
    """
    waiting = [probe for probe in probes if installed_version(probe.package) is not None]
    found: list[Finding] = []
    while waiting:
        answers, problem = _run_process([probe.name for probe in waiting], limit)
        found += [_finding(probe, answer) for probe, answer in zip(waiting, answers)]
        waiting = waiting[len(answers) :]
        if waiting and problem:
            found.append(_finding(waiting.pop(0), {"status": "broken", "detail": problem}))
    return found


def _run_process(names: list[str], limit: float) -> tuple[list[dict[str, str]], str]:
    """The answers of the probes up to the one that ended the process, and what happened to that one."""
    command = [sys.executable, "-c", f"from jidm.cli.probes import run; run({names!r})"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        answers, hung = [], False

        def stop() -> None:
            nonlocal hung
            hung = True
            process.kill()

        while True:
            timer = Timer(limit, stop)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            with contextlib.suppress(ValueError):  # other packages print to standard output, too
                answers.append(json.loads(line))
        code = process.wait()
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if hung:
        return answers, f"no answer after {limit:g} s"
    if code < 0:
        return answers, f"the process was killed by signal {-code}"
    return answers, lines[-1] if lines else "no output"


def _finding(probe: Probe, answer: dict[str, str]) -> Finding:
    if answer["status"] != "broken":
        return Finding(probe.label, answer["status"], answer["detail"])
    remedy = _REMEDY.get(probe.package, f"try pip install --force-reinstall '{probe.package}'")
    return Finding(probe.label, "broken", f"{answer['detail']}; {remedy}")


def _text(packages: dict[str, dict[str, str | None]], findings: list[Finding]) -> list[str]:
    lines = []
    for group, versions in packages.items():
        there = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        lines.append(f"{group:<10} {there or '(not installed)'}")
    width = max(len(f.label) for f in findings)
    lines += ["", *(f"{f.label:<{width}}  {f.status:<7}  {f.detail}" for f in findings if f.status != "missing")]
    absent = [f for f in findings if f.status == "missing"]
    if absent:
        lines += ["", "not installed; needed only for the extra named"]
        lines += [f"{f.label:<{width}}  {f.detail}" for f in absent]
    return lines
