"""Fixtures of the tests of weights."""

from no_disk import waits_for_no_disk

__all__ = ["waits_for_no_disk"]
