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

from jidm.control.commands import Commands
from jidm.control.decoder import ActionDecoder
from jidm.control.reader import PoseMeasurement, PoseTracker, as_frames
from jidm.errors import InputError, JidmError, did_you_mean
from jidm.fields.warp import warp_frame

Mode = Literal["sync", "async_naive", "async_grounded"]
MODES: tuple[str, ...] = get_args(Mode)

Planner = Callable[[Tensor], Any]
"""From a frame (3, H, W) in [0, 1] to the frames that follow it, in any layout `as_video` takes."""

ForwardModel = Callable[[Tensor, NDArray[np.float64], NDArray[np.float64]], Tensor]
"""From a frame (3, H, W), joint positions (n,) and steps (k, n) to the frame after them."""


@dataclass(frozen=True, eq=False)
class _GeneratedChunk:
    """What planning brought: K frames, their readings after that of the real one they begin with, if they do; or why there is
    none. How long each part took [s]."""

    frames: Float[Tensor, "K 3 H W"] | None
    measurements: list[PoseMeasurement]
    problem: str
    timings: dict[str, float]

    @property
    def last_frame(self) -> Tensor | None:
        """The last frame; nobody dreams on from one that shows nothing."""
        return None if self.frames is None or self.measurements[-1].position is None else self.frames[-1]


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
        forward_model: ForwardModel | None = None, planning_executor: Executor | None = None, comparison_executor: Executor | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise InputError(f"no mode '{mode}': {did_you_mean(mode, MODES)}")
        self.planner, self.decoder, self.mode, self.blend = planner, decoder, mode, blend
        self._forward_model = forward_model or self._warp_by_field
        self._planning_executor = planning_executor or ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._comparison_executor = comparison_executor or ThreadPoolExecutor(1, thread_name_prefix="comparer")
        self.timings: dict[str, list[float]] = defaultdict(list)
        """How long planning, carrying, reading, comparing, following and a whole step took, each time [s]."""

    def reset(self, frame: Any, q: ArrayLike, *, layout: str | None = None) -> None:
        """Begin, with the robot at rest.

        Args:
            frame: what it sees. q: (n,) joint positions [rad or m]. layout: of frames, as for `as_video`.
        """
        self.decoder.reset(q)
        self._layout = layout
        self._frame = self._as_frame(frame)
        self._q = self._q_at_frame = np.array(q, dtype=np.float64)
        self._queue: Commands | None = None
        self._queue_index = 0
        self._pending_chunk: Future[_GeneratedChunk] | None = None
        self._frames_done = 0  # frames of the dream that is followed
        self._applied_correction = np.zeros(len(self._q))  # by so much it was moved
        self._pending_comparison: Future[NDArray[np.float64] | None] | None = None
        self._request_time = 0.0
        self._active_chunk: _GeneratedChunk | None = None
        self._problem = ""
        self.timings.clear()

    def step(self, frame: Any = None, q: ArrayLike | None = None) -> Commands:
        """The command of this control period.

        Args:
            frame: what the robot sees now, where there is a new frame. q: (n,) what it measures, where it does.
        """
        began = time.perf_counter()
        if q is not None:
            self._q = np.array(q, dtype=np.float64)
        elif self.decoder.position is not None:
            self._q = self._expected_position()
        if frame is not None:
            self._frame, self._q_at_frame = self._as_frame(frame), self._q
        if self._remaining == 0:
            self._advance_frame(has_frame=frame is not None)
        if self._remaining == 0:
            self._start_next_chunk(measured=q is not None)
        if self._remaining == 0:
            command = self.decoder.hold(1, self._hold_reason())
        else:
            assert self._queue is not None
            command = self._queue[self._queue_index : self._queue_index + 1]
            self._queue_index += 1
        self.timings["step"].append(time.perf_counter() - began)
        return command

    def report(self) -> str:
        """Where the time goes: a line for each part, median and 99th percentile [ms]."""
        rows = [f"{'part':<10}{'p50 [ms]':>10}{'p99 [ms]':>10}{'times':>8}"]
        for name, values in self.timings.items():
            middle, high = np.percentile(np.array(values) * 1000, [50, 99])
            rows.append(f"{name:<10}{middle:>10.1f}{high:>10.1f}{len(values):>8}")
        return "\n".join(rows)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    @property
    def _remaining(self) -> int:
        """Commands that are still to be executed."""
        return 0 if self._queue is None else len(self._queue) - self._queue_index

    def _expected_position(self) -> NDArray[np.float64]:
        """Where the robot is by the commands given so far, if nobody measures."""
        if self._queue is not None and 0 < self._queue_index <= len(self._queue):
            return self._queue.position[self._queue_index - 1]
        assert self.decoder.position is not None
        return self.decoder.position

    def _start_next_chunk(self, *, measured: bool) -> None:
        """The chunk is done: take the next dream if it is there, and ask for the one after it."""
        if measured and self.decoder.time > 0:
            self.decoder.observe(self._q)
        if self._pending_chunk is not None and self._pending_chunk.done():
            chunk, self._pending_chunk = self._pending_chunk.result(), None
            for part, seconds in chunk.timings.items():
                self.timings[part].append(seconds)
            self._problem, self._active_chunk = chunk.problem, chunk if chunk.measurements else None
            self._frames_done, self._applied_correction, self._pending_comparison = (
                0,
                0 * self._applied_correction,
                None,
            )
            self.decoder.append(chunk.measurements, blend=self.blend)
            self._enqueue_next_frame()
        if self._pending_chunk is None and (self._remaining == 0 or self.mode != "sync"):
            self._request_chunk()

    def _request_chunk(self) -> None:
        """Have the next chunk dreamt and read in the background."""
        self._request_time = time.perf_counter()
        steps = self._remaining_steps()
        frame, q = self._frame, self._q_at_frame
        last_frame = (
            self._active_chunk.last_frame if self._active_chunk is not None and self.mode == "async_naive" else None
        )

        def plan() -> _GeneratedChunk:
            return self._plan_chunk(frame, q, steps, last_frame)

        self._pending_chunk = self._planning_executor.submit(plan)

    def _advance_frame(self, *, has_frame: bool) -> None:
        """A frame's commands are done: take those of the next one, if the dream has one."""
        if self._active_chunk is None:
            return
        self._frames_done += 1
        if self._pending_comparison is not None and self._pending_comparison.done():
            correction, self._pending_comparison = self._pending_comparison.result(), None
            if correction is not None:
                self.decoder.shift_reference(correction - self._applied_correction)
                self._applied_correction = correction
        if has_frame and self._pending_comparison is None and self.mode != "async_naive":
            self._start_comparison()
        self._enqueue_next_frame()
        if self._remaining == 0:
            self._active_chunk = None

    def _enqueue_next_frame(self) -> None:
        """Commands for the next frame of the dream."""
        began = time.perf_counter()
        self._queue, self._queue_index = self.decoder.next(self._frame_time(self._frames_done + 1)), 0
        self.timings["follow"].append(time.perf_counter() - began)

    def _frame_time(self, frame: int) -> float:
        """When so many frames of the dream are done [s of the motion]."""
        count = 0 if self._active_chunk is None or self._active_chunk.frames is None else len(self._active_chunk.frames)
        return self.decoder.horizon_end - (count - frame) / self.decoder.video_rate

    def _start_comparison(self) -> None:
        """Have what the robot sees compared with what the dream showed for now."""
        chunk = self._active_chunk
        if chunk is None or chunk.frames is None or self._frames_done >= len(chunk.frames):
            return
        observed, q, generated = self._frame, self._q_at_frame, chunk.frames[self._frames_done - 1]
        generated_position = chunk.measurements[self._frames_done - 1 - len(chunk.frames)].position

        def compare() -> NDArray[np.float64] | None:
            began = time.perf_counter()
            tracker = PoseTracker(self.decoder.idm, self.decoder.video_rate)
            tracker.start_video(q)
            tracker.measure(observed, "CHW")
            position = tracker.measure(generated, "CHW")[0].position
            self.timings["compare"].append(time.perf_counter() - began)
            return None if position is None or generated_position is None else position - generated_position

        self._pending_comparison = self._comparison_executor.submit(compare)

    def _remaining_steps(self) -> NDArray[np.float64]:
        """(k, n) from the last real frame on, where the dream that is followed leads, frame by frame [rad or m]."""
        if self._active_chunk is None or self._active_chunk.frames is None:
            return np.zeros((0, len(self._q)))
        times = [self._frame_time(k) for k in range(self._frames_done + 1, len(self._active_chunk.frames) + 1)]
        return np.diff(np.concatenate([self._q_at_frame[None], self.decoder.reference(times)]), axis=0)

    def _plan_chunk(
        self, frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64], last_frame: Tensor | None
    ) -> _GeneratedChunk:
        """Runs in the background: uses the decoder's reader and nothing else of it."""
        clock, seconds = [time.perf_counter()], {}

        def lap(part: str) -> None:
            clock.append(time.perf_counter())
            seconds[part] = clock[-1] - clock[-2]

        tracker = self.decoder.pose_tracker
        try:
            initial: list[PoseMeasurement] = []
            if last_frame is None:
                if len(steps):
                    frame = self._forward_model(frame, q, steps)
                    lap("carry")
                tracker.start_video(q + steps.sum(0))
                initial = tracker.measure(frame, "CHW")
            else:
                frame = last_frame
            frames = as_frames(self.planner(frame))
            lap("plan")
            if frames.shape[1:] != frame.shape:
                raise InputError(
                    f"the planner's frames are {tuple(frames.shape[1:])}, the robot's {tuple(frame.shape)}"
                )
            measurements = [*initial, *tracker.measure(frames, "TCHW")]
            lap("read")
            return _GeneratedChunk(frames, measurements, "", seconds)
        except Exception as error:  # whatever the planner does, the robot is held
            message = str(error) if isinstance(error, JidmError) else f"{type(error).__name__}: {error}"
            return _GeneratedChunk(None, [], f"the planner failed: {message}", seconds)

    def _warp_by_field(
        self, frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64]
    ) -> Float[Tensor, "3 H W"]:
        field = self.decoder.idm.field
        like = getattr(field, "delta_std", None)
        dtype = torch.float64 if like is None else like.dtype
        return warp_frame(field, frame, torch.tensor(q, dtype=dtype), torch.tensor(steps, dtype=dtype))

    def _as_frame(self, frame: Any) -> Float[Tensor, "3 H W"]:
        return as_frames(frame, self._layout)[0]

    def _hold_reason(self) -> str:
        if self._problem:
            return self._problem
        return f"waiting for the planner since {time.perf_counter() - self._request_time:.2f} s"
