"""What malloc does with freed memory, counted in page faults of a fresh process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from experiments.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def touch():
    np.ones(2**24)  # 128 MiB, freed at once

def in_a_thread():
    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()

in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_a_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_kept_memory_is_not_faulted_in_again():
    def faults(how):
        command = [sys.executable, "-c", PROGRAM, how]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults("keep") < 0.2 * faults("default")


@pytest.mark.parametrize("missing", ["linux", "glibc"])
def test_elsewhere_nothing_is_done(monkeypatch, missing):
    from experiments import memory

    if missing == "linux":
        monkeypatch.setattr(memory.sys, "platform", "darwin")
    else:
        monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
