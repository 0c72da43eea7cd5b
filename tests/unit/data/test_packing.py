import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deberta_xl.corpus.token_store_writer import TokenStoreWriter
from deberta_xl.data.packing import PackedRows
from deberta_xl.data.token_store import TokenStore

CLS, SEP, PAD = 1, 2, 0


def write(prefix, lengths) -> list[np.ndarray]:
    """Documents of the given lengths whose tokens count upwards from 10, so each is recognisable."""
    ids = np.arange(10, 10 + sum(lengths))
    documents = np.split(ids, np.cumsum(lengths)[:-1])
    with TokenStoreWriter(prefix, vocab_size=100_000, overwrite=True) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    return documents


def pack(prefix, sequence_length) -> PackedRows:
    return PackedRows(TokenStore(prefix), sequence_length, cls_id=CLS, sep_id=SEP, pad_id=PAD)


def rows_in_plain_python(documents, sequence_length) -> list[tuple[list[int], list[int]]]:
    """The definition, word by word: cut the stream, drop joints at the edges, frame, pad."""
    stream: list[tuple[int | None, int]] = []
    for number, document in enumerate(documents):
        stream += [(None, SEP), (None, CLS)] if number else []
        stream += [(number, int(token)) for token in document]
    rows = []
    for start in range(0, len(stream), sequence_length - 2):
        window = stream[start : start + sequence_length - 2]
        while window[0][0] is None:
            window = window[1:]
        while window[-1][0] is None:
            window = window[:-1]
        ids = [CLS, *(token for _, token in window), SEP]
        segments, piece = [], 0
        for token in ids:
            piece += token == CLS
            segments.append(piece)
        padding = [0] * (sequence_length - len(ids))
        rows.append((ids + padding, segments + padding))
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), sequence_length=st.integers(5, 40))
def test_rows_are_the_stream_of_documents_cut_and_framed(tmp_path, lengths, sequence_length):
    documents = write(tmp_path / "data", lengths)
    packed = pack(tmp_path / "data", sequence_length)
    expected = rows_in_plain_python(documents, sequence_length)
    assert len(packed) == len(expected)
    input_ids, segments = packed.rows(np.arange(len(packed)))
    assert input_ids.tolist() == [ids for ids, _ in expected]
    assert segments.tolist() == [numbers for _, numbers in expected]


def test_every_token_stands_in_one_row_and_every_piece_is_framed(tmp_path):
    rng = np.random.default_rng(0)
    documents = write(tmp_path / "data", rng.integers(1, 90, 300))
    input_ids, segments = pack(tmp_path / "data", 64).rows(np.arange(len(pack(tmp_path / "data", 64))))
    tokens = input_ids[input_ids >= 10]
    assert np.array_equal(tokens, np.concatenate(documents))
    for row, numbers in zip(input_ids, segments, strict=True):
        for piece in range(1, numbers.max() + 1):
            part = row[numbers == piece]
            assert part[0] == CLS
            assert part[-1] == SEP
            assert np.all(np.diff(part[1:-1]) == 1)
            assert len(part) > 2
        assert np.all(row[numbers == 0] == PAD)
        assert np.all(np.diff(np.append(numbers > 0, False).astype(int)) <= 0)
    # Only joints at a row's edge cost padding: at most four tokens, save in the last row.
    assert (segments[:-1] == 0).sum(axis=1).max() <= 4


def test_rows_come_in_any_order_and_repeatedly(tmp_path):
    write(tmp_path / "data", np.random.default_rng(1).integers(1, 40, 100))
    packed = pack(tmp_path / "data", 33)
    everything = packed.rows(np.arange(len(packed)))
    wanted = np.random.default_rng(2).integers(0, len(packed), 50)
    for whole, part in zip(everything, packed.rows(wanted), strict=True):
        assert np.array_equal(whole[wanted], part)
        assert part.dtype == np.int64


def test_a_long_document_fills_rows_to_the_brim(tmp_path):
    write(tmp_path / "data", [1000])
    packed = pack(tmp_path / "data", 102)
    input_ids, segments = packed.rows(np.arange(10))
    assert len(packed) == 10
    assert np.all(segments == 1)
    assert input_ids[3, 1] == 10 + 300


def test_impossible_requests_are_refused(tmp_path):
    write(tmp_path / "data", [10])
    with pytest.raises(ValueError, match="at least 5"):
        pack(tmp_path / "data", 4)
    packed = pack(tmp_path / "data", 8)
    for row in (-1, len(packed)):
        with pytest.raises(IndexError, match="which has 2"):
            packed.rows(np.array([row]))
