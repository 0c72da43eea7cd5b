"""The command line of a training command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import Launch, read_launch
from deberta_xl.base.log import take_any_character
from deberta_xl.settings.presets import Config, preset_names, section_types
from deberta_xl.settings.reference import Help

EPILOG = """\
example:
  {}

The same command in the same run folder resumes from its newest whole checkpoint.
Every key of the configuration can be overridden: --help SECTION shows them, and docs/settings.md."""


def training_parser(description: str, example: str, root: type[Config]) -> argparse.ArgumentParser:
    """The options that every training command has; `root` is its configuration's class. Use `parse` with it.

    `example` is a whole command.
    """
    take_any_character()  # --help is shown before anything else
    parser = argparse.ArgumentParser(
        description=description, epilog=EPILOG.format(example), add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sections = ", ".join(section_types(root))
    parser.add_argument(
        "-h", "--help", action=Help, root=root, metavar="SECTION",
        help=f"this help, or the settings of a section ({sections}), of one key (train.steps), or all",
    )  # fmt: skip
    parser.add_argument(
        "--config", required=True, help=f"preset ({', '.join(preset_names(root))}), TOML file, or a model's folder"
    )
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON: ZeRO stage, precision, offload (required)")
    parser.add_argument(
        "--print-config", "--print_config", action="store_true",
        help="print the whole configuration as TOML, which --config reads, then exit",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="check everything that can be checked at once, then exit")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --check: describe the run on N ranks")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, e.g. train.steps=500")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments; overrides may stand anywhere among them."""
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.deepspeed_config is None and not parsed.print_config:
        parser.error("the following arguments are required: --deepspeed_config (deepspeed_configs/ has some)")
    return parsed


def launch_of(arguments: argparse.Namespace) -> Launch:
    """This process among all; with `--check --ranks N`, the first of N that need not exist. Raises ConfigError."""
    if arguments.ranks is None:
        return read_launch()
    if not arguments.check:
        raise ConfigError(
            f"--ranks {arguments.ranks} goes with --check only; to start so many: deepspeed --num_accelerators "
            f"{arguments.ranks} {sys.argv[0]} … (docs/pretraining.md, or docs/slurm.md for a cluster)"
        )
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks}: at least 1")
    return Launch(world_size=arguments.ranks)
