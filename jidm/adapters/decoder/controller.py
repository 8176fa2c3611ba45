"""The control loop around a video planner: while one chunk of its dream is executed, the next one is dreamt and read.

Planning takes about as long as executing a chunk, so waiting for it halves the pace. Dreaming on from the last dream keeps the
pace and loses the robot, which never did exactly what was dreamt. LingBot-VA's way (its Algorithm 2) is to dream from what the
robot will see when the chunk under way is done: its last real frame, carried there by a forward model. Ours is the field.

A forward model errs, so a dream begins a little elsewhere than the robot does; and following a dream drifts. So while it is
executed, what the robot sees is compared with what the dream showed for now, and what is left of it moves by the difference.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jidm.adapters.decoder.commands import Commands
from jidm.adapters.decoder.decoder import ActionDecoder
from jidm.adapters.decoder.reader import PoseReader, Reading, as_frames
from jidm.errors import InputError, JidmError, did_you_mean
from jidm.field.forward import carried

Mode = Literal["sync", "async_naive", "async_grounded"]
MODES: tuple[str, ...] = get_args(Mode)

Planner = Callable[[Tensor], Any]
"""From a frame (3, H, W) in [0, 1] to the frames that follow it, in any layout `as_video` takes."""

Forward = Callable[[Tensor, NDArray[np.float64], NDArray[np.float64]], Tensor]
"""From a frame (3, H, W), joint positions (n,) and steps (k, n) to the frame after them."""


@dataclass(frozen=True, eq=False)
class _Dream:
    """What planning brought: K frames, their readings after that of the real one they begin with, if they do; or why there is
    none. How long each part took [s]."""

    frames: Float[Tensor, "K 3 H W"] | None
    readings: list[Reading]
    problem: str
    seconds: dict[str, float]

    @property
    def last(self) -> Tensor | None:
        """The last frame; nobody dreams on from one that shows nothing."""
        return None if self.frames is None or self.readings[-1].position is None else self.frames[-1]


class AsyncController:
    """Commands for every control period, whatever the planner does.

    Call `reset` once, then `step` every control period with what the robot sees and measures. Planning and reading run in
    another thread; `step` itself only solves for a chunk's motion now and then (some milliseconds). A planner that is late,
    raises, or hands over what is no video leads to braking and holding, and is asked again from what is real by then.

    Args:
        planner: dreams on from a frame.
        decoder: of the robot; used by nobody else.
        mode: "sync" waits for each dream, at rest; "async_naive" dreams on from the dream; "async_grounded" from where the
            robot will be.
        blend: frames over which a dream that does not begin where the motion is takes it over.
        forward: carries a frame along; the decoder's field by default.
        planning, comparing: run these two; a thread of its own each by default.

    Raises:
        InputError: no such mode.
    """

    def __init__(
        self, planner: Planner, decoder: ActionDecoder, *, mode: str = "async_grounded", blend: int = 2,
        forward: Forward | None = None, planning: Executor | None = None, comparing: Executor | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise InputError(f"no mode '{mode}': {did_you_mean(mode, MODES)}")
        self.planner, self.decoder, self.mode, self.blend = planner, decoder, mode, blend
        self._forward = forward or self._by_field
        self._planning = planning or ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._comparing = comparing or ThreadPoolExecutor(1, thread_name_prefix="comparer")
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """How long planning, carrying, reading, comparing, following and a whole step took, each time [s]."""

    def reset(self, frame: Any, q: ArrayLike, *, layout: str | None = None) -> None:
        """Begin, with the robot at rest.

        Args:
            frame: what it sees. q: (n,) joint positions [rad or m]. layout: of frames, as for `as_video`.
        """
        self.decoder.reset(q)
        self._layout = layout
        self._frame = self._one(frame)
        self._q = self._shown = np.array(q, dtype=np.float64)
        self._queue: Commands | None = None
        self._next = 0
        self._job: Future[_Dream] | None = None
        self._done = 0  # frames of the dream that is followed
        self._off = np.zeros(len(self._q))  # by so much it was moved
        self._comparison: Future[NDArray[np.float64] | None] | None = None
        self._asked = 0.0
        self._followed: _Dream | None = None
        self._problem = ""
        self.seconds.clear()

    def step(self, frame: Any = None, q: ArrayLike | None = None) -> Commands:
        """The command of this control period.

        Args:
            frame: what the robot sees now, where there is a new frame. q: (n,) what it measures, where it does.
        """
        began = time.perf_counter()
        if q is not None:
            self._q = np.array(q, dtype=np.float64)
        elif self.decoder.position is not None:
            self._q = self._expected()
        if frame is not None:
            self._frame, self._shown = self._one(frame), self._q
        if self._left == 0:
            self._go_on(sees=frame is not None)
        if self._left == 0:
            self._continue(measured=q is not None)
        if self._left == 0:
            command = self.decoder.coast(1, self._why())
        else:
            assert self._queue is not None
            command = self._queue[self._next : self._next + 1]
            self._next += 1
        self.seconds["step"].append(time.perf_counter() - began)
        return command

    def report(self) -> str:
        """Where the time goes: a line for each part, median and 99th percentile [ms]."""
        rows = [f"{'part':<10}{'p50 [ms]':>10}{'p99 [ms]':>10}{'times':>8}"]
        for name, values in self.seconds.items():
            middle, high = np.percentile(np.array(values) * 1000, [50, 99])
            rows.append(f"{name:<10}{middle:>10.1f}{high:>10.1f}{len(values):>8}")
        return "\n".join(rows)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    @property
    def _left(self) -> int:
        """Commands that are still to be executed."""
        return 0 if self._queue is None else len(self._queue) - self._next

    def _expected(self) -> NDArray[np.float64]:
        """Where the robot is by the commands given so far, if nobody measures."""
        if self._queue is not None and 0 < self._next <= len(self._queue):
            return self._queue.position[self._next - 1]
        assert self.decoder.position is not None
        return self.decoder.position

    def _continue(self, *, measured: bool) -> None:
        """The chunk is done: take the next dream if it is there, and ask for the one after it."""
        if measured and self.decoder.time > 0:
            self.decoder.observe(self._q)
        if self._job is not None and self._job.done():
            dream, self._job = self._job.result(), None
            for part, seconds in dream.seconds.items():
                self.seconds[part].append(seconds)
            self._problem, self._followed = dream.problem, dream if dream.readings else None
            self._done, self._off, self._comparison = 0, 0 * self._off, None
            self.decoder.lead(dream.readings, blend=self.blend)
            self._more()
        if self._job is None and (self._left == 0 or self.mode != "sync"):
            self._ask()

    def _ask(self) -> None:
        """Have the next chunk dreamt and read in the background."""
        self._asked = time.perf_counter()
        steps = self._under_way()
        frame, q = self._frame, self._shown
        last = self._followed.last if self._followed is not None and self.mode == "async_naive" else None

        def dream() -> _Dream:
            return self._dream(frame, q, steps, last)

        self._job = self._planning.submit(dream)

    def _go_on(self, *, sees: bool) -> None:
        """A frame's commands are done: take those of the next one, if the dream has one."""
        if self._followed is None:
            return
        self._done += 1
        if self._comparison is not None and self._comparison.done():
            off, self._comparison = self._comparison.result(), None
            if off is not None:
                self.decoder.correct(off - self._off)
                self._off = off
        if sees and self._comparison is None and self.mode != "async_naive":
            self._compare()
        self._more()
        if self._left == 0:
            self._followed = None

    def _more(self) -> None:
        """Commands for the next frame of the dream."""
        began = time.perf_counter()
        self._queue, self._next = self.decoder.more(self._time_of(self._done + 1)), 0
        self.seconds["follow"].append(time.perf_counter() - began)

    def _time_of(self, frame: int) -> float:
        """When so many frames of the dream are done [s of the motion]."""
        count = 0 if self._followed is None or self._followed.frames is None else len(self._followed.frames)
        return self.decoder.led - (count - frame) / self.decoder.video_rate

    def _compare(self) -> None:
        """Have what the robot sees compared with what the dream showed for now."""
        dream = self._followed
        if dream is None or dream.frames is None or self._done >= len(dream.frames):
            return
        seen, q, dreamt = self._frame, self._shown, dream.frames[self._done - 1]
        read = dream.readings[self._done - 1 - len(dream.frames)].position

        def compare() -> NDArray[np.float64] | None:
            began = time.perf_counter()
            reader = PoseReader(self.decoder.idm, self.decoder.video_rate)
            reader.begin(q)
            reader.read(seen, "CHW")
            shown = reader.read(dreamt, "CHW")[0].position
            self.seconds["compare"].append(time.perf_counter() - began)
            return None if shown is None or read is None else shown - read

        self._comparison = self._comparing.submit(compare)

    def _under_way(self) -> NDArray[np.float64]:
        """(k, n) from the last real frame on, where the dream that is followed leads, frame by frame [rad or m]."""
        if self._followed is None or self._followed.frames is None:
            return np.zeros((0, len(self._q)))
        times = [self._time_of(k) for k in range(self._done + 1, len(self._followed.frames) + 1)]
        return np.diff(np.concatenate([self._shown[None], self.decoder.wanted(times)]), axis=0)

    def _dream(self, frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64], last: Tensor | None) -> _Dream:
        """Runs in the background: uses the decoder's reader and nothing else of it."""
        clock, seconds = [time.perf_counter()], {}

        def lap(part: str) -> None:
            clock.append(time.perf_counter())
            seconds[part] = clock[-1] - clock[-2]

        reader = self.decoder.reader
        try:
            begins: list[Reading] = []
            if last is None:
                if len(steps):
                    frame = self._forward(frame, q, steps)
                    lap("carry")
                reader.begin(q + steps.sum(0))
                begins = reader.read(frame, "CHW")
            else:
                frame = last
            frames = as_frames(self.planner(frame))
            lap("plan")
            if frames.shape[1:] != frame.shape:
                raise InputError(
                    f"the planner's frames are {tuple(frames.shape[1:])}, the robot's {tuple(frame.shape)}"
                )
            readings = [*begins, *reader.read(frames, "TCHW")]
            lap("read")
            return _Dream(frames, readings, "", seconds)
        except Exception as error:  # whatever the planner does, the robot is held
            told = str(error) if isinstance(error, JidmError) else f"{type(error).__name__}: {error}"
            return _Dream(None, [], f"the planner failed: {told}", seconds)

    def _by_field(self, frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64]) -> Float[Tensor, "3 H W"]:
        field = self.decoder.idm.field
        like = getattr(field, "delta_std", None)
        dtype = torch.float64 if like is None else like.dtype
        return carried(field, frame, torch.tensor(q, dtype=dtype), torch.tensor(steps, dtype=dtype))

    def _one(self, frame: Any) -> Float[Tensor, "3 H W"]:
        return as_frames(frame, self._layout)[0]

    def _why(self) -> str:
        if self._problem:
            return self._problem
        return f"waiting for the planner since {time.perf_counter() - self._asked:.2f} s"
