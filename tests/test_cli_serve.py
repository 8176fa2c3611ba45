"""`jidm serve` as a process: prints its address, answers, stops on SIGTERM, and reports errors in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("websockets")
pytest.importorskip("prometheus_client")

from rendered import clip

from jidm.cli import main
from jidm.serving import Client, ServerError


def test_a_server_starts_answers_and_stops(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    command = [sys.executable, "-m", "jidm.cli", "serve", "--checkpoint", "finger-5", "--port", "0", "--action", "joint_delta",
               "--token-file", str(tmp_path / "token")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(re.search(r"ws://127\.0\.0\.1:(\d+), joint_delta of 5 joints", line)[1])  # type: ignore[index]
        with pytest.raises(ServerError, match="401"):
            Client(port=port)
        with Client(port=port, token="s3cret") as client:
            assert client.metadata["checkpoint"] == "bundled 'finger-5'"
            noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
            with pytest.raises(ServerError, match="does not look like this robot"):
                client.infer({"image": noise})
            answer = client.infer({"image": clip("planar_finger_5", 3).rgb})
        assert answer["actions"].shape == (8, 5) and np.isfinite(answer["actions"]).all()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--layout", "lingbot_va"], "name the side"),
        (["--token-file", "absent"], "cannot read the token"),
        (["--control-rate", "0"], "--control-rate 0"),
        (["--chunk", "0"], "chunk"),
        (["--action-horizon", "0"], "--action-horizon 0"),
        (["--action-horizon", "3"], "one frame gives 4 actions"),
        (["--action-horizon", "8", "--chunk", "2"], "need a chunk of 1"),
        (["--handshake", "vera"], "which view to send"),
        (["--checkpoint", "finger-6"], "finger-6"),
        (["--host", "192.0.2.1"], "cannot listen"),
    ],
)
def test_wrong_settings_are_errors_of_one_line(
    wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = wrong if "--checkpoint" in wrong else ["--checkpoint", "finger-5", *wrong]
    assert main(["serve", *given]) == 1
    error = capsys.readouterr().err
    assert words in error and len([line for line in error.splitlines() if line.startswith("jidm:")]) == 1
