"""Durations in words: `3.2 s`, `61 s`, `12 min 05 s`, `2 h 05 min`, `3 d 4 h`."""

from __future__ import annotations

import math

MINUTE, HOUR, DAY = 60, 60 * 60, 24 * 60 * 60


def duration(seconds: float) -> str:
    """A duration for people, in two units at most; `unknown` for what is no number."""
    if not math.isfinite(seconds):
        return "unknown"
    if abs(seconds) < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 2 * MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE:02d} s"
    if whole < DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE:02d} min"
    return f"{whole // DAY:,} d {whole % DAY // HOUR} h"
