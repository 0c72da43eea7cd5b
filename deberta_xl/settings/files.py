"""Settings that people write into files, in TOML or JSON: UTF-8, with a byte-order mark or without."""

from __future__ import annotations

import codecs
import tomllib
from pathlib import Path
from typing import Any

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.small_file import read_small

OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_settings(path: Path, language: str) -> str:
    """The text of a file of settings, without a byte-order mark. Raises ConfigError for what is no UTF-8."""
    try:
        content = read_small(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    encoding = next((name for mark, name in OTHER_MARKS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:4096]:
        encoding = "UTF-16LE"  # every other byte of it is zero, at least of the names of keys
    if encoding:
        raise ConfigError(
            f"{path} is {encoding}; settings are UTF-8: save it so, or convert it: "
            f"iconv -f {encoding} -t UTF-8 {path} > NEW"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid {language}, which is UTF-8 text: {error}; save it as UTF-8") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file."""
    try:
        return tomllib.loads(read_settings(path, "TOML"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:  # Python's limit on the digits of a number
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
