"""Asynchronous control loop around a video planner: while one generated chunk is executed, the next one is generated.

Planning takes about as long as executing a chunk, so waiting for it halves the pace. Generating on from the last generated
frame keeps the pace but drifts away from the robot, which never does exactly what was generated. LingBot-VA (its Algorithm
2) generates from the frame the robot will see when the current chunk is done: its last real frame, predicted by a forward
model. Here the forward model is a warp by the Jacobian field.

The forward model is not exact, so a chunk starts at a slightly wrong pose, and tracking a generated video drifts. While a
chunk is executed, each real frame is therefore compared with the generated frame of the same time, and the rest of the
chunk is shifted by the difference of their poses.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from jidm.control.commands import Commands
from jidm.control.decoder import ActionDecoder
from jidm.control.pose_tracker import PoseMeasurement, PoseTracker, as_frames
from jidm.errors import InputError, JidmError, did_you_mean
from jidm.fields.warp import warp_frame

Mode = Literal["sync", "async_naive", "async_grounded"]
MODES: tuple[str, ...] = get_args(Mode)

Planner = Callable[[Tensor], Any]
"""Maps a frame (3, H, W) in [0, 1] to the frames that follow it, in any layout `as_video` takes."""

ForwardModel = Callable[[Tensor, NDArray[np.float64], NDArray[np.float64]], Tensor]
"""Maps a frame (3, H, W), joint positions (n,) and joint steps (k, n) to the predicted frame after those steps."""


@dataclass(frozen=True, eq=False)
class _GeneratedChunk:
    """K generated frames.

    Attributes:
        frames: none if the planner failed.
        measurements: of the frames; preceded by that of the real or predicted frame they continue, if there is one.
        problem: why the planner failed.
        timings: duration of each part [s].
    """

    frames: Float[Tensor, "K 3 H W"]
    measurements: list[PoseMeasurement]
    problem: str
    timings: dict[str, float]


class AsyncController:
    """Gives a command every control period, whatever the planner does.

    Call `reset` once, then `step` every control period with the robot's frame and measured positions. Planning and pose
    measurement run in another thread; `step` itself only plans the spline for one frame period at a time (some
    milliseconds). If the planner is late, raises, or returns something that is not a video, the robot brakes and holds,
    and the planner is called again with the then latest real frame. It also brakes where the camera gives no frame of the
    first one's size, or the robot reports no pose of its own: at the end of the frame period, which is already planned.

    Args:
        planner: generates the frames that follow a frame.
        decoder: of the robot; used by this controller alone.
        mode: "sync" waits at rest for each chunk; "async_naive" continues from the last generated frame;
            "async_grounded" continues from the predicted real frame.
        blend: frames over which the offset between a chunk's start and the current motion is removed.
        forward_model: predicts a frame; a warp by the decoder's field if not given.
        planning_executor, comparison_executor: where planning and comparison run; one thread each if not given.

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
        """Part (plan, warp, measure, compare, track, step) -> its duration, each time [s]."""

    def reset(self, frame: Any, q: ArrayLike, *, layout: str | None = None) -> None:
        """Start, with the robot at rest.

        Args:
            frame: the camera's current frame.
            q: (n,) joint positions [rad or m].
            layout: of all frames, as for `as_video`.

        Raises:
            InputError: q is no pose of this robot.
            VideoError: the frame is none.
        """
        self._layout = layout
        self._frame = self._as_frame(frame)
        self.decoder.reset(q)
        self._q = self._q_at_frame = self._commanded_q = np.array(q, dtype=np.float64)
        self._queue: list[Commands] = []  # one per control period
        self._pending_chunk: Future[_GeneratedChunk] | None = None
        self._frames_done = 0  # executed frames of the active chunk
        self._applied_correction = np.zeros(len(self._q))  # shift of the active chunk so far
        self._pending_comparison: Future[NDArray[np.float64] | None] | None = None
        self._request_time = 0.0
        self._active_chunk: _GeneratedChunk | None = None
        self._problem = ""
        self.timings.clear()

    def step(self, frame: Any = None, q: ArrayLike | None = None) -> Commands:
        """The command of this control period. Whatever it is given, it raises nothing.

        Args:
            frame: the camera's current frame, if there is a new one.
            q: (n,) measured joint positions [rad or m], if there are any.
        """
        start = time.perf_counter()
        if problem := self._read_inputs(frame, q):
            self._active_chunk = None
            self.decoder.trajectory.drop_reference()
        elif not self._queue:
            self._advance_frame(has_frame=frame is not None)
        if not self._queue and not problem:
            self._start_next_chunk(measured=q is not None)
        if self._queue:
            command = self._queue.pop(0)
        else:
            waiting = f"waiting for the planner since {time.perf_counter() - self._request_time:.2f} s"
            command = self.decoder.trajectory.hold(1, problem or self._problem or waiting)
        self._commanded_q = command.position[0]
        self.timings["step"].append(time.perf_counter() - start)
        return command

    def report(self) -> str:
        """Timing table: one line per part, median and 99th percentile [ms]."""
        rows = [f"{'part':<10}{'p50 [ms]':>10}{'p99 [ms]':>10}{'times':>8}"]
        for name, values in self.timings.items():
            p50, p99 = np.percentile(np.array(values) * 1000, [50, 99])
            rows.append(f"{name:<10}{p50:>10.1f}{p99:>10.1f}{len(values):>8}")
        return "\n".join(rows)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _read_inputs(self, frame: Any, q: ArrayLike | None) -> str:
        """Store the camera's frame and the robot's positions; if one of them cannot be used, neither is, and this says why."""
        try:
            measured = self._commanded_q if q is None else self.decoder.limits.as_pose(q, self.decoder.idm.joint_names)
        except InputError as error:
            return f"the robot reports {error}"
        if frame is not None:
            try:
                current = self._as_frame(frame)
            except Exception as error:  # no object in place of a frame may stop the control loop
                return f"the camera's frame: {str(error) or type(error).__name__}"
            if current.shape != self._frame.shape:
                return f"the camera's frame is {tuple(current.shape)}, the first one was {tuple(self._frame.shape)}"
            if not bool(current.isfinite().all()):
                return "the camera's frame is not finite"
            self._frame, self._q_at_frame = current, measured
        self._q = measured
        return ""

    def _start_next_chunk(self, *, measured: bool) -> None:
        """The active chunk is done: start the next one if it is ready, and request the one after it."""
        if measured and self.decoder.trajectory.time > 0:
            self.decoder.trajectory.observe(self._q)
        if self._pending_chunk is not None and self._pending_chunk.done():
            chunk, self._pending_chunk = self._planned(self._pending_chunk), None
            for part, seconds in chunk.timings.items():
                self.timings[part].append(seconds)
            self._problem, self._active_chunk = chunk.problem, chunk if chunk.measurements else None
            self._frames_done, self._pending_comparison = 0, None
            self._applied_correction = np.zeros(len(self._q))
            self.decoder.trajectory.append(chunk.measurements, blend=self.blend)
            self._enqueue_next_frame()
        if self._pending_chunk is None and (not self._queue or self.mode != "sync"):
            self._request_chunk()

    def _request_chunk(self) -> None:
        """Generate and measure the next chunk in the background."""
        self._request_time = time.perf_counter()
        chunk, last_frame = self._active_chunk, None
        if self.mode == "async_naive" and chunk is not None and chunk.measurements[-1].position is not None:
            last_frame = chunk.frames[-1]
        try:
            self._pending_chunk = self._planning_executor.submit(
                self._plan_chunk, self._frame.clone(), self._q_at_frame, self._remaining_steps(), last_frame
            )
        except RuntimeError as error:  # the executor is shut down, or its processes died
            self._problem = f"the planner failed: {error}"

    def _planned(self, future: Future[_GeneratedChunk]) -> _GeneratedChunk:
        """The result; an executor that lost or canceled the call is a planner that failed."""
        try:
            return future.result()
        except (Exception, CancelledError) as error:
            return _GeneratedChunk(
                self._frame[None][:0], [], f"the planner failed: {type(error).__name__}: {error}", {}
            )

    def _advance_frame(self, *, has_frame: bool) -> None:
        """A frame's commands are done: apply the latest comparison and queue the next frame's commands."""
        chunk = self._active_chunk
        if chunk is None:
            return
        self._frames_done += 1
        comparison = self._pending_comparison
        if comparison is not None and comparison.done():
            correction, self._pending_comparison = None, None
            with suppress(Exception, CancelledError):  # without a comparison the chunk goes on as planned
                correction = comparison.result()
            if correction is not None:
                self.decoder.trajectory.shift_reference(correction - self._applied_correction)
                self._applied_correction = correction
        unfinished = self._frames_done < len(chunk.frames)
        if has_frame and unfinished and self._pending_comparison is None and self.mode != "async_naive":
            self._start_comparison(chunk)
        self._enqueue_next_frame()
        if not self._queue:
            self._active_chunk = None

    def _enqueue_next_frame(self) -> None:
        """Queue the commands for the next frame of the active chunk."""
        start = time.perf_counter()
        commands = self.decoder.trajectory.next(self._frame_time(self._frames_done + 1))
        self._queue = [commands[k : k + 1] for k in range(len(commands))]
        self.timings["track"].append(time.perf_counter() - start)

    def _frame_time(self, frame: int) -> float:
        """Trajectory time at which this frame of the active chunk is reached [s]; frames count from 1."""
        count = 0 if self._active_chunk is None else len(self._active_chunk.frames)
        return self.decoder.trajectory.horizon_end - (count - frame) / self.decoder.config.video_rate

    def _start_comparison(self, chunk: _GeneratedChunk) -> None:
        """Compare the real frame with the generated frame of the same time, in the background."""
        observed, q, generated = self._frame, self._q_at_frame, chunk.frames[self._frames_done - 1]
        generated_position = chunk.measurements[self._frames_done - 1 - len(chunk.frames)].position

        def compare() -> NDArray[np.float64] | None:
            start = time.perf_counter()
            tracker = PoseTracker(self.decoder.idm, self.decoder.config.video_rate)
            tracker.start_video(q)
            tracker.measure(observed, "CHW")
            position = tracker.measure(generated, "CHW")[0].position
            self.timings["compare"].append(time.perf_counter() - start)
            return None if position is None or generated_position is None else position - generated_position

        with suppress(RuntimeError):  # likewise
            self._pending_comparison = self._comparison_executor.submit(compare)

    def _remaining_steps(self) -> NDArray[np.float64]:
        """(k, n) joint steps of the active chunk from the last real frame on, one per frame [rad or m]."""
        if self._active_chunk is None:
            return np.zeros((0, len(self._q)))
        times = [self._frame_time(k) for k in range(self._frames_done + 1, len(self._active_chunk.frames) + 1)]
        return np.diff(np.concatenate([self._q_at_frame[None], self.decoder.trajectory.reference(times)]), axis=0)

    def _plan_chunk(
        self, frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64], last_frame: Tensor | None
    ) -> _GeneratedChunk:
        """Generate and measure one chunk. Runs in the background: of the decoder it uses `pose_tracker` only.

        Args:
            frame, q: the last real frame and the joint positions in it.
            steps: (k, n) joint steps of the active chunk after that frame.
            last_frame: the generated frame to continue from; None to continue from the predicted real frame.
        """
        times, timings, no_frames = [time.perf_counter()], {}, frame[None][:0]

        def record_time(part: str) -> None:
            times.append(time.perf_counter())
            timings[part] = times[-1] - times[-2]

        tracker = self.decoder.pose_tracker
        try:
            initial: list[PoseMeasurement] = []
            if last_frame is None:
                if len(steps):
                    frame = self._forward_model(frame, q, steps)
                    record_time("warp")
                tracker.start_video(q + steps.sum(0))
                initial = tracker.measure(frame, "CHW")
            else:
                frame = last_frame
            frames = as_frames(self.planner(frame))
            record_time("plan")
            if frames.shape[1:] != frame.shape:
                raise InputError(
                    f"the planner's frames are {tuple(frames.shape[1:])}, the robot's {tuple(frame.shape)}"
                )
            measurements = [*initial, *tracker.measure(frames, "TCHW")]
            record_time("measure")
            return _GeneratedChunk(frames, measurements, "", timings)
        except BaseException as error:  # whatever the planner raises, SystemExit too: the robot holds
            message = str(error) if isinstance(error, JidmError) else f"{type(error).__name__}: {error}"
            return _GeneratedChunk(no_frames, [], f"the planner failed: {message}", timings)

    def _warp_by_field(
        self, frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64]
    ) -> Float[Tensor, "3 H W"]:
        field = self.decoder.idm.field
        like = getattr(field, "delta_std", None)
        dtype = torch.float64 if like is None else like.dtype
        return warp_frame(field, frame, torch.tensor(q, dtype=dtype), torch.tensor(steps, dtype=dtype))

    def _as_frame(self, frame: Any) -> Float[Tensor, "3 H W"]:
        return as_frames(frame, self._layout)[0]
