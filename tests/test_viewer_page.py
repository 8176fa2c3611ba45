"""The page of the viewer in a headless browser, on a wide screen and on a phone; skipped where there is no Chromium."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from viewer_runs import decode_folder

pytestmark = pytest.mark.slow
pytest.importorskip("viser", reason="the viewer needs viser: pip install 'jidm[view]'")
pytest.importorskip("websockets", reason="the browser is driven over a websocket")

SIZES = {"wide": (1280, 800, False), "phone": (390, 844, True)}
# viser frees the data of a picture that is replaced before the browser has loaded it, and Chromium reports that.
HARMLESS = ("net::ERR_FILE_NOT_FOUND blob:",)

PICTURES = "[...document.querySelectorAll('img')].filter(x => x.src.startsWith('blob:') && x.naturalWidth > 300)"
SHEET = f"{PICTURES}[0]"
JOINT = "[...document.querySelectorAll('input.mantine-Select-input')].filter(x => x.offsetParent)[0]"
# The picture as the browser shows it.
SHEET_DATA = f"""(() => {{
    const picture = {SHEET}; if (!picture || !picture.complete || !picture.naturalWidth) return null;
    const canvas = document.createElement('canvas'); canvas.width = picture.naturalWidth; canvas.height = picture.naturalHeight;
    canvas.getContext('2d').drawImage(picture, 0, 0); return canvas.toDataURL()}})()"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """`jidm view` in a process of its own, as a terminal starts it."""
    folder = decode_folder(tmp_path_factory.mktemp("run") / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "jidm.cli", "view", str(folder), "--port", "0"], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=_default_interrupt,
    )  # fmt: skip
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


def _default_interrupt() -> None:
    """A process started in the background ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def url(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None and server.stderr is not None
    line = server.stdout.readline()
    assert "http://127.0.0.1:" in line, server.stderr.read()
    return line.split(": ")[-1].split()[0]


@pytest.fixture(params=list(SIZES))
def page(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium or Chrome in PATH: the page cannot be opened")
    width, height, phone = SIZES[request.param]
    with Browser(chromium, tmp_path / "profile", width, height, phone=phone) as browser:
        browser.open(url)
        browser.wait_for(f"document.querySelector('canvas') && {SHEET_DATA}", timeout=90)
        yield browser


def test_the_page_loads_and_its_controls_change_the_picture(page: Browser):
    """Loads without errors; the slider moves the picture, and the joint selector changes the picture of the field."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    first = page.wait_for(SHEET_DATA)
    slider = "document.querySelector('[role=slider]')"
    start = int(page.evaluate(f"{slider}.getAttribute('aria-valuenow')"))
    page.evaluate(f"{slider}.focus()")
    page.press("ArrowRight" if start < 3 else "ArrowLeft")
    page.wait_for(f"{slider}.getAttribute('aria-valuenow') != '{start}'")
    moved = page.wait_for(_changed(first))

    other = page.evaluate(f"{JOINT}.value")
    page.click(JOINT)
    options = "[...document.querySelectorAll('[role=option]')].filter(x => x.getBoundingClientRect().width)"
    page.wait_for(f"{options}.length")
    page.click(f"{options}.find(x => x.textContent != '{other}')")
    page.wait_for(f"{JOINT}.value != '{other}'")
    page.wait_for(_changed(moved))
    errors = [text for text in page.problems if not any(harmless in text for harmless in HARMLESS)]
    assert not errors


def test_play_moves_the_slider_to_the_end(page: Browser):
    slider = "document.querySelector('[role=slider]')"
    play = "[...document.querySelectorAll('button')].find(x => /^(Play|Pause)/.test(x.innerText.trim()))"
    page.wait_for(f"{play} && true")
    page.click(play)
    last = page.evaluate(f"{slider}.getAttribute('aria-valuemax')")
    page.wait_for(f"{slider}.getAttribute('aria-valuenow') == '{last}'", timeout=90)
    page.wait_for(f"({play}).innerText.trim() == 'Play'")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of a console")
def test_interrupt_ends_it_cleanly(server: subprocess.Popen[str], url: str):
    assert url
    time.sleep(0.2)
    server.send_signal(signal.SIGINT)
    out, err = server.communicate(timeout=60)
    assert server.returncode == 0 and out == "" and err == ""


def _changed(before: str) -> str:
    """The picture as soon as it is another one."""
    return f"(() => {{const now = {SHEET_DATA}; return now && now != {before!r} ? now : null}})()"
