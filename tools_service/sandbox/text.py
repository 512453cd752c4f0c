"""What a model writes, as code; and what it gets to read of a long output."""

from __future__ import annotations

import os
import re

MAX_ERROR_CHARS = 2000  # of an output that ends in a traceback: its end names the exception
HEAD_CHARS = 200  # of a line that is cut: the class of an exception stands there
CUT = "[...]"

OPENING = re.compile(r"```[ \t]*+[\w+-]*+[ \t]*+\n")  # nothing is tried twice: a long line of blanks costs no more than any other
# What tells whether a fence stands in a string that goes over several lines, where it closes nothing.
MARKS = re.compile(r"""\\.|'''|\"\"\"|['"#\n]|^[ \t]*```""", re.DOTALL | re.MULTILINE)


def code_of(argument: str) -> str:
    """The code as models write it: without a byte order mark, a markdown fence around it, blank lines before it or an indentation
    of the whole."""
    text = argument.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n")
    if opening := OPENING.match(text.lstrip()):
        text = until_fence(text.lstrip()[opening.end() :])
    lines = text.split("\n")
    lines = lines[next((number for number, line in enumerate(lines) if line.strip()), len(lines)) :]
    if lines and lines[0][0] in " \t":
        lines = dedented(lines)
        lines[0] = lines[0].lstrip()  # the marker may stand before the first line, which then has an indentation of its own
    return "\n".join(lines).rstrip()


def dedented(lines: list[str]) -> list[str]:
    """As textwrap.dedent has them, which compiles the margin as a pattern, however long it is, and which `re` then keeps."""
    lines = [line if line.strip(" \t") else "" for line in lines]
    margin = len(os.path.commonprefix([line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line]))
    return [line[margin:] for line in lines]


def until_fence(text: str) -> str:
    """Up to the first closing fence outside strings; where there is none, as in code that is no Python, up to the first of all."""
    first, inside = len(text), ""  # the quotes, or the mark of a comment, that what we are in began with
    for match in MARKS.finditer(text):
        mark = match[0]
        if mark.endswith("```"):
            if len(inside) < 3:
                return text[: match.start()]
            first = min(first, match.start())
        elif inside == "#":
            inside = "" if mark.endswith("\n") else "#"
        elif not inside:
            inside = mark if mark[0] in "'\"#" else ""
        elif mark == inside or (len(inside) == 1 and mark in ("\n", 3 * inside)):  # 'a''': one string, and an empty one
            inside = ""
    return text[:first]


def ending(text: str) -> str:
    """Its last MAX_ERROR_CHARS, from the start of a line; where that would leave out most of them, a line is cut in its middle."""
    cut = len(text) - MAX_ERROR_CHARS
    if cut <= 0:
        return text
    start, end = text.rfind("\n", 0, cut) + 1, text.find("\n", cut) + 1
    if end and len(text) - end >= MAX_ERROR_CHARS // 2:
        return f"{CUT}\n{text[end:]}"
    return f"{CUT}\n" * (start > 0) + text[start : start + HEAD_CHARS] + CUT + text[cut + HEAD_CHARS :]
