"""The python sandbox: one test per limit, named after its outcome, and what must hold whatever a snippet does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import fields
from pathlib import Path

import pytest
import uvloop
from stack.sandbox.core_helpers import ISOLATIONS, alive, descendants, gone, sandbox

from tools_service.sandbox.limits import MAX_S, MAX_VALUE, MIB, MIN_OPEN_FILES
from tools_service.sandbox.owner import Limits, Sandbox, SandboxStatus
from tools_service.sandbox.plan import LIBRARIES, package_folders
from tools_service.sandbox.probe import probe
from tools_service.sandbox.running import Child
from tools_service.sandbox.session import RESTARTED

ROOT = Path(__file__).resolve().parents[3]
QUICK = Limits(wall_s=2.0)
pytestmark = pytest.mark.parametrize("isolation", ISOLATIONS)


async def test_prints_and_results_come_back(isolation: str) -> None:
    async with sandbox(isolation) as box:
        outcome = await box.run("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')")
        assert (outcome.status, outcome.output, outcome.truncated) == (SandboxStatus.OK, "a\nb\nc\n", False)
        assert isolation in box.tier


async def test_output_that_a_snippet_wraps_anew_is_printed(isolation: str) -> None:
    async with sandbox(isolation) as box:
        session = await box.open_session()
        for change in (
            "sys.stdout.reconfigure(encoding='utf-8')",
            "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')",
            "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')",
        ):
            code = f"import io, sys\nprint('a', sys.stdout.seekable(), sys.stderr.seekable())\n{change}\nprint('é')"
            for run in (box.run, session.run):
                outcome = await run(code)
                assert (outcome.status, outcome.output) == (SandboxStatus.OK, "a False False\né\n"), change


@pytest.mark.parametrize("preload", [(), ("logging.handlers",)])
async def test_what_is_written_at_the_end_of_an_interpreter_is_printed(isolation: str, preload: tuple[str, ...]) -> None:
    snippets = (
        "import os\nf = os.fdopen(1, 'w')\nf.write('a')",
        "f = open(1, 'w', closefd=False)\nf.write('a')",
        "import io, sys\nf = io.TextIOWrapper(sys.stdout.buffer)\nf.write('a')",
        "import io, sys\nf = io.BufferedWriter(sys.stdout.buffer)\nf.write(b'a')\ng = open('f', 'w')\ng.close()\n__builtins__ = None",
        "import logging.handlers as h, logging, sys\nm = h.MemoryHandler(9, target=logging.StreamHandler(sys.stdout))\n"
        "logging.getLogger().addHandler(m)\nlogging.warning('a')",
    )
    async with sandbox(isolation, preload=preload) as box:
        for code in snippets:
            outcome = await box.run(code)
            assert (outcome.status, outcome.output.strip()) == (SandboxStatus.OK, "a"), code
        odd = "import io\nclass Odd(io.StringIO):\n    def flush(self): raise KeyError\nf = Odd()"
        assert (await box.run(odd)).status is SandboxStatus.OK


async def test_output_that_a_snippet_closes_or_takes_away_ends_nothing(isolation: str) -> None:
    async with sandbox(isolation) as box:
        for last in (
            "with open('f', 'w') as f:\n    sys.stdout = f\n    print('b')",
            "sys.stdout.close()",
            "sys.stdout = None\nprint('b')",
            "del sys.stdout",
            "sys.stderr.close()",
            "sys.stderr = None",
        ):
            session = await box.open_session()
            for run in (box.run, session.run):
                outcome = await run(f"import sys\nx = 1\nprint('a')\n{last}")
                assert (outcome.status, outcome.output) == (SandboxStatus.OK, "a\n"), last
            assert (await session.run("import os\nos.write(1, b'%d' % x)")).output == "1"
            await session.close()


async def test_output_that_cannot_be_flushed_is_an_error_that_says_so(isolation: str) -> None:
    code = "import sys\nclass Tee:\n    def write(self, text): sys.__stdout__.write(text)\nsys.stdout = Tee()\nprint('a')"
    async with sandbox(isolation) as box:
        session = await box.open_session()
        for run in (box.run, session.run):
            outcome = await run(code)
            assert outcome.status is SandboxStatus.ERROR and outcome.output.startswith("a\nsys.stdout.flush(): AttributeError"), outcome
        assert (await session.run("sys.stdout = sys.__stdout__\nprint('b')")).output == "b\n"
        outcome = await box.run("import sys\nsys.stdout = sys.stderr = None\n1 / 0")
        assert outcome.status is SandboxStatus.ERROR and "ZeroDivisionError" in outcome.output


async def test_endless_loop_is_timeout_and_keeps_what_was_printed(isolation: str) -> None:
    async with sandbox(isolation) as box:
        outcome = await box.run("print('before', end='')\nwhile True: pass", wall_s=0.3)
        assert (outcome.status, outcome.output) == (SandboxStatus.TIMEOUT, "before")
        assert 0.3 <= outcome.wall_s < 1.5
        assert await gone_but_ready(box, descendants(box.zygote_pid))


def ready_pids(box: Sandbox) -> set[int]:
    """Children that wait for code, as this process sees them."""
    return set(map(pid_of, box._supply.ready))


def pid_of(child: Child) -> int:
    with open(f"/proc/self/fdinfo/{child._pidfd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


async def gone_but_ready(box: Sandbox, pids: set[int], within_s: float = 5.0) -> bool:
    """Whether of these processes none is left but children that wait for code; one that is being made now may be among them soon."""
    deadline = time.monotonic() + within_s
    while alive(pids - ready_pids(box)) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    return not alive(pids - ready_pids(box))


async def test_cpu_beyond_its_limit_is_cpu_limit(isolation: str) -> None:
    async with sandbox(isolation, Limits(wall_s=10.0, cpu_s=1.0)) as box:
        assert (await box.run("while True: pass")).status is SandboxStatus.CPU_LIMIT
        stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        assert (await box.run(stubborn)).status is SandboxStatus.CPU_LIMIT


async def test_memory_beyond_its_limit_is_memory_limit(isolation: str) -> None:
    async with sandbox(isolation, Limits(memory_bytes=64 * MIB)) as box:
        outcome = await box.run("print('x')\nkeep = []\nwhile True: keep.append(bytearray(1 << 20))")
        assert outcome.status is SandboxStatus.MEMORY_LIMIT
        assert outcome.output.startswith("x\n") and "MemoryError" in outcome.output
        assert (await box.run("a = bytearray(32 << 20)\nprint(len(a))")).output == f"{32 << 20}\n"


async def test_code_that_the_parser_has_no_stack_for_is_an_error_of_the_code(isolation: str) -> None:
    async with sandbox(isolation) as box:
        session = await box.open_session()
        for run in (box.run, session.run):
            outcome = await run("x = " + "-" * 20000 + "1")
            assert (outcome.status, outcome.output.count("\n")) == (SandboxStatus.ERROR, 1)
            assert outcome.output.startswith("SyntaxError: nested too deeply")


async def test_text_that_the_parser_has_no_stack_for_is_an_error_where_the_snippet_has_it_parsed(isolation: str) -> None:
    deep = "'-' * 20000 + '1'"
    calls = (f"eval({deep})", f"exec({deep})", f"compile({deep}, 'f', 'eval')", f"import ast; ä = ast.literal_eval({deep})")
    large = ("bytearray(1 << 40)", "eval('bytearray(1 << 40)')", "eval('1'), '-' * (1 << 40)", "eval('[' + '1,' * (1 << 22) + ']')")
    async with sandbox(isolation, Limits(memory_bytes=128 * MIB)) as box:
        session = await box.open_session()
        for run in (box.run, session.run):
            for code in calls:
                outcome = await run(code)
                assert outcome.status is SandboxStatus.ERROR and code in outcome.output, outcome
                assert outcome.output.endswith("\nMemoryError: nested too deeply, or too large, to be compiled\n"), outcome
        for code in large:
            outcome = await box.run(code)
            assert outcome.status is SandboxStatus.MEMORY_LIMIT and outcome.output.endswith("\nMemoryError\n"), (code, outcome)


async def test_the_memory_of_the_process_that_starts_the_sandbox_is_none_of_a_snippets(isolation: str) -> None:
    held = bytearray(b"x") * (256 * MIB)
    async with sandbox(isolation, Limits(memory_bytes=128 * MIB)) as box:
        outcome = await box.run("eval('[' + '1,' * (1 << 22) + ']')")
    assert held and outcome.status is SandboxStatus.MEMORY_LIMIT, outcome


@pytest.mark.parametrize("max_output_bytes", [65536, 5000])
async def test_a_traceback_is_cut_where_it_would_not_fit_and_its_end_is_shown(isolation: str, max_output_bytes: int) -> None:
    division = "ZeroDivisionError: division by zero\n"
    snippets = {
        "d = [" + "1," * 35000 + "]; 1 / 0": f"]; 1 / 0\n{division}",
        "raise ValueError('x' * 70000 + 'end')": "xend\n",
        "raise ValueError('\\U0001f40d' * 70000 + 'end')": "\U0001f40dend\n",
        "raise ValueError('a line\\n' * 20000 + 'end')": "a line\nend\n",
        "d = [" + "1," * 35000 + "; end": "; end\nSyntaxError: invalid syntax\n",
        "def even(n):\n    return odd(n - 1)\ndef odd(n):\n    return even(n - 1)\neven(0.5)": "maximum recursion depth exceeded\n",
        "def f(n):\n    try: 1 / 0\n    finally:\n        if n: f(n - 1)\n        raise ValueError('x' * 5000)\nf(90)": "xxx\n",
        "raise ExceptionGroup('g', [ValueError('x' * 5000 + str(i)) for i in range(30)])": "+------------------------------------\n",
        "e = ValueError('x')\nfor i in range(20000): e.add_note('a note')\nraise e": "a note\na note\n",
    }
    async with sandbox(isolation, Limits(max_output_bytes=max_output_bytes)) as box:
        for code, end in snippets.items():
            outcome = await box.run(code)
            assert (outcome.status, outcome.truncated) == (SandboxStatus.ERROR, False), (code[-99:], outcome.output[-99:])
            assert outcome.output.endswith(end) and "[...]" in outcome.output, (code[-99:], outcome.output[-99:])
        outcome = await box.run("x = 1; 1 / 0")
        assert outcome.output.endswith("    x = 1; 1 / 0\n           ~~^~~\nZeroDivisionError: division by zero\n")


async def test_endless_output_is_output_limit_and_cut_at_it(isolation: str) -> None:
    async with sandbox(isolation, Limits(max_output_bytes=1000)) as box:
        outcome = await box.run("while True: print('ä' * 99)")
        assert outcome.status is SandboxStatus.OUTPUT_LIMIT and outcome.truncated
        assert 990 <= len(outcome.output.encode()) <= 1000
        outcome = await box.run("import os\nos.write(1, b'\\xff' * 900)")
        assert outcome.status is SandboxStatus.OK and len(outcome.output.encode()) <= 1000


async def test_threads_beyond_their_limit_are_refused(isolation: str) -> None:
    code = (
        "import threading, time\nthreading.stack_size(32768)\nn = 0\ntry:\n    while n < 500:\n"
        "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\nexcept RuntimeError: print('refused', n)"
    )
    async with sandbox(isolation, Limits(max_threads=5)) as box:
        assert (await box.run(code)).output == "refused 4\n"
        one_by_one = "import threading\nfor i in range(50):\n    t = threading.Thread(target=int); t.start(); t.join()\nprint('done')"
        assert (await box.run(one_by_one)).output == "done\n"


async def test_files_beyond_their_limits_are_refused(isolation: str) -> None:
    async with sandbox(isolation, Limits(max_files=7, max_file_bytes=1000, max_open_files=20)) as box:
        many = "n = 0\ntry:\n    while True: open(f'f{n}', 'w').close(); n += 1\nexcept OSError as e: print(n, e.errno)"
        assert (await box.run(many)).output == "7 122\n"
        deleted = "import os\nn = 0\ntry:\n    while True: open('f', 'w').close(); os.unlink('f'); n += 1\nexcept OSError: print(n)"
        assert (await box.run(deleted)).output == "7\n"
        again = deleted.replace("os.unlink('f')", "open('f', 'r+').close()")  # only opening what could be made counts
        assert (await box.run(again)).output == "7\n"
        big = "f = open('f', 'wb', buffering=0)\ntry:\n    while True: f.write(b'x' * 600)\nexcept OSError: print(f.tell())"
        assert (await box.run(big)).output == "1000\n"
        opened = "keep = []\ntry:\n    while True: keep.append(open('/dev/null'))\nexcept OSError: print(len(keep) <= 17)"
        assert (await box.run(opened)).output == "True\n"


async def test_every_number_of_open_files_that_may_be_chosen_starts(isolation: str) -> None:
    """The fork server holds the descriptor of that number, whatever else it has open."""
    for number in (*range(MIN_OPEN_FILES, MIN_OPEN_FILES + 8), 5000):
        async with sandbox(isolation, Limits(max_open_files=number), preload=("math",)) as box:
            outcome = await box.run("import csv, resource\nprint(open('f', 'w').write('abc'), *resource.getrlimit(resource.RLIMIT_NOFILE))")
            assert (outcome.status, outcome.output) == (SandboxStatus.OK, f"3 {number} {number}\n"), number


async def test_more_open_files_than_the_machine_allows_are_refused_by_name(isolation: str) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with pytest.raises(ValueError, match=f"^sandbox limit max_open_files={hard} must be below .* {hard}; [^\n]*$"):
        await Sandbox(Limits(max_open_files=hard), isolation=isolation).start()


async def test_limits_as_large_as_may_be_start(isolation: str) -> None:
    names = {field.name for field in fields(Limits)} - {"max_open_files"}
    most = {name: MAX_S if name.endswith("_s") else MAX_VALUE for name in names}
    async with sandbox(isolation, Limits(**most)) as box:
        outcome = await box.run("open('f', 'w').close()\nprint(1)")
        assert (outcome.status, outcome.output) == (SandboxStatus.OK, "1\n")


async def test_segfault_is_crashed_and_exit_codes_are_told_apart(isolation: str) -> None:
    async with sandbox(isolation, QUICK) as box:
        outcome = await box.run("print('partial')\nimport ctypes; ctypes.string_at(0)")
        assert (outcome.status, outcome.output) == (SandboxStatus.CRASHED, "partial\n")
        for code, status in (
            ("import sys; sys.exit(0)", SandboxStatus.OK),
            ("import sys; sys.exit()", SandboxStatus.OK),
            ("import sys; sys.exit(3)", SandboxStatus.ERROR),
            ("import os; os._exit(0)", SandboxStatus.OK),
            ("import os; os._exit(9)", SandboxStatus.ERROR),
            ("import os; os.kill(os.getpid(), 9)", SandboxStatus.CRASHED),
        ):
            assert (await box.run(code)).status is status, code


async def test_what_cannot_be_code_is_bad_request(isolation: str) -> None:
    async with sandbox(isolation, Limits(max_code_bytes=100)) as box:
        for code in ("print('\ud800')", "a = 1\0", "x" * 101):
            assert (await box.run(code)).status is SandboxStatus.BAD_REQUEST
        assert (await box.run("#" * 100)).status is SandboxStatus.OK


async def test_traceback_shows_the_snippet_and_nothing_else(isolation: str) -> None:
    async with sandbox(isolation) as box:
        outcome = await box.run("def f(x):\n    return 1 / x\nf(0)")
        assert outcome.status is SandboxStatus.ERROR
        assert "return 1 / x" in outcome.output and "ZeroDivisionError" in outcome.output
        assert outcome.output.count("File ") == 2 and "child.py" not in outcome.output
        outcome = await box.run("x = (1,\n  2")
        assert outcome.status is SandboxStatus.ERROR and "SyntaxError" in outcome.output and "child.py" not in outcome.output


async def test_an_error_of_the_compiler_shows_its_line(isolation: str) -> None:
    line = {"x = 1\nreturn x": "return x", "def f(a, a): pass": "def f(a, a): pass", "def f():\n  nonlocal q": "nonlocal q"}
    async with sandbox(isolation) as box:
        session = await box.open_session()
        for code, shown in line.items():
            for run in (box.run, session.run):
                outcome = await run(code)
                assert outcome.status is SandboxStatus.ERROR and f"\n    {shown}\n    " in outcome.output, outcome
        outcome = await box.run(f"x = '{'y' * 5000}'; return x")
        assert "'[...]" not in outcome.output and "[...]" in outcome.output and len(outcome.output) < 2300, outcome
        for odd in ("SyntaxError('m', ([], 1, 1, None))", "SyntaxError('m', ('f', 'x', 1, None))", "SyntaxError('m', ('f', 99, 1, None))"):
            assert (await box.run(f"raise {odd}")).output.endswith("SyntaxError: m\n"), odd


async def test_traceback_shows_the_line_that_raised_whatever_ends_lines_elsewhere(isolation: str) -> None:
    async with sandbox(isolation) as box:
        for other in ("\u2028", "\x0b", "\x0c", "\x85", "\x1c"):
            outcome = await box.run(f"s = 'a{other}b'\nx = 1\r\ny = 2\r1 / 0\nz = 3")
            assert "line 4, in <module>\n    1 / 0\n    ~~^~~\nZeroDivisionError" in outcome.output, outcome.output


async def test_traceback_of_a_deep_recursion_has_its_last_thousand_frames(isolation: str) -> None:
    deep = "import sys\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return f(n + 1) if n < 49_000 else {}['deep']\n"
    async with sandbox(isolation, Limits(wall_s=20.0, cpu_s=20.0)) as box:
        outcome = await box.run(deep + "f(0)")
        assert "[Previous line repeated 997 more times]" in outcome.output and outcome.output.endswith("\nKeyError: 'deep'\n")
        outcome = await box.run(deep + "try: f(0)\nexcept KeyError as e:\n    raise ValueError(1) from e")
        assert "[Previous line repeated 997 more times]" in outcome.output and outcome.output.endswith("\nValueError: 1\n")
        outcome = await box.run("def f(n):\n    f(n + 1)\nf(0)")  # of the default depth nothing is left out
        assert outcome.output.startswith('Traceback (most recent call last):\n  File "<snippet>", line 3, in <module>\n    f(0)\n')


async def test_traceback_shows_no_frame_of_a_library(isolation: str) -> None:
    snippets = {
        "import json\njson.loads('{')": ["<snippet>"],
        "import json\ntry: json.loads('{')\nexcept ValueError as e:\n    raise KeyError(1) from e": ["<snippet>"] * 2,
        "import json\ntry: json.loads('{')\nexcept ValueError:\n    1 / 0": ["<snippet>"] * 2,
        "import json\ntry: json.loads('{')\nexcept ValueError as e:\n    raise ExceptionGroup('g', [e])": ["<snippet>"] * 3,
        "import threading\ndef f():\n    1 / 0\nt = threading.Thread(target=f)\nt.start()\nt.join()": ["<snippet>"],
        "import numpy\nnumpy.linalg.inv(numpy.zeros((2, 2)))": ["<snippet>"],
        "exec('1 / 0')": ["<snippet>", "<string>"],
        "open('own.py', 'w').write('1 / 0')\nimport sys\nsys.path.append('.')\nimport own": ["<snippet>", "own.py"],
        "import no_such_module": ["<snippet>"],
    }
    async with sandbox(isolation, preload=("json", "numpy")) as box:
        session = await box.open_session()
        for code, files in snippets.items():
            output = (await box.run(code)).output
            assert [os.path.basename(name) for name in re.findall('File "(.*?)"', output)] == files, output
            assert re.search(r"^\S*(Error|Group)\b", output, re.MULTILINE), output
        for number in (1, 2):
            assert re.findall('File "(.*?)"', (await session.run("import json\njson.loads('{')")).output) == [f"<snippet {number}>"]


async def test_same_seed_same_numbers_and_no_seed_others(isolation: str) -> None:
    code = "import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a'), list({'p', 'q', 'r'}))"
    async with sandbox(isolation, preload=("random", "numpy.random")) as box:
        first, again, other, free, freer = [await box.run(code, seed=seed) for seed in (7, 7, 8, None, None)]
        assert first.status is SandboxStatus.OK, first.output
        assert first.output == again.output
        assert len({outcome.output for outcome in (first, other, free, freer)}) == 4


async def test_seed_reaches_the_generators_of_preloaded_packages_in_every_fork_server(isolation: str) -> None:
    code = "import numpy, random, sympy\nprint(random.random(), numpy.random.rand(), sympy.randprime(1, 10**9))"
    drawn = []
    for _ in range(2):
        async with sandbox(isolation, preload=("numpy", "sympy")) as box:
            drawn.append([(await box.run(code, seed=seed)).output.split() for seed in (7, 7, 8, None, None)])
    first, again, other, free, freer = drawn[0]
    assert first == again == drawn[1][0] and len(first) == 3
    for numbers in zip(first, other, free, freer, strict=True):
        assert len(set(numbers)) == 4


async def test_beside_the_preloaded_packages_no_other_can_be_read_or_imported(isolation: str) -> None:
    import numpy

    beside = package_folders([sysconfig.get_path("stdlib"), *LIBRARIES])
    folders = sorted({os.path.dirname(os.path.dirname(numpy.__file__)), *beside})
    names = {name for folder in folders for name in os.listdir(folder) if not name.startswith(("numpy", "sympy", "mpmath"))}
    assert names
    look = f"""
import os, sys
for folder in {folders}:
    sys.path.append(folder)
    try: print('listed', folder) if os.listdir(folder) else None
    except OSError: pass
    for name in {sorted(names)}:
        for path in (name, name + '/__init__.py', name + '/METADATA'):
            try: print('read', path, len(open(os.path.join(folder, path)).read()))
            except OSError: pass
for name in ('yaml', 'httpx', 'pip', 'pydantic', 'toolrl_ray', 'tools_service.sandbox.tool'):
    try: print(__import__(name))
    except (ModuleNotFoundError, PermissionError): pass
"""
    works = """
import numpy as np, sympy, inspect, json.tool, numpy.ma, numpy.polynomial, numpy.testing, sqlite3, sympy.physics.units, sympy.stats, os
print(np.linalg.det(np.eye(2)), np.fft.fft([1.0])[0].real, sympy.integrate(sympy.Symbol('x')), len(inspect.getsource(sympy.sqrt)) > 9)
open('a', 'w').close()
os.mkdir('d')
os.rename('a', 'd/a')
print(os.listdir('d'))
"""
    async with sandbox(isolation, Limits(wall_s=10.0, memory_bytes=1 << 30), preload=("numpy", "sympy")) as box:
        outcome = await box.run(look)
        listed = {f"listed {folder}" for folder in beside} if isolation == "landlock" else set()
        assert outcome.status is SandboxStatus.OK and set(outcome.output.splitlines()) <= listed, outcome.output
        assert (await box.run(works)).output == "1.0 1.0 x**2/2 True\n['a']\n"


async def test_files_can_be_copied_and_memory_maps_of_them_flushed(isolation: str) -> None:
    copies = """
import os, shutil
os.mkdir('d')
open('d/a', 'w').write('text')
shutil.copy('d/a', 'b'), shutil.copy2('d/a', 'c'), shutil.copytree('d', 'e')
print([open(name).read() for name in ('b', 'c', 'e/a')])
for change in (lambda: os.chmod('b', 0o777), lambda: os.utime('b', (1, 1))):
    try: change()
    except PermissionError: print('refused')
"""
    maps = """
import mmap, numpy
numpy.memmap('m', 'float32', 'w+', shape=(4,)).flush()
with open('m', 'r+b') as f, mmap.mmap(f.fileno(), 0) as m:
    m[:3] = b'abc'
    m.flush()
print(open('m', 'rb').read(3))
"""
    async with sandbox(isolation, preload=("numpy",)) as box:
        assert (await box.run(copies)).output == "['text', 'text', 'text']\nrefused\nrefused\n"
        assert (await box.run(maps)).output == "b'abc'\n"


async def test_a_pool_of_threads_of_the_default_size_fits_into_their_limit(isolation: str) -> None:
    code = (
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool:\n"
        "    print(sum(pool.map(lambda n: time.sleep(0.02) or n, range(40))))"
    )
    async with sandbox(isolation, Limits(max_threads=6)) as box:
        assert (await box.run(code)).output == "780\n"


async def test_nothing_is_told_of_how_the_fork_server_was_executed(isolation: str) -> None:
    async with sandbox(isolation) as box:
        assert (await box.run("import sys\nprint(sys.argv, sys.orig_argv)")).output == "[''] ['']\n"


async def test_the_machines_name_is_hidden_and_asking_for_it_is_no_error(isolation: str) -> None:
    code = "import os, platform, socket\nprint(socket.gethostname(), socket.getfqdn(), platform.node(), os.uname().nodename)"
    async with sandbox(isolation) as box:
        assert (await box.run(code)).output == "sandbox sandbox sandbox sandbox\n"


async def test_two_snippets_see_nothing_of_each_other(isolation: str) -> None:
    look = (
        "import os, sys\ntry: up = os.listdir('..')\nexcept OSError: up = []\n"
        "print(os.listdir('.'), up, dict(os.environ), hasattr(sys, 'left'), 'left' in globals())"
    )
    leave = "import os, sys\nleft = sys.left = 1\nos.environ['left'] = '1'\nopen('left', 'w').write('x')\nos.mkdir('d'); open('d/e', 'w')"
    async with sandbox(isolation, num_ahead=1) as box:
        waiting = asyncio.create_task(box.run(leave + "\nimport time; time.sleep(1)"))
        await asyncio.sleep(0.3)
        assert (await box.run(look)).output == "[] [] {} False False\n"
        assert (await waiting).status is SandboxStatus.OK
        assert (await box.run(look)).output == "[] [] {} False False\n"


async def test_the_folder_of_another_snippet_can_be_neither_listed_nor_guessed(isolation: str) -> None:
    look = """
import os, sys
base = os.path.dirname(os.getcwd())
names = [*map(str, range(100)), *(f'{number:032x}' for number in range(100))]
try: names += os.listdir(base)
except PermissionError: print('not listed')
frame = sys._getframe()
while frame := frame.f_back:
    for child in getattr(frame.f_locals.get('self'), 'children', {}).values():
        print('child', type(child.scratch).__name__)
for name in names:
    if os.path.exists(f'{base}/{name}'): print('found', name)
"""
    async with sandbox(isolation) as box:
        session = await box.open_session()
        folders = {(await session.run("import os\nprint(os.getcwd())")).output, (await box.run("import os\nprint(os.getcwd())")).output}
        assert len(folders) == 2 and all(re.fullmatch(r"[0-9a-f]{32}\n", os.path.basename(folder)) for folder in folders)
        output = "".join([(await box.run(look)).output for _ in range(1 + box.num_ahead)])  # those kept ahead are older than the session
        assert set(output.splitlines()) == {"not listed", "child int"}


async def test_session_keeps_variables_to_itself(isolation: str) -> None:
    async with sandbox(isolation) as box:
        one, two = await box.open_session(), await box.open_session()
        await one.run("x = 41\nimport random")
        assert (await one.run("x += 1; print(x)")).output == "42\n"
        assert (await two.run("print(x)")).status is SandboxStatus.ERROR
        failed = await one.run("def g():\n    raise KeyError(x)\ng()")
        assert failed.status is SandboxStatus.ERROR and "raise KeyError(x)" in failed.output
        drawn = [(await one.run("print(random.random())", seed=5)).output for _ in range(2)]
        assert drawn[0] == drawn[1] != (await one.run("print(random.random())")).output
        before = descendants(box.zygote_pid)
        await one.close()
        await two.close()
        assert await gone_but_ready(box, before)
        assert (await one.run("1")).status is SandboxStatus.UNAVAILABLE


async def test_session_starts_afresh_after_a_limit_and_says_so(isolation: str) -> None:
    async with sandbox(isolation, Limits(wall_s=10.0, cpu_s=1.0)) as box:
        session = await box.open_session()
        busy = "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.6: pass\nx = 1"
        for _ in range(3):  # each run has the CPU limit to itself
            assert (await session.run(busy)).status is SandboxStatus.OK
        assert (await session.run("while True: pass", wall_s=0.2)).status is SandboxStatus.TIMEOUT
        outcome = await session.run("print('x' in globals())")
        assert outcome.status is SandboxStatus.OK and outcome.output.endswith("gone]\nFalse\n")
        ignored = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])\nwhile True: pass"
        assert (await session.run(ignored)).status is SandboxStatus.CPU_LIMIT
        await session.close()


async def test_session_is_at_rest_between_its_turns(isolation: str) -> None:
    count = "import threading\nn = 0\ndef f():\n    global n\n    while True: n += 1\nthreading.Thread(target=f, daemon=True).start()"
    async with sandbox(isolation, QUICK) as box:
        session = await box.open_session()
        await session.run(count)
        first = int((await session.run("print(n)")).output)
        await asyncio.sleep(0.5)
        second = int((await session.run("print(n)")).output)
        assert second - first < 4_000_000  # half a second of counting is more than ten times as much
        await session.close()


async def test_session_that_forges_its_answers_harms_only_itself(isolation: str) -> None:
    forgeries = ["b'\\0'", "b'\\x07'", "b'\\0' * 100000", "bytes(range(256)) * 20", "b'{\"status\": \"ok\"}'"]
    async with sandbox(isolation, QUICK) as box:
        for forgery in forgeries:
            session, bystander = await box.open_session(), await box.open_session()
            await bystander.run("y = 3")
            outcome = await session.run(f"import os\nos.set_blocking(3, False)\nos.write(3, {forgery})", wall_s=0.5)
            # ERROR: its own process stumbled over what it had done to its channel.
            assert outcome.status in (SandboxStatus.OK, SandboxStatus.ERROR, SandboxStatus.CRASHED)
            assert (await session.run("print(6 * 7)", wall_s=0.5)).status in tuple(SandboxStatus)
            assert (await bystander.run("print(y)")).output == "3\n"
            for code in ("import os; os.close(3)", "import os; os.read(3, 9)", "import socket; socket.socket(fileno=3).shutdown(2)"):
                assert (await session.run(code, wall_s=0.3)).status is not SandboxStatus.UNAVAILABLE, code
            await session.close()
            await bystander.close()
        assert (await box.run("print(1)")).output == "1\n"
        assert box.num_restarts == 0


async def test_session_whose_child_died_before_it_had_the_code_runs_it_in_another(isolation: str) -> None:
    async with sandbox(isolation) as box:
        session = await box.open_session()
        await session.run("x = 1")
        os.kill(pid_of(session._child), signal.SIGTERM)  # it is stopped: it dies when it is to go on
        outcome = await session.run("print('x' in globals())")
        assert (outcome.status, outcome.output) == (SandboxStatus.OK, f"{RESTARTED}False\n")
        outcome = await session.run("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")
        assert outcome.status is SandboxStatus.CRASHED


async def test_session_that_is_too_busy_to_take_the_next_code_is_timeout(isolation: str) -> None:
    """It said that its turn had ended, and went on. What cannot even be sent whole is waited for no longer than what can."""
    async with sandbox(isolation) as box:
        session = await box.open_session()
        for length in (0, 250_000):
            await session.run("import os\nos.write(3, b'\\0')\nwhile True: pass")
            outcome = await session.run(f"print(1)\n#{'x' * length}", wall_s=0.5)
            assert (outcome.status, outcome.output) == (SandboxStatus.TIMEOUT, ""), length
        assert (await session.run("print(1)")).output == f"{RESTARTED}1\n"


async def test_malformed_messages_from_inside_a_snippet_reach_nobody(isolation: str) -> None:
    """Whatever is written to whatever descriptor: only output, and the fork server's own objects are dead copies."""
    fuzz = """
import os, sys, gc, socket, struct, random
random.seed({seed})
for fd in (*range(0, 300), 1023, 4095):
    for kind in range(3):
        ended = b'X' + struct.pack('<IiQ', random.randrange(9), 0, 0)
        data = random.choice([b'f', b's', b'', b'R' + os.urandom(5), ended, b'E', os.urandom(99)])
        if fd in (1, 2): continue
        try: os.write(fd, data)
        except OSError: pass
        else: print('WROTE', fd)
frame = sys._getframe()
while frame.f_back: frame = frame.f_back
for thing in [o for o in gc.get_objects() if isinstance(o, socket.socket) or type(o).__name__ in ('Server', 'Child', 'Supervisor')]:
    for name in ('fork_child', 'shut_down', 'on_request', 'answer', 'send', 'report'):
        for arguments in ((), (b'X' * 17,), (False,)):
            if name == 'shut_down': continue
            try: getattr(thing, name)(*arguments)
            except BaseException as e: pass
print('survived')
"""
    async with sandbox(isolation, QUICK) as box:
        zygote = box.zygote_pid
        for seed in range(8):
            fuzzed, bystander = await asyncio.gather(box.run(fuzz.format(seed=seed)), box.run("print('fine')"))
            assert fuzzed.output == "survived\n", fuzzed
            assert (bystander.status, bystander.output) == (SandboxStatus.OK, "fine\n")
        assert (box.zygote_pid, box.num_restarts) == (zygote, 0)


async def test_cancelling_kills_the_snippet(isolation: str) -> None:
    async with sandbox(isolation) as box:
        running = asyncio.create_task(box.run("while True: pass"))
        await asyncio.sleep(0.3)
        before = descendants(box.zygote_pid) - ready_pids(box)
        assert before
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert await gone_but_ready(box, before, within_s=0.5)
        session = await box.open_session()
        running = asyncio.create_task(session.run("while True: pass"))
        await asyncio.sleep(0.2)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert (await session.run("print(2)")).output.endswith("2\n")


async def test_fork_server_killed_in_mid_flight_is_replaced(isolation: str) -> None:
    async with sandbox(isolation, QUICK) as box:
        session = await box.open_session()
        await session.run("x = 1")
        running = [asyncio.create_task(box.run("import time; time.sleep(1); print('late')")) for _ in range(3)]
        await asyncio.sleep(0.4)
        below = descendants(box.zygote_pid)
        os.kill(box.zygote_pid, signal.SIGKILL)
        await asyncio.sleep(0.05)  # what is handed to a child that lives for another moment may begin
        after = [await box.run(f"print({i})") for i in range(3)]
        assert [(outcome.status, outcome.output) for outcome in after] == [(SandboxStatus.OK, f"{i}\n") for i in range(3)]
        assert {outcome.status for outcome in await asyncio.gather(*running)} == {SandboxStatus.UNAVAILABLE}
        assert box.num_restarts == 1
        assert await gone(below)
        assert (await session.run("print('x' in globals())")).output.endswith("False\n")


async def test_snippet_that_certainly_did_not_begin_runs_again(isolation: str) -> None:
    async with sandbox(isolation, QUICK) as box:
        for pid in ready_pids(box):
            os.kill(pid, signal.SIGSTOP)
        os.kill(box.zygote_pid, signal.SIGKILL)
        outcome = await box.run("print('once')")
        assert (outcome.status, outcome.output, box.num_restarts) == (SandboxStatus.OK, "once\n", 1)


async def test_fork_server_that_hangs_is_replaced(isolation: str) -> None:
    async with sandbox(isolation, Limits(wall_s=0.5)) as box:
        hung = box.zygote_pid
        os.kill(hung, signal.SIGSTOP)
        outcome = await box.run("print(1)")
        assert outcome.status is SandboxStatus.UNAVAILABLE
        assert (await box.run("print(2)")).output == "2\n"
        assert box.num_restarts == 1 and not alive({hung})


async def test_child_that_the_kernel_takes_long_to_free_is_not_waited_for(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the fork server, which can report no end yet, taken to hang."""
    async with sandbox(isolation, Limits(wall_s=0.5)) as box:
        await box.run("print(1)")
        os.kill(box.zygote_pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr("tools_service.sandbox.running.readable", lambda fd: False)
            outcome = await box.run("print('part')\nwhile True: pass")
        os.kill(box.zygote_pid, signal.SIGCONT)
        assert (outcome.status, outcome.output) == (SandboxStatus.TIMEOUT, "part\n")
        assert [(await box.run("print(2)")).output for _ in range(3)] == ["2\n"] * 3
        assert box.num_restarts == 0


async def test_owner_killed_leaves_no_process_and_no_file(isolation: str, tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\nfrom tools_service.sandbox.owner import Limits, Sandbox\nasync def main():\n"
        f"    box = Sandbox(Limits(wall_s=30, cpu_s=30), isolation={isolation!r})\n    await box.start()\n"
        "    session = await box.open_session()\n    await session.run('x = 1')\n"
        "    tasks = [asyncio.create_task(box.run('open(\"f\", \"w\")\\nwhile True: pass')) for _ in range(2)]\n"
        "    await asyncio.sleep(0.3)\n    print(box.zygote_pid, flush=True)\n    await asyncio.gather(*tasks)\nasyncio.run(main())"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert int(owner.stdout.readline())
        below = descendants(owner.pid)
        assert len(below) >= 4
    finally:
        owner.kill()
        owner.wait(10)
    assert await gone(below, within_s=2.0)
    assert list(tmp_path.iterdir()) == []


async def test_close_leaves_nothing(isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    async with sandbox(isolation) as box:
        running = asyncio.create_task(box.run("import os; os.mkdir('d'); open('d/f', 'w').close()\nwhile True: pass"))
        await asyncio.sleep(0.3)
        below = descendants(box.zygote_pid) | {box.zygote_pid}
    assert (await running).status is SandboxStatus.UNAVAILABLE
    assert not alive(below)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert (await box.run("1")).status is SandboxStatus.UNAVAILABLE


async def test_close_with_reports_unread_leaves_nothing(isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that is closed over what nobody has read is reset for the other end, not merely closed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with sandbox(isolation) as box:
        await box.run("print(1)")
        below = descendants(box.zygote_pid) | {box.zygote_pid}
        for pid in ready_pids(box):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)  # the loop reads nothing meanwhile
    assert not alive(below)
    assert list(tmp_path.iterdir()) == []


async def test_many_mixed_snippets_leave_descriptors_and_processes_flat(isolation: str) -> None:
    kinds = ["print(1)", "1 / 0", "import os; os._exit(3)", "open('f', 'w').write('x')", "import ctypes; ctypes.string_at(0)", "x = ["]
    async with sandbox(isolation, QUICK) as box:

        async def worker(number: int) -> None:
            choose = random.Random(number)
            for turn in range(60):
                if turn % 20 == 19:
                    await box.run("while True: pass", wall_s=0.05)
                assert (await box.run(choose.choice(kinds))).status is not SandboxStatus.UNAVAILABLE

        async def counts() -> tuple[int, int, int]:
            await asyncio.sleep(0.3)
            of_zygote = len(os.listdir(f"/proc/{box.zygote_pid}/fd"))
            return len(os.listdir("/proc/self/fd")), of_zygote, len(descendants(box.zygote_pid))

        await worker(0)
        before = await counts()
        await asyncio.gather(*map(worker, range(1, 5)))
        assert await counts() == before
        assert box.num_restarts == 0


async def test_a_worker_thread_may_start_it_and_end(isolation: str) -> None:
    """The fork server's life hangs on the owner's process, not on the thread that executed it; and any loop will do."""
    async with sandbox(isolation) as box:
        await asyncio.to_thread(lambda: None)
        assert (await box.run("print(1)")).output == "1\n"

    async def other_loop() -> str:
        async with sandbox(isolation) as inner:
            await asyncio.sleep(0.1)
            session = await inner.open_session()
            await session.run("x = 5")
            return (await inner.run("print(2)")).output + (await session.run("print(x)")).output

    def in_thread() -> str:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(other_loop())

    assert await asyncio.to_thread(in_thread) == "2\n5\n"


async def test_preload_that_does_not_exist_is_refused_by_name(isolation: str) -> None:
    with pytest.raises(ValueError, match="no_such_module"):
        await Sandbox(isolation=isolation, preload=("no_such_module",)).start()


async def test_probe_and_stats_tell_what_holds(isolation: str) -> None:
    found = {name: holds for name, holds, _ in await asyncio.to_thread(probe)}
    async with sandbox(isolation) as box:
        await box.run("1")
        assert found[box.tier]
        assert box.stats()["num_ok"] == 1 and json.dumps(box.stats())


async def test_a_breach_refuses_to_start(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the path look-ups of the self-attack allowed, no tier below may be taken in silence."""
    from tools_service.sandbox import owner

    async def found(box: Sandbox) -> list[str]:
        return ["read a file of the host"]

    monkeypatch.setattr(owner, "breaches", found)
    with pytest.raises(owner.IsolationUnavailable, match="read a file of the host"):
        await Sandbox(isolation=isolation).start()
    async with sandbox(isolation, unsafe_no_isolation=True) as box:
        assert box.tier == "none"
        assert (await box.run("print(1)")).output == "1\n"


async def test_nothing_reaches_a_listener(isolation: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    code = f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 1)"
    async with sandbox(isolation) as box:
        assert (await box.run(code)).status is SandboxStatus.ERROR
    with listener, pytest.raises(TimeoutError):
        listener.accept()
