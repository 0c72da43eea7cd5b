"""Every kind of damage to a dataset is noticed, named, and never delivered as tokens."""

import json
import os

import numpy as np
import pytest
from small_stores import make_documents, write

from deberta_xl.base.errors import TokenStoreError
from deberta_xl.corpus import token_store_writer
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.token_store_format import BlockHasher


def change_byte(path, place, bits=0x55) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


def refresh_manifest(prefix) -> None:
    """Make the manifest agree with the files as they are now."""
    path = prefix.with_suffix(".manifest.json")
    manifest = json.loads(path.read_text())
    for part in ("bin", "idx"):
        hasher = BlockHasher()
        hasher.update(prefix.with_suffix(f".{part}").read_bytes())
        manifest["files"][part] = hasher.summary()
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_missing_files_are_named(prefix, part):
    prefix.with_suffix(f".{part}").unlink()
    with pytest.raises(TokenStoreError, match=rf"there is no .*data\.{part}"):
        TokenStore(prefix)


@pytest.mark.parametrize("part", ["bin", "idx"])
@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 20, -1])
def test_truncated_files_are_refused_when_opened(prefix, part, has_manifest, kept):
    path = prefix.with_suffix(f".{part}")
    path.write_bytes(path.read_bytes()[:kept])
    if not has_manifest:
        prefix.with_suffix(".manifest.json").unlink()
    with pytest.raises(TokenStoreError, match=r"truncated|holds no tokens"):
        TokenStore(prefix)


@pytest.mark.parametrize("part", ["bin", "idx"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_files_that_are_too_long_are_refused_when_opened(prefix, part, has_manifest):
    path = prefix.with_suffix(f".{part}")
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    if not has_manifest:
        prefix.with_suffix(".manifest.json").unlink()
    with pytest.raises(TokenStoreError, match=r"too long|longer"):
        TokenStore(prefix)


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_a_file_of_another_dataset_of_the_same_size_is_refused_when_opened(prefix, tmp_path, part):
    documents = make_documents()
    write(tmp_path / "other", [document[::-1] if part == "bin" else document for document in reversed(documents)])
    other = (tmp_path / "other").with_suffix(f".{part}")
    assert other.stat().st_size == prefix.with_suffix(f".{part}").stat().st_size
    os.replace(other, prefix.with_suffix(f".{part}"))
    with pytest.raises(TokenStoreError, match="belongs to another dataset"):
        TokenStore(prefix)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (0, "not an index"),
        (9, "index version"),
        (17, "dtype code"),
        (18, "truncated|too long"),
        (26, "truncated|too long"),
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_damaged_index_header_is_refused_when_opened(prefix, place, message, has_manifest):
    change_byte(prefix.with_suffix(".idx"), place)
    if not has_manifest:
        prefix.with_suffix(".manifest.json").unlink()
    with pytest.raises(TokenStoreError, match=message):
        TokenStore(prefix)


def test_a_plausible_but_wrong_dtype_is_refused_when_opened(prefix):
    change_byte(prefix.with_suffix(".idx"), 17, bits=8 ^ 3)
    with pytest.raises(TokenStoreError, match="not the file that"):
        TokenStore(prefix)


@pytest.mark.parametrize("place", [40, 34 + 4 * 20 + 8, -9])
def test_a_damaged_index_without_a_manifest_is_refused_when_opened(prefix, place):
    change_byte(prefix.with_suffix(".idx"), place)
    prefix.with_suffix(".manifest.json").unlink()
    with pytest.raises(TokenStoreError, match=r"damaged|truncated|longer"):
        TokenStore(prefix)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "x", "version": 1, "files": {}}'])
def test_a_damaged_manifest_is_refused(prefix, text):
    prefix.with_suffix(".manifest.json").write_text(text)
    with pytest.raises(TokenStoreError, match="manifest"):
        TokenStore(prefix)


def test_verify_finds_a_flipped_bit_anywhere_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store_writer, "BlockHasher", lambda: BlockHasher(block_size=1000))
    documents = [np.random.default_rng(0).integers(4, 200, 200_000)]
    write(tmp_path / "data", documents)
    store = TokenStore(tmp_path / "data")
    assert len(store.manifest["files"]["bin"]["sha256"]) == 400
    checked = []
    store.verify(checked.append)
    assert sum(checked) == 400_000 + store.paths.idx.stat().st_size
    change_byte(tmp_path / "data.bin", 200_123, bits=1)
    damaged = TokenStore(tmp_path / "data")
    with pytest.raises(TokenStoreError, match="between byte 200,000 and 201,000"):
        damaged.verify()


def test_verify_finds_ids_beyond_the_vocabulary(prefix):
    store = TokenStore(prefix)
    start, _ = store.bounds(11)
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[2 * start + 2 : 2 * start + 4] = (200).to_bytes(2, "little")
    prefix.with_suffix(".bin").write_bytes(content)
    refresh_manifest(prefix)
    with pytest.raises(TokenStoreError, match="token id 200 in document 11 is beyond the vocabulary"):
        TokenStore(prefix).verify()


def test_a_dataset_without_a_manifest_opens_with_a_warning(prefix, caplog):
    prefix.with_suffix(".manifest.json").unlink()
    store = TokenStore(prefix)
    assert "integrity cannot be checked" in caplog.text
    assert np.array_equal(store[5], make_documents()[5])
    assert store.vocab_size is None
    store.verify()
    before = store.fingerprint
    change_byte(prefix.with_suffix(".bin"), 5)
    assert TokenStore(prefix).fingerprint != before
