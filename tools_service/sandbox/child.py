"""What a locked-down child does with the code it is handed. Descriptors: 0 at its end, 1 and 2 the output, 3 the job channel.

The job channel carries `HEADER` and the code. A one-shot child closes it before the code runs; what became of the snippet is
told by its exit status alone. A session keeps it and answers every run with one byte.
"""

from __future__ import annotations

import _io
import _thread
import atexit
import contextlib
import io
import linecache
import mmap
import os
import random
import resource
import struct
import sys
import threading
import types

from tools_service.sandbox import tracebacks

HEADER = struct.Struct("<IBq")  # bytes of code, whether there is a seed, the seed
JOB_FD = 3
EXIT_OK, EXIT_ERROR, EXIT_MEMORY = 0, 1, 97
FILE_NAME = "<snippet>"
TOO_DEEP = "nested too deeply, or too large, to be compiled"
CHUNK_CHARS = 1 << 16
MEMORY_RESERVE_BYTES = 2 << 20  # let go when memory runs out, so that there is room to say so


class Output(io.TextIOWrapper):
    """Every write is in the pipe when it returns, in order with the other stream; a giant one does not need its size again."""

    def write(self, text: str) -> int:
        if len(text) <= CHUNK_CHARS:
            return super().write(text)
        return sum(super(Output, self).write(text[start : start + CHUNK_CHARS]) for start in range(0, len(text), CHUNK_CHARS))


def open_outputs() -> None:
    """Makes them over a pipe, which children have there: whether it can seek, a stream asks once and for all when it is made."""
    ends = os.pipe()
    for name, fd in (("stdout", 1), ("stderr", 2)):
        real = os.dup(fd)
        os.dup2(ends[1], fd)
        raw = io.FileIO(fd, "w", closefd=False)
        stream = Output(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        os.dup2(real, fd)
        os.close(real)
    for end in ends:
        os.close(end)


def flush_outputs(write=os.write) -> bool:
    """As the interpreter does at its end: without those that the snippet has closed or taken away. False, and why, for one that fails."""
    flushed = True
    for name in ("stdout", "stderr"):
        try:
            stream = getattr(sys, name, None)
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            flushed = False
            write(2, f"sys.{name}.flush(): {type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
    return flushed


def read_exactly(num_bytes: int) -> bytes | None:
    parts = b""
    while len(parts) < num_bytes:
        part = os.read(JOB_FD, num_bytes - len(parts))
        if not part:
            return None
        parts += part
    return parts


def read_job() -> tuple[str, int | None] | None:
    """The next code and its seed; None when the owner has gone."""
    header = read_exactly(HEADER.size)
    if header is None:
        return None
    size, seeded, seed = HEADER.unpack(header)
    code = read_exactly(size)
    return None if code is None else (code.decode(), seed if seeded else None)


def seed_generators(seed: int | None) -> None:
    """fork copies the generators' states: without this every snippet would draw the same numbers as its neighbour."""
    random.seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(None if seed is None else seed % 2**32)
    sympy_random = sys.modules.get("sympy.core.random")
    if sympy_random is not None:
        sympy_random.seed(seed)


def new_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__builtins__ = sys.modules["builtins"]
    sys.modules["__main__"] = main
    return main


def set_limits(limits: dict[str, float]) -> None:
    """To be called when all modules are loaded: what they take is none of what a snippet takes."""
    global plenty_kib
    with open("/proc/self/statm") as file:  # not ru_maxrss: that of the process that started this one is in it
        resident_kib = int(file.read().split()[1]) * mmap.PAGESIZE // 1024
    plenty_kib = resident_kib + limits["memory_bytes"] // 4096
    tracebacks.max_chars = min(tracebacks.MAX_CHARS, limits["max_output_bytes"] // 4)


plenty_kib = 0  # at most in use, below which a quarter of what a snippet may take was never taken: what doubles fails at a third


def compiled(code: str, file_name: str) -> types.CodeType:
    """The parser calls it a lack of memory where code is nested deeper than its own stack: that is a fault of the code, not a limit."""
    try:
        return compile(code, file_name, "exec", dont_inherit=True)
    except MemoryError:
        raise SyntaxError(TOO_DEEP) from None


def of_parser(error: MemoryError) -> bool:
    """As in `compiled`, where the snippet itself calls the parser."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < plenty_kib and tracebacks.raised_by_parser(error.__traceback__)


def run_code(code: str, main: types.ModuleType, file_name: str) -> int:
    """Runs it in `main`. Prints a traceback of its own frames alone. Returns an exit code."""
    # Address space only: no page of it is touched.
    reserve = mmap.mmap(-1, MEMORY_RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not splitlines, which ends lines where python's grammar does not; io.StringIO costs every snippet a dozen pages of memory.
    lines = [line + "\n" for line in code.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    linecache.cache[file_name] = (len(code), None, lines, file_name)
    status = EXIT_OK
    try:
        exec(compiled(code, file_name), main.__dict__)
    except SystemExit as error:
        status = exit_status(error)
    except BaseException as error:
        sys.settrace(None)
        reserve.close()
        status = EXIT_MEMORY if isinstance(error, MemoryError) else EXIT_ERROR
        try:
            if type(error) is MemoryError and of_parser(error):
                status, error.args = EXIT_ERROR, (TOO_DEEP,)
            tracebacks.print_exception(type(error), error, error.__traceback__)
        except BaseException as again:
            os.write(2, f"{type(error).__name__} ({type(again).__name__} while printing it)\n".encode(errors="replace"))
    return status


def exit_status(error: SystemExit) -> int:
    if error.code is None or error.code == 0:
        return EXIT_OK
    if not isinstance(error.code, int):
        os.write(2, f"{error.code}\n".encode(errors="backslashreplace"))
    return EXIT_ERROR


def flush_files(names: dict[str, object], kind=_io._IOBase) -> None:
    """Those that the snippet leaves open, as their finalizers would: what is in them may be meant for the output."""
    for thing in list(names.values()):
        if isinstance(thing, kind):
            with contextlib.suppress(BaseException):  # it is closed, for one
                thing.flush()


def finish(exit_now=os._exit, num_threads=_thread._count, num_handlers=atexit._ncallbacks, flush=flush_outputs):
    """Ends the process as the interpreter would, but that what is still alive, files among the main module's names excepted, is not
    finalized: a search for it costs every snippet time. What it needs is bound here: the snippet may have replaced the names."""
    num_handlers_before = num_handlers()
    shut_logging_down = getattr(sys.modules.get("logging"), "shutdown", None)  # loaded beforehand, it is among those handlers

    def end(status: int, main: types.ModuleType) -> None:
        try:
            sys.settrace(None)
            if num_threads():  # asked first because these calls, with nothing to do, touch a quarter of all that a snippet touches
                threading._shutdown()
            if num_handlers() > num_handlers_before:
                atexit._run_exitfuncs()
            if shut_logging_down is not None:
                shut_logging_down()
            flush_files(main.__dict__)
        except BaseException:
            status = status or EXIT_ERROR
        exit_now(status if flush() else status or EXIT_ERROR)

    return end


def serve_once() -> None:
    end = finish()
    touch()
    job = read_job()
    if job is None:
        os._exit(EXIT_ERROR)
    code, seed = job
    os.close(JOB_FD)
    seed_generators(seed)
    main = new_main()
    end(run_code(code, main, FILE_NAME), main)


def serve_session() -> None:
    """Runs one code after another in one namespace until the owner goes or kills it."""
    write, flush = os.write, flush_outputs
    next_job, run, seed_all = read_job, run_code, seed_generators
    touch()
    main, num_runs = new_main(), 0
    while (job := next_job()) is not None:
        code, seed = job
        num_runs += 1
        if seed is not None or num_runs == 1:  # a later run without a seed goes on where the one before stopped
            seed_all(seed)
        status = run(code, main, f"<snippet {num_runs}>")
        write(JOB_FD, bytes([status if flush() else status or EXIT_ERROR]))
    os._exit(EXIT_OK)


def touch() -> None:
    """Runs nothing of importance, so that the memory which every run writes is this child's own before the code arrives."""
    seed_generators(0)
    run_code("1 + 1", types.ModuleType("__main__"), FILE_NAME)


def warm_up() -> None:
    """Runs what every snippet runs once, so that children find it in memory."""
    real, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), open(os.devnull, "w"), open(os.devnull, "w")
    try:
        for code in ("print(1 + 1)", "def f(x):\n    return 1 / x\nf(0)", "import sys; sys.exit(0)"):
            seed_generators(0)
            run_code(code, new_main(), FILE_NAME)
    finally:
        sys.stdout.close()
        sys.stderr.close()
        sys.stdout, sys.stderr = real
        linecache.cache.pop(FILE_NAME, None)
