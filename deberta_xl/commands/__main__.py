"""`python -m deberta_xl.commands COMMAND ...`, for where `deberta-xl` is not installed."""

from __future__ import annotations

import sys

from deberta_xl.commands.dispatch import main

sys.exit(main())
