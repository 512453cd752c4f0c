"""The command's parser: says what is wrong in one line, like every other mistake, and takes no empty value for a missing one."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

EXIT_USER = 2


class Parser(argparse.ArgumentParser):
    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Of an option that takes text, an empty one is refused: --json "$UNSET" does not ask for what happens without --json."""
        if names[0].startswith("-") and settings.get("action", "store") in ("store", "append"):
            settings.setdefault("type", _filled)
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"toolrl: {message}; see {self.prog} --help\n")


def _filled(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; give a value, or take the option away")
    return text
