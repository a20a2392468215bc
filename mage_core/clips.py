"""From whole videos to the clips that the model sees: speed, frame indices, batches, token caches (4.2)."""

from __future__ import annotations

import numpy as np


def check_speed(speed: float) -> float:
    """The speed eta as a float; a ValueError unless it lies in the open interval (0, 1)."""
    value = float(speed)
    if not 0.0 < value < 1.0:
        raise ValueError(f"speed is {speed!r}: it must lie inside the open interval (0, 1); "
                         "0.1 is slow, 0.5 the middle, 0.9 fast")
    return value


def frame_indices(length: int, speed: float, interval: tuple[float, float], clip_length: int = 10) -> np.ndarray:
    """Which frames of a video of `length` frames make the clip: (clip_length,) int64 (4.2, supplement C.2).

    The sampling interval is lo + eta (hi - lo) frames; the clip takes every interval-th frame from the
    first, and repeats the last one where the video ends early. Raises ValueError for eta outside (0, 1).
    """
    lo, hi = interval
    step = lo + check_speed(speed) * (hi - lo)
    picked = np.floor(np.linspace(0, length - 1, round(length / step))).astype(np.int64)[:clip_length]
    return np.pad(picked, (0, clip_length - len(picked)), mode="edge")
