"""Uncaught exceptions as the snippet's author reads them: without the frames of others, and short enough to be read to their end."""

from __future__ import annotations

import itertools
import linecache
import os
import re
import sys
import threading
import types
from traceback import FrameSummary, TracebackException

MAX_FRAMES = 1000  # to look at hundreds of thousands takes seconds
MAX_LINE_CHARS = 2000  # of the source
MAX_PART_CHARS = 5000  # of one frame, its line and the marks below it, or of a message
MAX_CHARS = 10_000  # of the whole
CUT = "[...]"
PARSING = re.compile(r"(?:\w+\s*\.\s*)*(?:eval|exec|compile)\s*\(")

foreign: tuple[str, ...] = ()
max_chars = MAX_CHARS  # less where little output is allowed


def hide_frames_of(folders: list[str]) -> None:
    """From here on tracebacks of uncaught exceptions show the snippet's frames, not those of modules in these folders or in this one."""
    global foreign
    foreign = ("<frozen ", *(os.path.join(folder, "") for folder in (os.path.dirname(__file__), *folders) if folder))
    threading.excepthook = print_exception_of_thread


def shortened(text: str, most: int) -> str:
    """Both ends of it."""
    return text if len(text) <= most else text[: most // 2] + CUT + text[len(text) - most // 2 :]


def last_of(frames: types.TracebackType | None) -> types.TracebackType | None:
    """As many as the interpreter's own printer shows. TracebackException has a limit too, but looks at all that come before."""
    ahead, number = frames, 0
    while ahead is not None:
        ahead, number = ahead.tb_next, number + 1
        if number > MAX_FRAMES:
            frames = frames.tb_next
    return frames


def fitting(frame: FrameSummary) -> FrameSummary:
    """Where the line has to be cut, without the marks: they would stand below something else."""
    if len(frame.line or "") <= MAX_LINE_CHARS:
        return frame
    return FrameSummary(frame.filename, frame.lineno, frame.name, lookup_line=False, line=shortened(frame.line, MAX_LINE_CHARS))


def print_exception(kind: type[BaseException], error: BaseException | None, frames: types.TracebackType | None) -> None:
    # The limit is for the exceptions behind it. Lines are looked up for what is left.
    shown = TracebackException(kind, error, last_of(frames), limit=-MAX_FRAMES, lookup_lines=False, compact=True)
    todo = [shown]
    while todo:
        part = todo.pop()
        part.stack[:] = [fitting(frame) for frame in part.stack if not frame.filename.startswith(foreign)]
        if getattr(part, "text", "") is None and isinstance(part.filename, str) and (part.lineno or "").isdigit():
            part.text = linecache.getline(part.filename, int(part.lineno)) or None  # the compiler, unlike the parser, gives none
        if len(getattr(part, "text", None) or "") > MAX_LINE_CHARS:  # the line of a SyntaxError
            part.text, part.offset = shortened(part.text, MAX_LINE_CHARS), None
        todo += [other for other in (part.__cause__, part.__context__, *(part.exceptions or ())) if other is not None]
    text = "".join(shortened(part, MAX_PART_CHARS) for part in shown.format())
    print(shortened(text, max_chars), end="", file=sys.stderr if sys.stderr is not None else sys.__stderr__)


def print_exception_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        sys.stderr.write(f"Exception in thread {args.thread.name if args.thread else '?'}:\n")
        print_exception(args.exc_type, args.exc_value, args.exc_traceback)


def raised_by_parser(frames: types.TracebackType) -> bool:
    """Whether eval, exec or compile raised it, and not what they run, which has frames of its own."""
    while frames.tb_next is not None:
        frames = frames.tb_next
    code = frames.tb_frame.f_code
    line, _, column, _ = next(itertools.islice(code.co_positions(), frames.tb_lasti // 2, None))
    if line is None or column is None:
        return False
    call = linecache.getline(code.co_filename, line).encode()[column:]
    return PARSING.match(call.decode(errors="ignore")) is not None
