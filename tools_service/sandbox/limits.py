"""What one snippet may use. Data only, so that an operator can read and change every number in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MIB = 1024 * 1024
MIN_OPEN_FILES = 16
MAX_VALUE = 2**62  # the kernel's numbers end at 2**63 - 1, and to some of these the fork server's own share is added
MAX_S = 1e9  # which the kernel counts in nanoseconds: of more it sees the rest of a division


@dataclass(frozen=True)
class Limits:
    """Limits of one snippet; in a session, of one child and, for wall time, CPU time and output, of one run of it.

    wall_s: seconds from handing the code over until everything it started is killed.
    cpu_s: seconds of CPU over all threads; rounded up to whole seconds, which is what the kernel counts, but for sessions. Code that
        ignores the signal has one more.
    memory_bytes: address space beyond what the fork server had mapped when its modules were loaded, so that a larger preload
        set leaves a snippet the same room.
    max_threads: threads alive at once, the main one included.
    max_open_files: file descriptors, the three standard ones included.
    max_file_bytes: size of one file.
    max_files: files, folders and shared memory mappings that may be created, deleted ones included. Every opening that could create
        a file counts, whether or not the file is there: nobody but the kernel could look, and it does not tell. The scratch folder
        holds at most max_files * max_file_bytes.
    max_output_bytes: of stdout and stderr together.
    max_code_bytes: of the code, as UTF-8.
    """

    wall_s: float = 5.0
    cpu_s: float = 5.0
    memory_bytes: int = 512 * MIB
    max_threads: int = 16
    max_open_files: int = 64
    max_file_bytes: int = 8 * MIB
    max_files: int = 64
    max_output_bytes: int = 64 * 1024
    max_code_bytes: int = 256 * 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = not field.name.endswith("_s")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            number = number and (isinstance(value, int) or math.isfinite(value))  # an integer may be too large for a float
            if not number or value <= 0 or (whole and value != int(value)):
                raise ValueError(f"sandbox limit {field.name}={value!r} must be a positive {'integer' if whole else 'number of seconds'}")
            if value > (most := MAX_VALUE if whole else MAX_S):
                raise ValueError(f"sandbox limit {field.name}={value!r} must be {most:g} at most")
            if whole:
                object.__setattr__(self, field.name, int(value))  # 1e9 in a file of options is a float
        if self.max_open_files < MIN_OPEN_FILES:
            raise ValueError(
                f"sandbox limit max_open_files={self.max_open_files} must be {MIN_OPEN_FILES} or more: an import alone needs several"
            )
