"""The order of the rows: a keyed bijection, so that nothing has to be stored, shuffled or restored.

Sample number s of a run is row π(s mod rows) of epoch s // rows, where π is a permutation chosen by (seed, epoch):
a Feistel network over a rectangle of a·b ≥ rows cells (Black, Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from __future__ import annotations

import math

import numpy as np

from deberta_xl.data.random_numbers import derive, mix

#: Four rounds make a pseudorandom permutation of a large domain (Luby and Rackoff 1988); small ones need more.
ROUNDS = 8


def sample_rows(seed: int, num_rows: int, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and row of the global samples first_sample … first_sample + count − 1, int64 `[count]` each.

    Within an epoch every row comes exactly once. The answer does not depend on how the samples are asked for.
    """
    samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
    epochs, places = np.divmod(samples, num_rows)
    return epochs, permute(places, num_rows, derive(seed, epochs))


def permute(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Image of `places` `[count]` under the permutations of [0, size) that `keys` (uint64 `[count]`) choose.

    The network permutes a rectangle with fewer than √size + 1 cells too many; an image in one of those is sent through
    it again. That walk stays on the place's own cycle, which holds the place itself, so it ends, and it is one-to-one.
    """
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    round_keys = np.stack([derive(keys, number) for number in range(ROUNDS)])
    images = feistel(places.astype(np.uint64), height, width, round_keys)
    while (outside := np.flatnonzero(images >= np.uint64(size))).size:
        images[outside] = feistel(images[outside], height, width, round_keys[:, outside])
    return images.astype(np.int64)


def feistel(cells: np.ndarray, height: int, width: int, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of the cells of a rectangle: rows are turned by a hash of the column, columns by one of the row.

    `round_keys` is uint64 `[ROUNDS, count]`. Each round can be undone, since the coordinate it hashes is kept.
    """
    row, column = np.divmod(cells, np.uint64(width))
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            row = (row + mix(key ^ column) % np.uint64(height)) % np.uint64(height)
        else:
            column = (column + mix(key ^ row) % np.uint64(width)) % np.uint64(width)
    return row * np.uint64(width) + column
