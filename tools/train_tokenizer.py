"""Train a SentencePiece tokenizer with DeBERTa's special ids on your own text.

Input files are .txt (documents separated by blank lines) or .jsonl (one document per line), each also .gz or .zst.
The output folder holds spm.model and tokenizer_settings.json; tools/preprocess.py reads it, and copies it beside the
data it makes. The same text gives the same tokenizer on any machine.

Characters without a piece become [UNK], so all characters of a text are kept unless it has thousands of them, as
Chinese and Japanese do: then the rarest are left out, named and counted, and the options below say how to keep them.

examples:
  python tools/train_tokenizer.py --input 'corpus/*.jsonl.zst' --vocab_size 128100 --output tokenizer/
  python tools/train_tokenizer.py --input novels.txt --vocab_size 16000 --output tokenizer/ --byte_fallback
  python tools/train_tokenizer.py --input tweets.jsonl --vocab_size 32000 --output tokenizer/ \\
      --normalization nmt_nfkc_cf --user_symbols '<user>' '<url>' --split_digits
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, report_bad_records, run_tool
from deberta_xl.base.durations import duration
from deberta_xl.base.errors import TokenizerError
from deberta_xl.base.output_file import check_output_folder
from deberta_xl.base.progress import progress
from deberta_xl.base.strict import own_path
from deberta_xl.corpus.characters import CharacterCounts, listed
from deberta_xl.corpus.reading import expand_inputs, iterate_documents, total_size
from deberta_xl.corpus.tokenizer_rules import ALPHABET_CHARACTERS, NORMALIZATIONS, PARTIAL_COVERAGE, TokenizerRules
from deberta_xl.corpus.tokenizer_training import MAX_LINES, TrainedTokenizer, train_tokenizer

SHOWN_CHARACTERS = 20
BYTE_PIECES = 256
MOSTLY_CHARACTERS = 0.7
"""Share of the pieces above which they are little more than an alphabet."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files, or quoted patterns")
    parser.add_argument(
        "--vocab_size",
        "--vocab-size",
        type=int,
        required=True,
        help="rows of the model's word table: pieces + [MASK] + spare ids (100 ids are set aside from 10000 on, "
        "8 below). DeBERTa-v2 and v3 have 128100; 8000 suits a few MB of text",
    )
    parser.add_argument("--output", type=own_path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--json_key", "--json-key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument(
        "--max_lines",
        "--max-lines",
        type=int,
        default=MAX_LINES,
        help=f"lines to hold in memory; of more, a random sample is used (default: {MAX_LINES})",
    )
    parser.add_argument(
        "--allow_smaller",
        "--allow-smaller",
        action="store_true",
        help="take the largest possible vocabulary where the text cannot fill --vocab_size",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    add_rules(parser.add_argument_group("what becomes of characters"))
    return parser.parse_args(arguments)


def add_rules(group: argparse._ArgumentGroup) -> None:
    """The options of TokenizerRules."""
    group.add_argument(
        "--character_coverage",
        "--character-coverage",
        type=float,
        metavar="SHARE",
        help="share of the text's characters that get a piece, the frequent ones first; the others become [UNK] "
        f"(default: 1 where the text has at most {ALPHABET_CHARACTERS:,} different ones, else {PARTIAL_COVERAGE})",
    )
    group.add_argument(
        "--byte_fallback",
        "--byte-fallback",
        action="store_true",
        help=f"characters without a piece become their bytes, not [UNK]: {BYTE_PIECES} more pieces, nothing is lost",
    )
    group.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        default="nmt_nfkc",
        help="; ".join(f"{name}: {meaning}" for name, meaning in NORMALIZATIONS.items()) + " (default: nmt_nfkc)",
    )
    group.add_argument(
        "--user_symbols",
        "--user-symbols",
        nargs="+",
        default=[],
        metavar="SYMBOL",
        help="strings that are always one piece, such as '<url>'",
    )
    group.add_argument(
        "--user_symbols_file", "--user-symbols-file", type=Path, metavar="FILE", help="more of them, one a line"
    )
    group.add_argument("--split_digits", "--split-digits", action="store_true", help="each digit is a piece of its own")


def rules_of(arguments: argparse.Namespace) -> TokenizerRules:
    """The rules asked for."""
    return TokenizerRules(
        character_coverage=arguments.character_coverage,
        byte_fallback=arguments.byte_fallback,
        normalization=arguments.normalization,
        user_symbols=(*arguments.user_symbols, *read_symbols(arguments.user_symbols_file)),
        split_digits=arguments.split_digits,
    )


def read_symbols(path: Path | None) -> list[str]:
    """The lines of a file, blank ones aside."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"--user_symbols_file {path} is not UTF-8 text: {error}; convert it") from error
    return [line for line in lines if line.strip()]


def train(arguments: argparse.Namespace) -> None:
    """Train, and say what came out."""
    started = time.monotonic()
    check_output_folder(Path(arguments.output))
    rules, paths = rules_of(arguments), expand_inputs(arguments.input)
    counts, bad = CharacterCounts(composes=rules.composes), []
    try:
        with contextlib.closing(read(paths, arguments.json_key, bad)) as texts:
            tokenizer = train_tokenizer(
                texts,
                arguments.vocab_size,
                arguments.output,
                rules=rules,
                max_lines=arguments.max_lines,
                allow_smaller=arguments.allow_smaller,
                overwrite=arguments.overwrite,
                show=progress,
                counts=counts,
            )
    finally:  # when training fails, the bad records may be the reason
        report_bad_records(len(bad), bad[:10])
    if tokenizer.vocab_size < arguments.vocab_size:
        print(f"--vocab_size {arguments.vocab_size} is more than this text can fill; {tokenizer.vocab_size} are taken")
    spare = tokenizer.vocab_size - tokenizer.num_pieces - 1
    print(
        f"{arguments.output}: {tokenizer.vocab_size:,} ids = {tokenizer.num_pieces:,} pieces + [MASK] (id "
        f"{tokenizer.mask_id}) + {spare} spare ids, in {duration(time.monotonic() - started)}"
    )
    report_characters(TrainedTokenizer.of(tokenizer, rules, counts), rules)


def read(paths: Sequence[Path], json_key: str, bad: list[str]) -> Iterator[str]:
    """The texts, with progress; notes bad records in `bad`."""
    with progress("reading the text", total_size(paths)) as advance:
        yield from iterate_documents(paths, json_key, report=bad.append, advance=advance)


def report_characters(trained: TrainedTokenizer, rules: TokenizerRules) -> None:
    """Say which characters have been kept, which have not and what keeps them, and whether words have room."""
    number, lost = len(trained.characters), trained.lost
    limit = "up to" if number <= ALPHABET_CHARACTERS else "beyond"
    chosen = "" if rules.character_coverage else f", the default {limit} {ALPHABET_CHARACTERS:,} characters"
    coverage = f"--character_coverage {trained.coverage:g}{chosen}"
    if not lost:
        print(f"characters: {number:,} different ones, none of them lost ({coverage})")
    else:
        share = sum(lost.values()) / sum(trained.characters.values())
        print(
            f"characters: {number:,} different ones; {len(lost):,} of them, {share:.3%} of the text, are lost: they "
            f"become [UNK] ({coverage})"
        )
        print(f"  {listed(lost, SHOWN_CHARACTERS)}")
        print(f"  {cure(trained, rules)}")
    single = trained.single_characters
    if single > MOSTLY_CHARACTERS * trained.tokenizer.num_pieces:
        print(
            f"warning: {single:,} of the {trained.tokenizer.num_pieces:,} pieces are single characters or bytes, "
            f"which leaves little room for words; choose a --vocab_size of {4 * single:,} or so",
            file=sys.stderr,
        )


def cure(trained: TrainedTokenizer, rules: TokenizerRules) -> str:
    """What keeps the lost characters."""
    cures = [] if trained.coverage == 1 else [f"--character_coverage 1 ({len(trained.lost):,} more pieces)"]
    cures += [] if rules.byte_fallback else [f"--byte_fallback ({BYTE_PIECES} pieces, for any character there is)"]
    return f"to keep them: {', or '.join(cures)}" if cures else "no option keeps them"


if __name__ == "__main__":
    sys.exit(run_tool(train, parse_arguments(), outputs=lambda given: [Path(given.output)]))
