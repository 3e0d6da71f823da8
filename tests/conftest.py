"""Settings shared by the tests: devices, the compilation cache, real data."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest

# Tests compare float32 sums bit by bit and count compilations: one CPU, whatever the
# machine has. Subprocesses inherit the environment.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the tests' time, and many tests compile the same program again,
# in subprocesses too, where a small one costs four times as much as reading it.
# `make clean` empties this.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Programs run for milliseconds: LLVM's passes over them would cost more than they save.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

# Tracing makes millions of objects that reference counts free: looking so often for
# cycles among them would be a tenth of the time.
gc.set_threshold(50_000, 20, 20)

REAL_DATA = "METALSTM_TEST_DATA"


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """The folder with tensorflow_datasets/ and mini_imagenet/; see `real_data`."""
    return Path(os.environ[REAL_DATA])


@pytest.fixture
def tiny_instead_of_glyphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands' default data set, and an empty folder for their runs."""
    import few_shot_runs

    from metalstm import data

    monkeypatch.setattr(data, "load_glyphs", few_shot_runs.tiny_dataset)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few_shot with a method of every kind; `copy` it before changing it."""
    import few_shot_runs

    from experiments.few_shot import __main__ as few_shot
    from metalstm import data

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_glyphs", few_shot_runs.tiny_dataset)
        assert few_shot.main(few_shot_runs.four_methods(folder)) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


# Each worker makes the session's fixtures anew: files that share one run on one worker.
TOGETHER = {"test_few_shot_evaluate": "test_few_shot"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(name, name)))
    # a worker that begins a long file last leaves the others idle
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if os.environ.get(REAL_DATA):
        return
    skip = pytest.mark.skip(reason=f"{REAL_DATA} names no folder with real data")
    for item in items:
        if "real_data" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # what was imported is no garbage: each look at it takes a fifth of a second
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Where real data is there, nothing is missing: a test that skips has failed."""
    report = yield
    if report.skipped and os.environ.get(REAL_DATA):
        report.outcome = "failed"
        report.longrepr = f"skipped although {REAL_DATA} is set: {report.longrepr}"
    return report
