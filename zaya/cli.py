"""The command-line parser of every tool: a wrong call is one line on stderr and exit code 2. Standard library only."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse, without the usage lines before an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")
