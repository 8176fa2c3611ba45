"""Decoding speed of a trained field beside EVA's ResNet-50 at the size of its paper, in one run. Prints JSON.

    python benchmarks/decode_speed.py panda-sim --data held_out

The time from images in memory to joint motion is counted, flow matching included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from results import add_save, row, save

from jidm import JacobianIDM
from jidm.baselines import EvaIDM
from jidm.baselines.idm import BaselineIDM
from jidm.datasets import open_dataset
from jidm.evaluation.evaluate import HeldOut
from jidm.fields.free import LearnedField
from jidm.training.data.batch import JointStats


def decode_speed(checkpoint: str, data: str, rounds: int = 7) -> dict[str, Any]:
    """Decoding frame by frame, ours at its size and EVA's ResNet-50 at 512 x 512, in turns; medians of the rounds."""
    idm = JacobianIDM.from_pretrained(checkpoint)
    assert isinstance(idm.field, LearnedField) and idm.embodiment is not None
    c = idm.field.config
    stats = JointStats(c.q_mean, c.q_std, c.delta_std, c.q_lower, c.q_upper)
    eva = BaselineIDM(EvaIDM.from_data(c.joint_names, c.joint_types, 512, 512, stats, size="resnet50"))
    dataset = open_dataset(data)
    clip = HeldOut(dataset).clip(dataset.episode_indices[0], c.joint_names)
    video = clip.letterbox(*c.input_size).video[:33]
    large = torch.nn.functional.interpolate(video[:5], size=(512, 512), mode="bilinear")

    def rate(decoder: Any, frames: torch.Tensor) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            decoder.decode(frames, q0=clip.q[0], fps=clip.fps)
        return len(frames) / (time.perf_counter() - began)

    rate(idm, video[:5]), rate(eva, large[:2])  # the first call pays for memory
    pairs = [(rate(idm, video), rate(eva, large)) for _ in range(rounds)]
    ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    return {
        "embodiment": idm.embodiment.name,
        "ours_frames_per_second": ours,
        "ours_pixels": [c.height, c.width],
        "ours_image": list(c.input_size),
        "eva_resnet50_512_frames_per_second": theirs,
        "ratio": ours / theirs,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder, bundled name or hub id")
    parser.add_argument("--data", required=True, help="data set with videos of that robot")
    add_save(parser)
    args = parser.parse_args()
    found = decode_speed(args.checkpoint, args.data)
    print(json.dumps(found, indent=1))
    figures = [
        row(found["embodiment"], "learned", "frames_per_second", found["ours_frames_per_second"]),
        row(found["embodiment"], "eva_resnet50_512", "frames_per_second", found["eva_resnet50_512_frames_per_second"]),
    ]
    save(args.save, "decode_speed", figures, raw=found, note="Frame by frame, flow matching included.")
