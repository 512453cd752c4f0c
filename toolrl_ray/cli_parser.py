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


class Version(argparse.Action):
    """Looked up when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        print(f"toolrl {metadata.version('toolrl-ray')}")
        parser.exit()


def _filled(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; give a value, or take the option away")
    return text
