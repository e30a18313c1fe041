"""Video files to frames and back, through PyAV (FFmpeg), with limits that a hostile file cannot talk its way around.

Only a few containers are opened, never one that names other files (a play list or an "ffconcat" file would make FFmpeg
open whatever path it holds). Frames are counted from the packets, not from what the header says, decoded one by one,
and only the chosen ones are kept.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datamodules.media_files import MediaRules

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "pipe"}
X264 = {"preset": "veryfast", "crf": "23", "threads": "1"}
"""One thread: the same frames give the same bytes."""


@dataclass(frozen=True)
class VideoClip:
    """Frames in order: uint8 [T, H, W, 3] (RGB), and how many of them make a second."""

    frames: np.ndarray
    fps: float

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps


def decode_video(data: bytes, name: Path, rules: MediaRules) -> VideoClip:
    """The frames that the rules choose: `rules.frames` evenly spaced ones, first and last among them, or so many that
    `rules.fps` of them make a second; all if both are None.

    Raises:
        ValueError: names the file; it is no video, holds no video stream, is cut short, longer, larger or changes its
            size on the way.
    """
    with _opened(data, name) as (container, stream):
        count, seconds = _length(container, stream)
        _check(stream, count, seconds, rules)
        chosen = chosen_frames(count, count / seconds, rules.frames, rules.fps)
        _check_memory(stream, len(chosen), rules)
        container.seek(0)
        frames = _decode(container, stream, chosen, count, rules)
    return VideoClip(frames, len(frames) / seconds)


def measure_video(data: bytes, name: Path, rules: MediaRules) -> dict[str, float]:
    """Seconds, frames, width and height of a video, every frame of it decoded and none kept. Raises as above."""
    with _opened(data, name) as (container, stream):
        count, seconds = _length(container, stream)
        _check(stream, count, seconds, rules)
        container.seek(0)
        size = (stream.codec_context.width, stream.codec_context.height)
        found = [(frame.width, frame.height) for frame in container.decode(stream)]
        if len(found) < count or set(found) != {size}:
            raise _Refused(f"only {found.count(size)} of its {count} frames can be decoded; it is damaged")
    return {"seconds": round(seconds, 6), "frames": count, "width": size[0], "height": size[1]}


@contextmanager
def _opened(data: bytes, name: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream); whatever goes wrong with them is a ValueError that names the file."""
    av = _av()
    try:
        with av.open(io.BytesIO(data), options=dict(OPTIONS)) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise _Refused(f"no video stream, found {kinds}; expected a video")
            yield container, container.streams.video[0]
    except _Refused as refusal:
        raise ValueError(f"{name}: {refusal}") from None
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{name}: cannot be read as a video ({reason}); fetch the file again") from error


def encode_video(frames: Iterable[np.ndarray], fps: int) -> bytes:
    """An MP4 file (H.264, yuv420p) of frames uint8 [H, W, 3], H and W even. Raises ValueError for other sizes."""
    av = _av()
    buffer = io.BytesIO()
    size: tuple[int, ...] | None = None
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                size = frame.shape
                if frame.shape[0] % 2 or frame.shape[1] % 2:
                    raise ValueError(f"frames of {frame.shape[1]} x {frame.shape[0]} px: H.264 wants even sides")
                stream = container.add_stream("libx264", rate=fps, options=dict(X264))
                stream.height, stream.width, stream.pix_fmt = frame.shape[0], frame.shape[1], "yuv420p"
            if frame.shape != size:
                raise ValueError(f"frames of different sizes: {frame.shape} after {size}")
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        if stream is None:
            raise ValueError("a video needs at least one frame")
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def chosen_frames(count: int, fps: float, frames: int | None, wanted_fps: float | None) -> list[int]:
    """Indices in 0..count-1, in order; some occur twice where more are wanted than there are."""
    if frames is None and wanted_fps is None:
        return list(range(count))
    n = frames if frames is not None else max(1, round(count / fps * float(wanted_fps or 0)))
    return [int(i) for i in np.linspace(0, count - 1, n).round()]


class _Refused(Exception):
    """What a file is told apart from what FFmpeg says about it."""


def _length(container: Any, stream: Any) -> tuple[int, float]:
    """Number of frames and seconds, from the time stamps of the packets; nothing is decoded yet."""
    times, last, packets = [], 0.0, 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        if packet.size and not packet.is_discard:
            at = packet.pts if packet.pts is not None else packet.dts
            if at is not None:
                times.append(float(at * packet.time_base))
                last = float((packet.duration or 0) * packet.time_base)
            else:
                times.append(times[-1] if times else 0.0)
    if not times:
        raise _Refused("the video stream is empty; fetch the file again")
    if packets < stream.frames:  # an index in front survives a cut
        raise _Refused(f"only {packets} of its {stream.frames} frames are there; it is cut short: fetch it again")
    rate = float(stream.average_rate or 0)
    step = last or (1 / rate if rate else 0.0)
    seconds = max(times) - min(times) + step
    return len(times), seconds if seconds > 0 else len(times) / 25  # a stream without clock: 25 is FFmpeg's own guess


def _check(stream: Any, count: int, seconds: float, rules: MediaRules) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if seconds > rules.max_seconds:
        raise _Refused(
            f"{seconds:.1f} s long, at most {rules.max_seconds:g} are taken; cut it or set media.max_seconds"
        )
    if count > rules.max_seconds * 240:
        raise _Refused(f"{count} frames in {seconds:.1f} s: no camera is so fast; expected at most 240 a second")
    if width * height > rules.max_pixels:
        raise _Refused(f"frames of {width} x {height} px, at most {rules.max_pixels} pixels are taken: scale it down")
    if width * height == 0:
        raise _Refused("the video stream has no size; fetch the file again")


def _check_memory(stream: Any, n: int, rules: MediaRules) -> None:
    width, height = rules.size or (stream.codec_context.width, stream.codec_context.height)
    needed = 3 * width * height * n / 1e6
    if needed > rules.max_megabytes:
        raise _Refused(
            f"{n} frames of {width} x {height} px take {needed:.0f} MB, at most {rules.max_megabytes:g} are taken; set "
            "media.frames to the number that the model looks at"
        )


def _decode(container: Any, stream: Any, chosen: list[int], count: int, rules: MediaRules) -> np.ndarray:
    """uint8 [len(chosen), H, W, 3], filled in place: a clip is in memory once."""
    frames: np.ndarray | None = None
    first: tuple[int, int] | None = None
    seen = filled = 0
    for frame in container.decode(stream):
        first = first or (frame.width, frame.height)
        if frame.width * frame.height > rules.max_pixels or (frame.width, frame.height) != first:
            raise _Refused(f"frame {seen} is {frame.width} x {frame.height} px, the first {first[0]} x {first[1]}")
        if filled < len(chosen) and chosen[filled] == seen:
            scaled = dict(zip(("width", "height"), rules.size, strict=True)) if rules.size else {}
            pixels = frame.to_ndarray(format="rgb24", **scaled, interpolation="BICUBIC" if scaled else None)
            if frames is None:
                frames = np.empty((len(chosen), *pixels.shape), np.uint8)
            while filled < len(chosen) and chosen[filled] == seen:  # twice where more are wanted than there are
                frames[filled] = pixels
                filled += 1
        seen += 1
        if seen > count:
            break
    if frames is None or filled < len(chosen):
        raise _Refused(f"only {seen} of its {count} frames can be decoded; it is damaged: fetch it again")
    return frames


def _av() -> Any:
    try:
        import av
        import av.logging
    except ImportError as error:
        raise ValueError("video files need PyAV: pip install -e '.[media]'") from error
    av.logging.set_level(av.logging.PANIC)  # what is wrong with a file is told once, in our words
    return av
