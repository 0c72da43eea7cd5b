import gzip
import hashlib
import json
import subprocess
import sys

import pytest
import zstandard

from deberta_xl.base.errors import CorpusError
from deberta_xl.corpus import reading
from deberta_xl.corpus.compressed import CountingFile, ZstandardFile, unpacked
from deberta_xl.corpus.reading import TextFile, expand_inputs, iterate_documents, total_size

PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def documents_of(path, **settings) -> tuple[list[str], list[str]]:
    """Good texts, and `line: reason` of the bad records."""
    bad: list[str] = []
    good = list(iterate_documents([path], report=bad.append, **settings))
    return good, [entry.removeprefix(f"{path}:") for entry in bad]


@pytest.mark.parametrize("packing", PACKERS)
def test_text_files_hold_documents_between_blank_lines(tmp_path, packing):
    path = tmp_path / f"book.txt{packing}"
    content = "\ufeff\n\nOne line.\nAnother line.\n \t\nSecond – document.\r\n\r\n\n\nThird,\r\nat the end"
    path.write_bytes(PACKERS[packing](content.encode()))
    good, bad = documents_of(path)
    assert [text.replace("\r", "") for text in good] == [
        "One line.\nAnother line.", "Second – document.", "Third,\nat the end"
    ]  # fmt: skip
    assert not bad


@pytest.mark.parametrize("packing", PACKERS)
def test_json_lines_hold_one_document_each(tmp_path, packing):
    path = tmp_path / f"corpus.jsonl{packing}"
    lines = [{"text": "One\n\ndocument", "id": 1}, {"id": 2, "text": "Zwö"}, {"text": ""}]
    path.write_bytes(PACKERS[packing](b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\n  \n"))
    assert documents_of(path) == (["One\n\ndocument", "Zwö", ""], [])
    assert documents_of(path, json_key="id")[0] == []


def test_bad_records_are_reported_with_line_and_reason(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut off',
        b'{"content": "no key"}',
        b'{"text": 5}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "half a pair: \\ud800"}',
        b"[" * 100_000,
        b'{"text": null}',
        b'{"text": ' + b"9" * 10_000 + b"}",
        b'{"text": "also good \\u0000"}',
    ]
    path.write_bytes(b"\n".join(lines))
    good, bad = documents_of(path)
    assert good == ["good", "also good \0"]
    expected = ["2: invalid JSON", "3: no key 'text' (keys: 'content')", "4: 'text' is of type int", "5: a JSON list"]
    expected += [
        "6: not UTF-8",
        "7: 'text' holds half of a surrogate pair",
        "8: invalid JSON",
        "9: 'text' is of type NoneType",
    ]
    expected += ["10: invalid JSON"]
    assert len(bad) == len(expected)
    for found, beginning in zip(bad, expected, strict=True):
        assert found.startswith(beginning)


def test_a_text_document_that_is_not_utf8_is_reported_and_the_others_kept(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"good\n\nbad \xe9\nstill bad\n\ngood again")
    good, bad = documents_of(path)
    assert good == ["good", "good again"]
    assert bad == ["3: not UTF-8 (invalid continuation byte at byte 4)"]


def test_overlong_lines_are_bad_and_overlong_text_documents_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / "book.txt"
    path.write_bytes(b"first\n" + b"x" * 350 + b"\nlast\n\n" + b"twenty bytes in here\n" * 12 + b"\n" + b"y" * 100)
    good, bad = documents_of(path)
    assert good[:2] == ["first", "last"]
    assert good[-1] == "y" * 100
    assert "\n".join(good[2:-1]) == "\n".join(["twenty bytes in here"] * 12)
    assert max(map(len, good)) <= 100
    assert len(bad) == 1
    assert bad[0].startswith("2: a line of more than")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbled", "not packed"])
def test_a_damaged_packed_file_is_an_error_and_never_a_short_read(tmp_path, packing, damage):
    path = tmp_path / f"corpus.txt{packing}"
    content = "\n\n".join(str(n**5) for n in range(20_000)).encode()
    packed = bytearray(PACKERS[packing](content))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "garbled":
        packed[len(packed) // 2 : len(packed) // 2 + 50] = bytes(50)
    else:
        packed = content
    path.write_bytes(packed)
    with pytest.raises(CorpusError, match=rf"corpus\.txt{packing} is damaged"):
        list(iterate_documents([path]))


def test_zstandard_files_of_several_frames_are_read_to_the_end(tmp_path):
    parts = [bytes([n]) * 100_000 for n in range(5)]
    path = tmp_path / "frames.zst"
    path.write_bytes(b"".join(map(zstandard.compress, parts)))
    assert unpacked(CountingFile(path), ".zst").read() == b"".join(parts)
    path.write_bytes(b"")
    assert unpacked(CountingFile(path), ".zst").read() == b""


def endless(num_blocks: int) -> bytes:
    """A Zstandard frame of 128 KiB of one letter for each block of four bytes, as a compressor writes regular text."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0, 7 << 3])  # no content size, a window of 128 KiB
    block = lambda is_last: (2**17 << 3 | 1 << 1 | is_last).to_bytes(3, "little") + b"x"  # noqa: E731
    return header + block(0) * (num_blocks - 1) + block(1)


def test_a_small_zstandard_file_that_stands_for_a_large_one_is_unpacked_block_by_block(tmp_path):
    path = tmp_path / "endless.txt.zst"
    path.write_bytes(zstandard.compress(b"first\n\n") + endless(400) + zstandard.compress(b"\n\nlast\n"))
    file = ZstandardFile(CountingFile(path))
    buffer = bytearray(2**20)
    assert max(file.readinto(memoryview(buffer)) for _ in range(300)) <= 2**17
    good, bad = documents_of(path)
    assert good == ["first", "last"]
    assert bad == ["3: a line of more than 16 MiB"]


@pytest.mark.full
def test_three_gigabytes_in_96_kilobytes_need_little_memory(tmp_path):
    path = tmp_path / "endless.txt.zst"
    path.write_bytes(endless(3 * 2**13))
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from deberta_xl.corpus.reading import iterate_documents\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (300 * 2**20,) * 2)\n"
        "print(list(iterate_documents([Path(sys.argv[1])], report=lambda bad: print(bad.rpartition(':')[2]))))"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert done.stdout == " a line of more than 16 MiB\n[]\n"


def test_skippable_frames_checksums_and_long_windows_are_read(tmp_path):
    path = tmp_path / "frames.txt.zst"
    skippable = b"\x5a\x2a\x4d\x18" + (200_000).to_bytes(4, "little") + bytes(200_000)
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(b"one\n" * 50_000)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    unsized = unsized.compress(b"two\n") + unsized.flush()
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    long = long.compress(b"three\n" * 300_000) + long.flush()
    empty = zstandard.compress(b"")
    path.write_bytes(skippable + checked + empty + unsized + skippable + long)
    expected = b"one\n" * 50_000 + b"two\n" + b"three\n" * 300_000
    assert unpacked(CountingFile(path), ".zst").read() == expected
    for cut in (3, 7, 100_000, len(skippable) + 5, len(skippable) + len(checked) - 2):
        path.write_bytes((skippable + checked)[:cut])
        with pytest.raises(EOFError, match="cut off"):
            unpacked(CountingFile(path), ".zst").read()


def test_a_window_that_no_zstandard_tool_asks_for_is_an_error(tmp_path):
    path = tmp_path / "wide.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0, 22 << 3]) + b"\x01\0\0")  # 4 GiB
    with pytest.raises(CorpusError, match=r"wide\.txt\.zst is damaged or not what its name says: .*too much memory"):
        list(iterate_documents([path]))


def test_gzip_files_of_several_members_are_read_and_what_stands_behind_them_is_an_error(tmp_path):
    path = tmp_path / "members.txt.gz"
    packed = gzip.compress(b"one\n\n") + gzip.compress(b"two\n")
    path.write_bytes(packed + bytes(512))  # padding, as tapes have it
    assert list(iterate_documents([path])) == ["one", "two"]
    path.write_bytes(packed + b"garbage")
    with pytest.raises(CorpusError, match=r"members\.txt\.gz is damaged"):
        list(iterate_documents([path]))


@pytest.mark.parametrize("packing", PACKERS)
def test_a_read_file_knows_its_size_and_hash(tmp_path, packing):
    path = tmp_path / f"book.txt{packing}"
    path.write_bytes(PACKERS[packing](b"some text\n\nmore\n\n" * 5000))
    with TextFile(path) as file:
        assert len(list(file.records())) == 10_000
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.summary() == {"name": path.name, "size": path.stat().st_size, "sha256": digest}


def test_patterns_are_expanded_sorted_and_without_repetition(tmp_path):
    names = ["b.txt", "a.jsonl.zst", "deep/c.txt.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = expand_inputs([f"{tmp_path}/b.txt", f"{tmp_path}/**/*.*"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.jsonl.zst", "b.txt", "deep/c.txt.gz"]


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path):
    (tmp_path / "part[1].txt").write_text("x")
    assert len(expand_inputs([f"{tmp_path}/part[1].txt"])) == 1


def test_missing_empty_and_unknown_inputs_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="no such file"):
        expand_inputs([f"{tmp_path}/*.txt"])
    with pytest.raises(CorpusError, match="is a folder"):
        expand_inputs([str(tmp_path)])
    for name in ("data.parquet", "data.txt.bz2", "plain", "data.gz"):
        (tmp_path / name).write_text("x")
        with pytest.raises(CorpusError, match="unknown kind"):
            expand_inputs([f"{tmp_path}/{name}"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CorpusError, match="empty"):
        total_size(expand_inputs([f"{tmp_path}/empty.txt"]))


TEXTS = ["one\ntwo", "東京", '}{"[', "x" * 50]
SHAPES = {
    "lines": "\n".join(json.dumps({"text": text}) for text in TEXTS),
    "list": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
    "spread list": json.dumps([{"text": text} for text in TEXTS], indent=2),
    "spread objects": "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
    "begun objects": "\n".join('{"n": 1,\n"text": ' + json.dumps(text) + "}" for text in TEXTS),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_is_read_in_every_shape_under_either_ending(tmp_path, monkeypatch, suffix, shape):
    monkeypatch.setattr("deberta_xl.corpus.json_stream.CHUNK", 7)  # a value is cut wherever it can be
    path = tmp_path / f"a.{suffix}"
    content = SHAPES[shape].encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert documents_of(path) == (TEXTS, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"text": "a"},\n{"text": "b"', "line 3: not valid JSON"),
        (b'[{"text": "a"}\n{"text": "b"}]', "line 2: not valid JSON: a comma or the end"),
        (b'[{"text": "a"}]\n{"text": "b"}', "line 2: not valid JSON: something follows the list"),
        (b'[{"text": "a\xff"}]', "line 1: not UTF-8"),
        (b'[{"text": "' + b"a" * 200 + b'"}]', "line 1: more than 100 characters"),
        ('{"text": "a"}'.encode("utf-16"), "iconv -f UTF-16"),
        ('{"text": "a"}'.encode("utf-16-le"), "iconv -f UTF-16"),
    ],
)
def test_a_list_that_cannot_be_read_on_and_another_encoding_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("deberta_xl.corpus.json_stream.CHUNK", 7)
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        documents_of(tmp_path / "a.jsonl")
