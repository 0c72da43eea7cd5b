"""Fixtures that several folders share."""

from __future__ import annotations

import os

# Tests run beside each other and start ranks of their own: threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from small_dataset import small_dataset

__all__ = ["small_dataset"]
