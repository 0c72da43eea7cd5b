"""Write the English text that comes with every Python as a corpus: about 2 MB, nothing is downloaded.

The language reference behind `help()` and the docstrings of the standard library, one JSON line with "text" and
"source" per document. Good for a first run; for anything else bring your own text.

example:
  python tools/extract_corpus.py --output corpus.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.errors import CorpusError
from deberta_xl.base.output_file import check_output, is_stream, report_stream, write_output
from deberta_xl.base.strict import own_path
from deberta_xl.corpus.python_corpus import python_corpus


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--output", type=own_path, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(arguments)


def extract(arguments: argparse.Namespace) -> None:
    """Collect the documents and write them."""
    output = Path(arguments.output)
    if not is_stream(output):
        if output.suffix != ".jsonl":
            raise CorpusError(f"--output {output}: the name must end with .jsonl")
        if output.is_file() and not arguments.overwrite:
            raise CorpusError(f"{output} exists; choose another output, or --overwrite to replace it")
        output.parent.mkdir(parents=True, exist_ok=True)
    check_output(output)
    documents = list(python_corpus())
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    write_output(output, "".join(lines))
    megabytes = sum(len(line.encode()) for line in lines) / 1e6
    print(
        f"{output}: {len(documents):,} documents, {megabytes:.1f} MB of English from Python {sys.version.split()[0]}",
        file=report_stream(output),
    )


if __name__ == "__main__":
    sys.exit(run_tool(extract, parse_arguments(), outputs=lambda given: [Path(given.output)]))
