"""What systems do differently, each with a second way that every POSIX system knows.

Nothing else in the package asks which system it runs on; `PORTABLE=1 python -m pytest` hides what
only Linux has and tests the second ways.
"""

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path

ONE_CALL = 1 << 30  # bytes to read or write at once: macOS refuses 2 GiB (CPython, fileutils.h)
_AT_FDCWD = -100  # Linux, fcntl.h
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, linux/fs.h; RENAME_SWAP of macOS, sys/stdio.h
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """The CPUs that this process may use; where that is not known, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group. Where the
    system does not say what is free, all that the machine has."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CONTROL_GROUP / "memory.max").read_text())
        free = min(free, limit - int((_CONTROL_GROUP / "memory.current").read_text()))
    return free


def copy_in_kernel(source: int, start: int, target: int, to: int, count: int) -> int:
    """Copies up to `count` bytes between open files (as a reflink where they can be one), and says
    how many: 0 where kernel or file system cannot, or one of the two failed."""
    with contextlib.suppress(OSError):
        if hasattr(os, "copy_file_range"):
            done: int = os.copy_file_range(source, target, count, start, to)
            return done
    return 0


def exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where kernel, C library or file system cannot."""
    library, names = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
    if swap := getattr(library, "renameat2", None):  # Linux
        return bool(swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0)
    if swap := getattr(library, "renamex_np", None):  # macOS
        return bool(swap(*names, _EXCHANGE) == 0)
    return False


def flush(descriptor: int) -> None:
    """Puts what was written on the disk; on macOS `fsync` leaves it in the drive's cache."""
    with contextlib.suppress(OSError):  # a file system that does not offer it, as SQLite takes it
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
