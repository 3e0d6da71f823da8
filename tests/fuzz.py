"""Random input for whatever reads files or flags that somebody else wrote.

    python -m tests.fuzz --rounds 2000

Each target makes one input from a seed and reads it. A finding is an exception that the
reader does not promise, one that names neither the file nor the flag, something done
that reading must not do (unpickling, a program started, a file written), much memory,
or much time. `test_fuzz.py` does a few rounds of each; METALSTM_FUZZ_ROUNDS sets how
many.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

MAX_SECONDS = 20.0  # of CPU, in one round
MAX_MEMORY = 400 * 2**20  # more than before, in one round
PROMISED = (ValueError, FileNotFoundError)
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "shutil.")

_COMPILED = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "none"
watched: list[str] | None = None  # what was done while a reader ran


def _audit(event: str, arguments: tuple) -> None:
    if watched is None:
        return
    writes = event == "open" and any(c in str(arguments[1] or "r") for c in "wax+")
    # a program that reading compiled, which JAX keeps
    writes = writes and not str(arguments[0]).startswith(_COMPILED)
    if writes or event.startswith(FORBIDDEN):
        watched.append(f"{event}{arguments!r}")


class Finding(NamedTuple):
    target: str
    seed: int
    what: str


# -- values ----------------------------------------------------------------------------

_SCALARS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**18, 2**63, -(10**30), 0.0, 0.5, -0.1, 1e300,
    float("nan"), float("inf"), True, False, None, "", "x", "gate", "one", "constant",
    "code", "paper", "tensor", "rule", "os", "../../x", "\udcff", "é" * 50, "nan",
    "1e9", "conv4", "glyphs",
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that JSON can hold, lone surrogates aside."""
    kind = rng.random()
    if depth > 3 or kind < 0.7:
        return rng.choice(_SCALARS)
    if kind < 0.85:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = [rng.choice(("rule", "parts", "groups", "labels", "a", "")) for _ in "123"]
    return {key: value(rng, depth + 1) for key in keys[: rng.randrange(4)]}


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """Bytes changed, cut out, put in, or all from somewhere on missing."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randrange(40)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(40))
        elif kind == 3:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.randrange(200)]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def changed(rng: random.Random, document: Any) -> Any:
    """The same JSON with one part replaced, removed or added, at any depth."""
    if isinstance(document, dict) and document:
        kind = rng.random()
        key = rng.choice(list(document))
        if kind < 0.1:
            return {k: v for k, v in document.items() if k != key}
        if kind < 0.2:
            return document | {rng.choice(("x", "way", "rule", "")): value(rng)}
        if kind < 0.9:
            return document | {key: changed(rng, document[key])}
    if isinstance(document, list) and document and rng.random() < 0.7:
        at = rng.randrange(len(document))
        return [*document[:at], changed(rng, document[at]), *document[at + 1 :]]
    return value(rng)


# -- rule files ------------------------------------------------------------------------


@functools.cache
def _good_rules() -> dict[str, tuple[dict[str, Any], Any]]:
    import jax

    from metalstm import rules

    specs: list[dict[str, Any]] = [
        {"rule": "l2l", "hidden_size": 2},
        {"rule": "lstm_gates", "hidden_size": 2},
        {"rule": "learned_sgd", "rate": [0.1, 0.2], "num_steps": 3},
        {"rule": "two_layer", "memory": {"hidden_size": 2}},
        {"rule": "chain", "parts": [{"rule": "learned_sgd"}, {"rule": "learned_sgd"}]},
    ]
    probe = np.zeros((), np.float32)
    return {
        str(i): (spec, rules.build_rule(spec).init(jax.random.key(0), probe))
        for i, spec in enumerate(specs)
    }


@functools.cache
def _good_file(name: str) -> bytes:
    from metalstm import rules

    spec, params = _good_rules()[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rule.npz"
        return rules.save_rule(path, spec, params, info={"steps": 3}).read_bytes()


def rule_bytes(rng: random.Random, folder: Path) -> None:
    """A good rule file, damaged: refused, or the same rule."""
    import jax

    from metalstm import rules

    name = rng.choice(list(_good_rules()))
    path = folder / "rule.npz"
    path.write_bytes(damaged(rng, _good_file(name)))
    saved = reading(lambda: rules.load_rule(path), path)
    if saved is not None:
        spec, params = _good_rules()[name]
        assert saved.info == {"steps": 3}
        assert saved.spec == spec
        jax.tree.map(np.testing.assert_array_equal, saved.params, params)


def _random_spec(rng: random.Random, depth: int = 0) -> Any:
    from metalstm.rules.spec import FACTORIES

    kind = rng.random()
    if kind < 0.1:
        return value(rng)
    if kind < 0.25 and depth < 12:
        parts = [_random_spec(rng, depth + 1) for _ in range(rng.randrange(3))]
        return {"rule": "chain", "parts": parts}
    if kind < 0.35:
        labels = rng.choice(("conv_or_dense", "matrix_or_vector", "x"))
        names = labels.split("_or_")
        groups = {name: _random_spec(rng, depth + 1) for name in names}
        return {"rule": "by_group", "labels": labels, "groups": groups}
    name = rng.choice(list(FACTORIES))
    known = list(inspect.signature(FACTORIES[name]).parameters)
    options = {rng.choice(known): value(rng) for _ in range(rng.randrange(4))}
    if rng.random() < 0.1:
        options["unknown"] = value(rng)
    return {"rule": name, **options}


def rule_spec(rng: random.Random, folder: Path) -> None:
    """A file that is whole, signed rightly, with any header and any arrays."""
    from metalstm import rules
    from metalstm.runtime.array_files import digest_of

    spec, _ = rng.choice(list(_good_rules().values()))
    with np.load(io.BytesIO(_good_file(rng.choice(list(_good_rules()))))) as data:
        arrays = {k: v for k, v in data.items() if k != "header"}
        header = json.loads(data["header"].tobytes())
    if rng.random() < 0.5:
        name = rng.choice([*arrays, "params", "params['x']", "../x", "header.npy"])
        dtypes = ("f4", "f8", "f2", "i8", "u1", "c8", "?", "S3", "O", "M8[s]")
        shape = tuple(rng.choice((0, 1, 2, 3)) for _ in range(rng.randrange(4)))
        arrays[name] = np.zeros(shape, rng.choice(dtypes))
    if rng.random() < 0.8:
        header["spec"] = changed(rng, spec) if rng.random() < 0.4 else _random_spec(rng)
    if rng.random() < 0.3:
        header = changed(rng, header)
    if isinstance(header, dict) and rng.random() < 0.9:
        with contextlib.suppress(TypeError, UnicodeError, KeyError, ValueError):
            header["sha256"] = digest_of([header["spec"], header["info"]], arrays)
    text = json.dumps(header).encode()
    if rng.random() < 0.05:
        depth = rng.choice((1000, 100_000))
        text = b'{"format": 1, "spec": ' + b"[" * depth + b"]" * depth + b"}"
    path = folder / "rule.npz"
    members: dict[str, Any] = {"header": np.frombuffer(text, np.uint8), **arrays}
    np.savez(path, **members)
    reading(lambda: rules.load_rule(path), path)


# -- options ---------------------------------------------------------------------------


def _flag_value(rng: random.Random, hint: Any) -> list[str]:
    """What a flag may be followed by, mostly of the right kind."""
    text = str(hint)
    good: list[str] = ["1", "2", "5"]
    if "Literal" in text and rng.random() < 0.8:
        good = [str(part) for part in typing.get_args(hint) if part is not None]
    elif "bool" in text:
        return []
    elif "str" in text:
        good = ["meta-lstm", "maml,anil", "all", "l2l", "none", "20:5", "glyphs", "{}"]
    elif "float" in text:
        good = ["0.1", "1", "1e-3"]
    bad = [
        str(v) for v in _SCALARS if isinstance(v, (int, float, str)) and v != "\udcff"
    ]
    count = rng.choice((0, 2)) if rng.random() < 0.1 else 1
    if "tuple[float, float]" in text:
        count = 2
    return [rng.choice(good if rng.random() < 0.7 else bad) for _ in range(count)]


def _random_flags(rng: random.Random, groups: list[Any], folder: Path) -> list[str]:
    hints = dict(hint for group in groups for hint in _hints(group))
    arguments = []
    for _ in range(rng.randrange(6)):
        name = rng.choice(list(hints))
        flag = "--" + name.replace("_", "-")
        if rng.random() < 0.1:
            flag = f"--{rng.choice(('maml', 'meta-lstm', 'l2l', 'x'))}.{flag[2:]}"
        follow = _flag_value(rng, hints[name])
        if name in ("resume", "evaluate", "workdir", "beside", "data_dir", "curves"):
            places = (folder, folder / "none", folder / "file", Path("none\n"))
            follow = [str(rng.choice(places))]
        if follow and rng.random() < 0.1:
            flag, follow = f"{flag}={follow[0]}", follow[1:]
        arguments += [flag, *follow]
    if rng.random() < 0.1:
        arguments.append(rng.choice(("--", "-x", "--no-such-flag", "word", "--way=")))
    if rng.random() < 0.1:
        arguments += ["--preset", rng.choice(("demo", "omniglot", "quadratics", "x"))]
    return arguments


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or hasattr(value, "__struct_fields__")


def _hints(group: Any) -> Iterator[tuple[str, Any]]:
    """The names and types of all options of a group, those of groups in it too."""
    names = {field.name for field in msgspec.inspect.type_info(type(group)).fields}
    for name, hint in typing.get_type_hints(type(group)).items():
        value = getattr(group, name)
        if isinstance(value, dict):
            for one in filter(_is_group, value.values()):
                yield from _hints(one)
        elif _is_group(value):
            yield from _hints(value)
        elif name in names:
            yield name, hint


def _check_types(config: Any) -> None:
    """Options are of their types if their JSON can be read as them again."""
    from experiments.common.saved_options import from_json, to_json

    for group in [config, *getattr(config, "methods", {}).values()]:
        document = to_json(group)
        assert to_json(from_json(type(group), document)) == document
        assert "NaN" not in json.dumps(document)


def _read_flags(
    rng: random.Random, folder: Path, groups: list[Any], parse: Any
) -> None:
    (folder / "file").write_text("not a folder")
    arguments = _random_flags(rng, groups, folder)
    said = io.StringIO()

    def read() -> Any:
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                return parse(arguments)
        except SystemExit as stop:  # tyro has said what is wrong
            if stop.code == 2 and "--" in said.getvalue() + " ".join(arguments):
                return None
            raise AssertionError(f"exit {stop.code}, {said.getvalue()!r}") from stop

    try:
        config = reading(read, "--", folder, "none")
        if config is not None:
            _check_types(config)
    except BaseException as error:
        error.add_note(f"flags: {arguments}")
        raise


def _few_shot(arguments: list[str]) -> Any:
    from experiments.few_shot.command_line import parse

    return parse(arguments)


def few_shot_flags(rng: random.Random, folder: Path) -> None:
    """Flags of few_shot: options, or a line that names the flag or the folder."""
    from experiments.few_shot.methods import kind_of
    from experiments.few_shot.options import Common

    name = rng.choice(("meta-lstm", "reptile", "mann", "finetune-all"))
    own = kind_of(name, rng.choice(("conv4", "mlp", "resnet12")))()
    _read_flags(rng, folder, [Common(), own], _few_shot)


def optimizer_flags(rng: random.Random, folder: Path) -> None:
    """Flags of learned_optimizer."""
    from experiments.learned_optimizer.command_line import parse
    from experiments.learned_optimizer.options import Config

    _read_flags(rng, folder, [Config()], parse)


def _read_saved(rng: random.Random, folder: Path, config: Any, parse: Any) -> None:
    from experiments.common.saved_options import to_json

    document = {"config": to_json(config), "methods": {}, "data": {}}
    if rng.random() < 0.3:
        data = damaged(rng, json.dumps(document, indent=1).encode())
    else:
        for _ in range(rng.choice((1, 1, 3))):
            document = changed(rng, document)
        data = json.dumps(document).encode()
    (folder / "config.json").write_bytes(data)
    line = ["--evaluate", str(folder)]
    try:
        config = reading(lambda: parse(line), "--", "config.json", folder)
        if config is not None:
            _check_types(config)
    except BaseException as error:
        error.add_note(f"config.json: {data!r}")
        raise


def few_shot_config(rng: random.Random, folder: Path) -> None:
    """The config.json of a few_shot run, changed or damaged."""
    preset = rng.choice(("demo", "omniglot", "ravi-5shot", "mini-imagenet"))
    line = ["--preset", preset] if rng.random() < 0.5 else []
    _read_saved(rng, folder, _saved_options(tuple(line)), _few_shot)


@functools.cache
def _saved_options(line: tuple[str, ...]) -> Any:
    return _few_shot(list(line))


def optimizer_config(rng: random.Random, folder: Path) -> None:
    """The config.json of a learned_optimizer run, changed or damaged."""
    from experiments.learned_optimizer.command_line import parse
    from experiments.learned_optimizer.options import Config

    _read_saved(rng, folder, Config(), parse)


@functools.cache
def _good_run() -> Path:
    """What a run leaves, as short as can be; it lasts as long as the process."""
    import jax

    from experiments.few_shot.methods import specs_of
    from experiments.few_shot.train import checkpoint_of
    from metalstm import predictor, run_file
    from metalstm.runtime import checkpoints
    from metalstm.specs import build_algorithm

    folder = Path(tempfile.mkdtemp(prefix="fuzz-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    line = (
        "--algorithms prototypical,meta-lstm,scratch --learner mlp --widths 3 --way 2"
    )
    options, shape = _few_shot([*line.split(), "--hidden-size", "2"]), (3, 3, 1)
    methods = {name: (s, checkpoint_of(name)) for name, s in specs_of(options).items()}
    for spec, path in methods.values():
        init = jax.jit(build_algorithm(spec).init)
        params = init(jax.random.key(0), predictor.example_episode(shape, 2))
        checkpoints.save(folder / path, params, step=0, metadata={}, keep=1)
    normalise = [[0.5], [0.5]]
    run_file.describe_methods(folder, methods, image_shape=shape, normalise=normalise)
    return folder


def run_folder(rng: random.Random, folder: Path) -> None:
    """A run whose predictors.json is changed or damaged, for `load_run`."""
    import metalstm

    whole = (_good_run() / "predictors.json").read_bytes()
    data = damaged(rng, whole)
    if rng.random() < 0.8:
        data = json.dumps(changed(rng, json.loads(whole))).encode()
    (folder / "predictors.json").write_bytes(data)
    (folder / "checkpoints").symlink_to(_good_run() / "checkpoints")
    method = rng.choice((None, "prototypical", "meta-lstm", "scratch"))
    try:
        reading(lambda: metalstm.load_run(folder, method), folder, "=", _good_run())
    except BaseException as error:
        error.add_note(f"{method}, predictors.json: {data!r}")
        raise


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "rule_bytes": rule_bytes,
    "rule_spec": rule_spec,
    "few_shot_flags": few_shot_flags,
    "optimizer_flags": optimizer_flags,
    "few_shot_config": few_shot_config,
    "optimizer_config": optimizer_config,
    "run_folder": run_folder,
}


# -- rounds ----------------------------------------------------------------------------


def reading(call: Callable[[], Any], *names: object) -> Any:
    """Call a reader; None when it refuses as it promises, naming one of ``names``."""
    global watched
    watched = []
    try:
        found = call()
    except PROMISED as error:
        if not any(str(name) in str(error) for name in names):
            raise AssertionError(f"names no file or flag: {error!r}") from error
        found = None
    finally:
        done, watched = watched, None
    assert not done, f"reading did more than read: {done}"
    return found


def rounds(target: str, number: int, first: int = 0) -> Iterator[Finding]:
    """Do rounds ``first`` to ``first + number``; the same seed is the same input."""
    for seed in range(first, first + number):
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                TARGETS[target](random.Random(seed), Path(folder))
            except Exception as error:
                lines = traceback.format_exception(error)
                yield Finding(target, seed, "".join(lines[-6:]))
        seconds = time.process_time() - begun
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        if seconds > MAX_SECONDS:
            yield Finding(target, seed, f"took {seconds:.0f} s")
        if grown * 1024 > MAX_MEMORY:
            yield Finding(target, seed, f"took {grown >> 10} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="the first round's seed")
    parser.add_argument("--target", choices=TARGETS, action="append")
    options = parser.parse_args()
    bad = 0
    for target in options.target or TARGETS:
        begun = time.monotonic()
        findings = list(rounds(target, options.rounds, options.first))
        seconds = time.monotonic() - begun
        print(
            f"{target:18} {options.rounds} tried, {len(findings)} findings, "
            f"{seconds:.0f} s",
            flush=True,
        )
        for finding in findings[:10]:
            print(f"  seed {finding.seed}\n{finding.what}", flush=True)
        bad += len(findings)
    return bool(bad)


sys.addaudithook(_audit)
if __name__ == "__main__":
    sys.exit(main())
