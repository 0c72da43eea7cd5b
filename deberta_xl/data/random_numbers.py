"""Random numbers without state: each is a pure function of a key and a counter.

The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") in counter
form: number n of a stream is `mix(key + n * GOLDEN)`. It needs a dozen numpy operations per array, so a whole batch
draws at once while each row keeps a stream of its own; one numpy generator object per row would cost 30 µs each.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 arrays in which every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive(*coordinates: int | np.ndarray) -> np.ndarray:
    """A uint64 key from coordinates such as (seed, epoch, row); arrays broadcast, each element gets its own key."""
    key = np.zeros(1, np.uint64)
    for coordinate in coordinates:
        key = mix(key + GOLDEN + np.asarray(coordinate).astype(np.uint64))
    return key


def uniform(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Number `counters` of the streams `keys` (arrays that broadcast), as float64 in [0, 1) with 53 random bits."""
    bits = mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53
