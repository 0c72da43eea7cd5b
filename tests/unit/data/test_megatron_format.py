"""Both ways with megatron-core's own reader and writer."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.packing import PackedRows
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.token_store_format import smallest_dtype


def make_documents(vocab_size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(4, vocab_size, rng.integers(1, 60)) for _ in range(50)]


def build_with_megatron(prefix, documents: list[list[np.ndarray]], vocab_size: int) -> None:
    """Each document is a list of sequences."""
    import torch

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for sequences in documents:
        lengths = [len(sequence) for sequence in sequences]
        tokens = np.concatenate(sequences) if sequences else np.zeros(0, int)
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("vocab_size", [8000, 128_100])
def test_both_write_the_same_bytes(tmp_path, vocab_size):
    documents = make_documents(vocab_size)
    with TokenStoreWriter(tmp_path / "ours", vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    build_with_megatron(tmp_path / "theirs", [[d] for d in documents], vocab_size)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_opens_ours(tmp_path):
    documents = make_documents(8000)
    with TokenStoreWriter(tmp_path / "ours", vocab_size=8000) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(documents)
    assert dataset.document_indices.tolist() == list(range(51))
    for number, document in enumerate(documents):
        assert np.array_equal(dataset[number], document)


def test_ours_opens_megatrons_with_several_sequences_per_document_and_empty_ones(tmp_path):
    sequences = make_documents(8000)
    documents = [sequences[:3], [], sequences[3:4], sequences[4:9], []]
    build_with_megatron(tmp_path / "theirs", documents, 8000)
    store = TokenStore(tmp_path / "theirs")
    assert len(store) == 5
    for number, parts in enumerate(documents):
        assert np.array_equal(store[number], np.concatenate([np.zeros(0, int), *parts]))
    store.verify()
    # Packing passes over the empty documents.
    packed = PackedRows(store, 50, cls_id=1, sep_id=2, pad_id=0)
    input_ids, segments = packed.rows(np.arange(len(packed)))
    assert np.array_equal(input_ids[input_ids >= 4], np.concatenate(sequences[:9]))
    assert np.all((input_ids == 1).sum(axis=1) == segments.max(axis=1))


def test_both_choose_the_same_dtype():
    for vocab_size in (100, 65_499, 65_500, 128_100, 250_000):
        assert smallest_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
