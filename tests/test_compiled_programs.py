"""Scripts keep what they compile: same bits, own folder, bounded, never in the way."""

from __future__ import annotations

import ast
import os
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.common import compiled_programs
from experiments.common.compiled_programs import keep_compiled_programs, remove_oldest

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
events: list[str] = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Begin as a new process would; afterwards JAX is as the other tests have it."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("METALSTM_CACHE_DIR", str(tmp_path / "cache"))

    def begin() -> Path | None:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", None)
        events.clear()
        return keep_compiled_programs()

    yield begin
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(factor: float = 3.0) -> np.ndarray:
    """Compile a small program again, or read it."""

    def small_program(x):
        return jnp.sin(x) @ jnp.cos(factor * x).T

    return np.asarray(jax.jit(small_program)(np.ones((3, 4), np.float32)))


def count(name: str) -> int:
    return sum(event.endswith(name) for event in events)


def test_a_second_start_reads_what_the_first_compiled(start):
    folder = start()
    first = run()
    assert (count("cache_misses"), count("cache_hits")) == (1, 0)
    (entry,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert start() == folder
    np.testing.assert_array_equal(run(), first)
    assert (count("cache_misses"), count("cache_hits")) == (0, 1)
    assert [entry] == list(folder.iterdir())


@pytest.mark.parametrize("damage", ["cut short", "empty"])
def test_a_broken_entry_is_replaced_without_a_word(start, damage, capsys, recwarn):
    folder = start()
    first = run()
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"")
    for hits in (0, 1):
        start()
        np.testing.assert_array_equal(run(), first)
        assert count("cache_hits") == hits
    assert len(entry.read_bytes()) > len(whole) / 2
    assert not recwarn.list
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_cannot_be_written_stops_nothing(start, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert start() is None
    assert np.isfinite(run()).all()
    assert count("cache_misses") == 0
    said = capsys.readouterr().err
    assert "note: compiled programs are not kept" in said
    assert "set METALSTM_CACHE_DIR to a folder of yours" in said


def test_a_folder_that_fails_later_is_spoken_of_once(start, capsys, recwarn):
    folder = start()
    run()
    shutil.rmtree(folder)
    folder.write_text("")
    for factor in (4.0, 5.0):
        assert np.isfinite(run(factor)).all()
    assert capsys.readouterr().err.count("note: compiled programs are not kept") == 1
    assert not recwarn.list


def test_a_folder_that_others_can_write_is_not_trusted(start, capsys):
    folder = start()
    folder.chmod(0o777)
    assert start() is None
    assert f"others can write to {folder}" in capsys.readouterr().err


def test_other_warnings_are_shown_as_before(start, recwarn):
    start()
    warnings.warn("of the user", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn.list] == ["of the user"]


def test_each_kind_of_cpu_has_its_folder(start, monkeypatch):
    folder = start()
    flags = compiled_programs._cpu()
    assert flags == compiled_programs._cpu()
    assert any(flags)
    monkeypatch.setattr(compiled_programs, "_cpu", lambda: [*flags, "one more"])
    assert start() not in (folder, None)


def test_what_the_user_says_to_jax_comes_first(start, monkeypatch, tmp_path):
    start()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    jax.config.update("jax_enable_compilation_cache", False)
    assert start() is None
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    assert start() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_what_was_not_read_for_longest_goes_first(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / f"machine-{age % 2}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - 1000))
    remove_oldest(tmp_path, 400)
    assert {p.name for p in tmp_path.glob("*/*")} == set("abcd")
    remove_oldest(tmp_path, 250)
    assert {p.name for p in tmp_path.glob("*/*")} == set("ab")


def calls_in(tree: ast.AST) -> set[str]:
    found = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {getattr(func, "id", getattr(func, "attr", None)) for func in found}


def test_every_script_keeps_its_programs_and_no_benchmark_does():
    trees = {
        path: ast.parse(path.read_text())
        for path in (ROOT / "experiments").rglob("*.py")
    }
    scripts = [
        path for path in trees if 'if __name__ == "__main__":' in path.read_text()
    ]
    starters = {"keep_compiled_programs"}
    for tree in (trees[path] for path in trees if path not in scripts):
        defined = (ast.FunctionDef, ast.ClassDef)
        named = [node for node in tree.body if isinstance(node, defined)]
        starters |= {n.name for n in named if starters & calls_in(n)}
    assert starters == {"keep_compiled_programs", "run_command", "Study"}
    # the launcher starts others; the examples show the library alone
    compiling = [
        p for p in scripts if p.stem != "launch" and p.parent.name != "examples"
    ]
    assert len(compiling) >= 3
    for path in compiling:
        assert starters & calls_in(trees[path]), (
            f"{path}: call keep_compiled_programs() once the flags are read"
        )
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert "keep_compiled_programs" not in path.read_text()
