"""Compiled programs kept on disk, so that a script's second start compiles little.

The cache is JAX's own. Here is what it leaves to its user:

- XLA's programs for a CPU use all its instructions, and JAX's keys do not name them: on
  another machine with the same home folder they may crash. So each kind of CPU has a
  folder of its own.
- Whoever can write a program runs code here, so the folder is its user's alone.
- Its size. JAX's own limit needs another package, and one process killed between an
  entry and its time stamp leaves a cache to which nothing can be written any more.
- An entry that was cut short stays, and is complained of by every process.
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 2**30
# before it, programs compiled on this machine are taken for another's, with an alarming
# message for each
_OLDEST_JAX = (0, 10, 2)
_CPU_FIELDS = {
    "CPU architecture", "CPU implementer", "CPU part", "CPU variant", "Features",
    "cpu", "cpu family", "flags", "isa", "model", "model name", "stepping", "vendor_id",
}  # fmt: skip
_FAILED = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)'"
)


def keep_compiled_programs() -> Path | None:
    """Let JAX keep what it compiles; return the folder, or None when it does not.

    To be called by every script before anything is compiled. JAX's own variables come
    first: JAX_COMPILATION_CACHE_DIR names another folder, which is left as it is, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. A folder that cannot be written
    costs time, and stops nothing.
    """
    import jax

    from metalstm.data import cache_folder

    config: Any = jax.config
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:
        return None
    if jax.__version_info__ < _OLDEST_JAX:
        return None
    root = cache_folder() / "compiled"
    folder = root / machine_name()
    try:
        _make_private(folder)
        remove_oldest(root, MAX_BYTES)
    except OSError as error:
        _note(error)
        return None
    _mend_broken_entries(folder)
    config.update("jax_compilation_cache_dir", str(folder))
    # programs of all sizes: some hundred small ones take as long as a large one
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def machine_name() -> str:
    """12 hex digits that differ between kinds of CPU, and between users."""
    from metalstm.data.cache import fingerprint

    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME")
    return fingerprint([platform.system(), platform.machine(), user, *_cpu()])


def _cpu() -> list[str]:
    """What the operating system says of the CPU's kind and instructions."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        fields = (line.partition(":") for line in first.splitlines())
        return [f"{n.strip()}:{v}" for n, _, v in fields if n.strip() in _CPU_FIELDS]
    if sys.platform == "darwin":
        names = ["machdep.cpu.brand_string", "hw.cpufamily"]
        done = subprocess.run(["sysctl", *names], capture_output=True, text=True)
        return [done.stdout]
    return [platform.processor()]


def _make_private(folder: Path) -> None:
    """Make the folder and try to write to it; raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = folder.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"others can write to {folder}")
    probe = folder / f"probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(4096))
    finally:
        probe.unlink(missing_ok=True)


def remove_oldest(root: Path, max_bytes: int) -> None:
    """Remove programs that were not read for longest, until the rest fits."""
    entries = []
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # by another process
            stat = path.stat()
            entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size


def _mend_broken_entries(folder: Path) -> None:
    """Remove an entry that JAX warns of, and say so at most once.

    JAX writes an entry only where there is none: one cut short would never be replaced.
    """
    show: Callable[..., Any] = warnings.showwarning
    noted = False

    def showwarning(message, category, *where, **more) -> None:
        nonlocal noted
        failed = _FAILED.match(str(message))
        if failed is None:
            show(message, category, *where, **more)
            return
        for entry in folder.glob(glob.escape(failed[2]) + "-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
        if failed[1] == "writing" and not noted:
            noted = True
            _note(message)

    warnings.showwarning = showwarning


def _note(reason: object) -> None:
    print(
        f"note: compiled programs are not kept ({reason}), so every start compiles "
        "again; set METALSTM_CACHE_DIR to a folder of yours with room, or switch this "
        "off with JAX_ENABLE_COMPILATION_CACHE=false",
        file=sys.stderr,
    )
