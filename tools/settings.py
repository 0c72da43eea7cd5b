"""Write the reference of all settings from the configuration itself: docs/settings.md.

example:
  python tools/settings.py --output docs/settings.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.base.command_line import build_parser, run_tool
from deberta_xl.base.output_file import check_output, write_output
from deberta_xl.settings.reference import as_markdown


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--output", required=True, type=Path, help="Markdown file to write; /dev/stdout shows it")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    check_output(arguments.output)
    write_output(arguments.output, as_markdown())


if __name__ == "__main__":
    sys.exit(run_tool(run, parse_arguments(), outputs=lambda given: [given.output]))
