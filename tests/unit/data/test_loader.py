import threading
import time

import numpy as np
import pytest

from deberta_xl.base.errors import TokenStoreError
from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.loader import HELD_OUT_SEED, Batch, PretrainingData, prefetch, rank_samples
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.settings.pretraining import DataSection


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer, texts) -> TokenStore:
    prefix = tmp_path_factory.mktemp("data") / "train"
    with TokenStoreWriter(prefix, tokenizer=tokenizer) as writer:
        for ids in tokenizer.encode_batch(texts):
            writer.add(ids)
        writer.finish()
    return TokenStore(prefix)


def load(store, tokenizer, seed=1, sequence_length=48, **section) -> PretrainingData:
    return PretrainingData(store, tokenizer, DataSection(**section), sequence_length, seed)


def assert_equal(a: Batch, b: Batch) -> None:
    for left, right in zip(a, b, strict=True):
        assert np.array_equal(left, right)


def test_a_batch_has_the_promised_shapes_and_types(store, tokenizer):
    data = load(store, tokenizer)
    batch = data.batch(0, 6)
    for part in batch:
        assert part.shape == (6, 48)
        assert part.dtype == np.int64
    is_masked = batch.input_ids == tokenizer.mask_id
    assert is_masked.any()
    assert np.all(batch.labels[is_masked] > 0)
    assert np.all(batch.labels[batch.segments == 0] == 0)
    assert np.all(batch.input_ids[:, 0] == tokenizer.cls_id)
    assert data.tokens == store.num_tokens
    assert data.fingerprint == store.fingerprint


def test_batches_are_a_pure_function_of_the_sample_numbers(store, tokenizer):
    data, again = load(store, tokenizer), load(store, tokenizer)
    whole = data.batch(10, 20)
    assert_equal(whole, again.batch(10, 20))
    parts = [again.batch(first, 5) for first in (25, 10, 20, 15)]
    ordered = [parts[i] for i in (1, 3, 2, 0)]
    assert_equal(whole, Batch(*(np.concatenate(part) for part in zip(*ordered, strict=True))))


def test_an_epoch_shows_every_token_and_the_next_one_other_masks(store, tokenizer):
    data = load(store, tokenizer)
    plain = data.packed_rows.rows(np.arange(data.num_rows))[0]
    shown = []
    for epoch in range(2):
        batch = data.batch(epoch * data.num_rows, data.num_rows)
        unmasked = np.where(batch.labels > 0, batch.labels, batch.input_ids)
        order = [row.tobytes() for row in unmasked]
        assert sorted(order) == sorted(row.tobytes() for row in plain)
        shown.append({key: labels for key, labels in zip(order, batch.labels, strict=True)})
    same = [np.array_equal(shown[0][key], shown[1][key]) for key in shown[0]]
    assert np.mean(same) < 0.2


def test_seeds_give_other_orders(store, tokenizer):
    a, b = (load(store, tokenizer, seed=seed).batch(0, 8) for seed in (1, 2))
    assert not np.array_equal(a.segments, b.segments) or not np.array_equal(a.labels, b.labels)


def unmasked(batch: Batch) -> np.ndarray:
    """The text of a batch."""
    return np.where(batch.labels > 0, batch.labels, batch.input_ids)


def test_evaluation_sees_every_row_once_in_a_fixed_order_and_padding_behind_the_end(store, tokenizer):
    data = load(store, tokenizer)
    batch = data.held_out_batch(0, data.num_rows)
    rows = data.packed_rows.rows(np.arange(data.num_rows))[0]
    assert not np.array_equal(unmasked(batch), rows)
    assert sorted(map(bytes, unmasked(batch))) == sorted(map(bytes, rows))
    last = data.num_rows - 1
    beyond = data.held_out_batch(last, 3)
    assert_equal(Batch(*(part[:1] for part in beyond)), Batch(*(part[last:] for part in batch)))
    for part in (*(part[1:] for part in beyond), *data.held_out_batch(data.num_rows + 5, 2)):
        assert part.shape == (2, 48)
        assert not part.any()


def test_runs_of_two_seeds_are_measured_on_the_same_rows_and_masks(store, tokenizer):
    one, two = (load(store, tokenizer, seed=seed) for seed in (1, 2))
    assert_equal(one.held_out_batch(0, 9), two.held_out_batch(0, 9))
    assert_equal(one.held_out_batch(0, 9), load(store, tokenizer, seed=HELD_OUT_SEED).batch(0, 9))
    assert not np.array_equal(one.batch(0, 9).labels, two.batch(0, 9).labels)


def test_the_first_evaluation_rows_of_two_joined_files_come_from_both(tokenizer, tmp_path):
    with TokenStoreWriter(tmp_path / "joined", tokenizer=tokenizer) as writer:
        for piece in (20, 30):
            for _ in range(100):
                writer.add(np.full(40, piece))
        writer.finish()
    data = load(TokenStore(tmp_path / "joined"), tokenizer)
    for max_samples in (10, 40):
        batch = data.held_out_batch(0, max_samples)
        of_second = np.any(unmasked(batch) == 30, axis=1).sum()
        assert 0.2 < of_second / max_samples < 0.8


def test_attention_across_documents_only_flattens_the_segments(store, tokenizer):
    apart = load(store, tokenizer).batch(3, 10)
    joined = load(store, tokenizer, attend_across_documents=True).batch(3, 10)
    assert apart.segments.max() > 1
    assert np.array_equal(joined.segments, np.minimum(apart.segments, 1))
    assert np.array_equal(joined.input_ids, apart.input_ids)
    assert np.array_equal(joined.labels, apart.labels)


def test_the_wrong_tokenizer_and_foreign_ids_are_refused(store, tokenizer, tmp_path):
    with pytest.raises(TokenStoreError, match="another tokenizer"):
        load(store, Tokenizer(tokenizer.spm_model, 300))
    with TokenStoreWriter(tmp_path / "data", vocab_size=300) as writer:
        writer.add(np.full(20, 250))
        writer.finish()
    data = load(TokenStore(tmp_path / "data"), tokenizer)
    with pytest.raises(TokenStoreError, match="token id 250, outside"):
        data.batch(0, 1)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 24), (2, 3), (4, 6), (3, 2), (8, 3)])
def test_all_layouts_see_the_same_global_batch_in_the_same_order(ranks, micro):
    global_batch_size, first = 24, 240
    micro_steps = [rank_samples(first, global_batch_size, micro, rank, ranks) for rank in range(ranks)]
    seen = [start + i for starts in zip(*micro_steps, strict=True) for start in starts for i in range(micro)]
    assert seen == list(range(first, first + global_batch_size))


def test_prefetching_keeps_the_order_and_works_ahead():
    made = []
    allowed = threading.Semaphore(0)

    def numbers():
        for number in range(20):
            made.append(number)
            allowed.release()
            yield number

    stream = prefetch(numbers(), depth=3)
    assert next(stream) == 0
    for _ in range(4):
        assert allowed.acquire(timeout=10)
    assert len(made) >= 4
    time.sleep(0.05)
    # One handed out, three waiting, one in the thread's hands.
    assert len(made) <= 5
    assert list(stream) == list(range(1, 20))


def test_an_error_while_prefetching_reaches_the_consumer_in_its_place():
    def failing():
        yield 1
        yield 2
        raise KeyError("broken row")

    stream = prefetch(failing(), depth=8)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(KeyError, match="broken row"):
        next(stream)


def test_the_prefetching_thread_ends_with_its_consumer():
    before = threading.active_count()
    stream = prefetch(iter(range(10**9)), depth=2)
    assert next(stream) == 0
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
