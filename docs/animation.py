"""Make docs/assets/decode.webp, the moving picture of the README, from the video that `jidm demo` draws.

    python docs/animation.py

Needs the extras sim and dev (Pillow writes the file).
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from jidm import read_video
from jidm.atomic_io import atomic_write
from jidm.cli.demo import Demo

ASSET = Path(__file__).resolve().parent / "assets" / "decode.webp"
FRAMES, WIDTH, FPS = 40, 480, 12.5


def main() -> None:
    with TemporaryDirectory() as folder:
        Demo(out=Path(folder) / "demo", frames=FRAMES).run()
        frames = read_video(Path(folder) / "demo" / "overlay.mp4").frames
    pixels = (np.asarray(frames.movedim(-3, -1)) * 255).round().astype(np.uint8)
    height = round(WIDTH * pixels.shape[1] / pixels.shape[2])
    images = [Image.fromarray(x).resize((WIDTH, height), Image.Resampling.LANCZOS) for x in pixels]
    with atomic_write(ASSET) as temporary, open(temporary, "wb") as file:
        images[0].save(
            file, format="WEBP", save_all=True, append_images=images[1:], duration=round(1000 / FPS), loop=0, quality=70
        )
    print(f"{ASSET}: {ASSET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
