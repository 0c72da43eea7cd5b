import gc
import multiprocessing
import os

import numpy as np
import pytest
from small_stores import make_documents, write

from deberta_xl.base.errors import DataError, TokenStoreError
from deberta_xl.corpus import token_store_writer
from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.token_store_format import BlockHasher, edges_of


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (128_100, "int32")])
def test_documents_come_back_as_they_were_written(tmp_path, vocab_size, dtype):
    documents = make_documents(vocab_size=vocab_size)
    write(tmp_path / "data", documents, vocab_size=vocab_size)
    store = TokenStore(tmp_path / "data")
    assert len(store) == len(documents)
    assert store.header.dtype == dtype
    assert store.vocab_size == vocab_size
    assert store.lengths.tolist() == [len(d) for d in documents]
    assert store.num_tokens == sum(map(len, documents))
    for number, document in enumerate(documents):
        assert np.array_equal(store[number], document)
        assert np.array_equal(store.read(number, 0, 1), document[:1])
        assert np.array_equal(store.read(number, len(document) // 2, len(document)), document[len(document) // 2 :])
    assert np.array_equal(store[-1], documents[-1])
    store.verify()


def test_reading_outside_a_document_is_an_index_error(prefix):
    store = TokenStore(prefix)
    for document in (20, -21):
        with pytest.raises(IndexError, match="which holds 20"):
            store[document]
    for start, stop in ((-1, 1), (0, 10**6), (3, 2)):
        with pytest.raises(IndexError):
            store.read(0, start, stop)
        with pytest.raises(IndexError):
            store.read_stream(start, stop)


def test_arrays_outlive_their_store_and_are_not_windows_into_the_file(prefix):
    store = TokenStore(prefix)
    array, lengths = store[3], store.lengths
    expected = make_documents()[3]
    array_before = array.copy()
    array[0] += 1
    assert np.array_equal(store[3], expected)
    del store
    gc.collect()
    assert array[0] == array_before[0] + 1
    assert lengths[3] == len(expected)


def test_empty_documents_are_left_out_and_a_dataset_of_nothing_is_refused(tmp_path):
    write(tmp_path / "data", [np.array([], int), np.array([5, 6]), np.array([], int)])
    assert len(TokenStore(tmp_path / "data")) == 1
    with pytest.raises(TokenStoreError, match="nothing to write"):
        write(tmp_path / "nothing", [np.array([], int)])
    assert not list(tmp_path.glob("nothing*"))


def test_documents_may_be_added_many_at_a_time(tmp_path):
    documents = make_documents()
    write(tmp_path / "one", documents)
    with TokenStoreWriter(tmp_path / "many", vocab_size=200) as writer:
        writer.add_many(np.concatenate(documents[:7]), np.array([len(d) for d in documents[:7]]))
        writer.add_many(np.concatenate(documents[7:]), np.array([len(d) for d in documents[7:]]))
        with pytest.raises(ValueError, match="lengths sum to"):
            writer.add_many(np.arange(5), np.array([2, 2]))
        writer.finish()
    for suffix in (".bin", ".idx", ".manifest.json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"many{suffix}").read_bytes()
    assert TokenStore(tmp_path / "one").fingerprint == TokenStore(tmp_path / "many").fingerprint


@pytest.mark.parametrize("bad", [200, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_refused_when_written(tmp_path, bad):
    with pytest.raises(TokenStoreError, match=f"token id {bad} is outside the vocabulary"):
        write(tmp_path / "data", [np.array([5, bad, 6])])
    assert not list(tmp_path.iterdir())


def test_an_existing_dataset_is_replaced_only_on_request(prefix):
    before = TokenStore(prefix).fingerprint
    with pytest.raises(TokenStoreError, match="--overwrite"):
        write(prefix, make_documents(seed=1))
    assert TokenStore(prefix).fingerprint == before
    write(prefix, make_documents(seed=1), vocab_size=200, overwrite=True)
    assert TokenStore(prefix).fingerprint != before
    assert np.array_equal(TokenStore(prefix)[0], make_documents(seed=1)[0])


def test_a_failed_writer_leaves_nothing_behind(prefix, tmp_path):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TokenStoreError, match="outside the vocabulary"):
        write(prefix, [np.array([5]), np.array([500])], vocab_size=200, overwrite=True)
    with TokenStoreWriter(tmp_path / "unfinished", vocab_size=200) as writer:
        writer.add(np.array([5]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_writers_of_one_dataset_are_refused(tmp_path):
    with TokenStoreWriter(tmp_path / "data", vocab_size=200) as writer:
        with pytest.raises(DataError, match="another process"):
            write(tmp_path / "data", make_documents())
        write(tmp_path / "other", make_documents())
        writer.add(np.array([7, 8]))
        writer.finish()
    assert TokenStore(tmp_path / "data")[0].tolist() == [7, 8]


def overwrite_and_die(prefix, moment: int) -> None:
    """Write another dataset, but vanish without any clean-up at the given one of the acts that change the disk."""
    acts = iter(range(1, 100))

    def dying(function):
        return lambda *arguments: os._exit(9) if next(acts) == moment else function(*arguments)

    token_store_writer.publish = dying(token_store_writer.publish)
    token_store_writer.remove = dying(token_store_writer.remove)
    write(prefix, [np.array([7, 8, 9])], vocab_size=200, overwrite=True)


def test_a_writer_killed_at_any_moment_leaves_the_old_the_new_or_no_dataset(tmp_path):
    old = make_documents()
    outcomes = []
    for moment in range(1, 20):
        prefix = tmp_path / f"data{moment}"
        write(prefix, old)
        process = multiprocessing.get_context("fork").Process(target=overwrite_and_die, args=(prefix, moment))
        process.start()
        process.join()
        try:
            store = TokenStore(prefix)
            store.verify()
            outcome = {20: "old", 1: "new"}[len(store)]
            assert store[0].tolist() == (old[0].tolist() if outcome == "old" else [7, 8, 9])
        except TokenStoreError as error:
            outcome = "none" if "there is no" in str(error) else str(error)
        outcomes.append(outcome)
        # Whatever was left, the next writer succeeds.
        write(prefix, old, vocab_size=200, overwrite=True)
        assert np.array_equal(TokenStore(prefix)[0], old[0])
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    order = [outcome for i, outcome in enumerate(outcomes) if i == 0 or outcomes[i - 1] != outcome]
    assert order == ["old", "none", "new"]


def test_the_tokenizer_travels_with_the_data_and_another_one_is_refused(tmp_path, tokenizer):
    write(tmp_path / "data", make_documents(), tokenizer=tokenizer)
    store = TokenStore(tmp_path / "data")
    assert store.tokenizer().fingerprint == tokenizer.fingerprint
    assert store.manifest["special_ids"]["[MASK]"] == tokenizer.mask_id
    store.check_tokenizer(tokenizer)
    other = type(tokenizer)(tokenizer.spm_model, tokenizer.vocab_size + 8)
    with pytest.raises(TokenStoreError, match="made with another tokenizer"):
        store.check_tokenizer(other)


def test_a_writer_needs_a_tokenizer_or_a_vocabulary_size(tmp_path, tokenizer):
    for settings in ({}, {"tokenizer": tokenizer, "vocab_size": 300}):
        with pytest.raises(ValueError, match="a tokenizer or a vocab_size"):
            TokenStoreWriter(tmp_path / "data", **settings)


def test_the_prefix_may_be_given_as_the_name_of_a_file(prefix):
    for suffix in (".bin", ".idx", ".manifest.json"):
        assert len(TokenStore(f"{prefix}{suffix}")) == 20


def test_blocks_and_ends_are_hashed_alike_however_the_bytes_arrive(tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "file").write_bytes(content)
    whole, parts = BlockHasher(4096), BlockHasher(4096)
    whole.update(content)
    for start in range(0, len(content), 777):
        parts.update(content[start : start + 777])
    assert whole.summary() == parts.summary()
    assert whole.summary()["edges"] == edges_of(tmp_path / "file")
    assert len(whole.summary()["sha256"]) == 74
