"""Small datasets for the tests of the token store."""

import numpy as np

from deberta_xl.corpus.token_store_writer import TokenStoreWriter


def make_documents(count=20, vocab_size=200, seed=0) -> list[np.ndarray]:
    """Random documents, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, vocab_size, rng.integers(1, 50)) for _ in range(count)]


def write(prefix, documents, **settings) -> None:
    """Write a dataset, of 200 ids unless `settings` of the writer say otherwise."""
    settings = settings or {"vocab_size": 200}
    with TokenStoreWriter(prefix, **settings) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
