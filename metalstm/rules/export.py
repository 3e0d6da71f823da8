"""Rules as plain data: built from a spec, saved to one file of arrays and JSON.

A file is a ``.npz``: one array for each of the rule's parameters, named by its path,
and a JSON header with the versions, the spec, what is known about the rule and a
digest. Nothing in it is ever unpickled or evaluated, and its size is limited before it
is read.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalstm.base import PyTree, UpdateRule
from metalstm.rules.classic import chain, learned_sgd
from metalstm.rules.features import FEATURES_VERSION
from metalstm.rules.gates import lstm_gates
from metalstm.rules.groups import by_group, conv_or_dense, matrix_or_vector
from metalstm.rules.l2l_lstm import l2l
from metalstm.rules.memory import gradient_memory, two_layer
from metalstm.runtime.files import atomic_write

__all__ = ["SavedRule", "build_rule", "load_rule", "save_rule"]

FORMAT_VERSION = 1
_MAX_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 2**20
_MAX_DEPTH = 8
_HEADER = "header"

_FACTORIES: dict[str, Callable[..., UpdateRule]] = {
    "gradient_memory": gradient_memory,
    "l2l": l2l,
    "learned_sgd": learned_sgd,
    "lstm_gates": lstm_gates,
    "two_layer": two_layer,
}
_LABELS = {  # name -> the function, the labels it may give
    "conv_or_dense": (conv_or_dense, {"conv", "dense"}),
    "matrix_or_vector": (matrix_or_vector, {"matrix", "vector"}),
}


class SavedRule(NamedTuple):
    rule: UpdateRule
    params: PyTree
    spec: dict[str, Any]  # what `build_rule` made the rule of
    info: dict[str, Any]  # what was said about it when it was saved

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """Return the optax transform, trained parameters inside."""
        return self.rule.bind(self.params)


# -- specs -----------------------------------------------------------------------------


def build_rule(spec: Mapping[str, Any]) -> UpdateRule:
    """Build a rule from JSON-like data.

    ``{"rule": "l2l", "hidden_size": 20}`` is ``l2l(hidden_size=20)``, and likewise for
    lstm_gates, gradient_memory, two_layer and learned_sgd. ``{"rule": "chain", "parts":
    [spec, ..]}`` is a chain; ``{"rule": "by_group", "labels": "conv_or_dense" or
    "matrix_or_vector", "groups": {label: spec}}`` gives each group a rule.

    Raises:
      ValueError: no such rule, or arguments that it does not take.
    """
    return _build(spec, 0)


def _build(spec: Any, depth: int) -> UpdateRule:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("rule"), str):
        raise ValueError(
            f"spec={_short(spec)}: give a dict with the rule's name, such as "
            '{"rule": "l2l"}'
        )
    if depth > _MAX_DEPTH:
        raise ValueError(f"spec nests more than {_MAX_DEPTH} rules: flatten its chains")
    name = spec["rule"]
    options = {key: value for key, value in spec.items() if key != "rule"}
    if name == "chain":
        _check_options(name, options, {"parts"})
        parts = options.get("parts")
        if not isinstance(parts, list | tuple):
            raise ValueError(f"chain takes parts=[spec, ..], not {_short(parts)}")
        return chain(*(_build(part, depth + 1) for part in parts))
    if name == "by_group":
        return _build_groups(options, depth)
    if name not in _FACTORIES:
        choices = ", ".join(sorted({*_FACTORIES, "chain", "by_group"}))
        raise ValueError(f"there is no rule {_short(name)}: choose one of {choices}")
    factory = _FACTORIES[name]
    _check_options(name, options, set(inspect.signature(factory).parameters))
    try:
        return factory(**{key: _tuples(value) for key, value in options.items()})
    except TypeError as error:  # an argument of a wrong type, or unknown further in
        raise ValueError(f"{name} cannot be built of {_short(options)}: {error}") from (
            error
        )


def _build_groups(options: dict[str, Any], depth: int) -> UpdateRule:
    _check_options("by_group", options, {"groups", "labels"})
    labels, groups = options.get("labels"), options.get("groups")
    if not isinstance(labels, str) or labels not in _LABELS:
        raise ValueError(
            f"by_group has labels={_short(labels)}: choose one of "
            f"{', '.join(sorted(_LABELS))}"
        )
    label_fn, names = _LABELS[labels]
    if not isinstance(groups, Mapping) or set(groups) != names:
        raise ValueError(
            f"by_group with labels={labels!r} takes groups={{label: spec}} for "
            f"{' and '.join(sorted(names))}, not {_short(groups)}"
        )
    built = {label: _build(part, depth + 1) for label, part in groups.items()}
    return by_group(built, label_fn)


def _check_options(name: str, options: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"{name} takes no {', '.join(map(_short, unknown))}: it takes "
            f"{', '.join(sorted(known))}"
        )


def _tuples(value: Any) -> Any:
    """JSON has lists where the factories take tuples."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(x) for x in value)
    if isinstance(value, Mapping):
        return {key: _tuples(x) for key, x in value.items()}
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else text[:200] + ".."


# -- files -----------------------------------------------------------------------------


def save_rule(
    path: str | Path,
    spec: Mapping[str, Any],
    params: PyTree,
    *,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write a rule with its trained parameters to one ``.npz``; atomic.

    Args:
      path: the file; it is replaced if there is one.
      spec: what `build_rule` makes this rule of.
      params: the rule's parameters.
      info: JSON: what it was trained on, its limits, its cost and so on.

    Raises:
      ValueError: ``params`` are not the spec's, or not finite; ``info`` is not JSON.
    """
    path = Path(path)
    spec, info = _as_json("spec", spec), _as_json("info", info or {})
    arrays = {}
    for name, leaf in _named(params).items():
        array = np.asarray(leaf)
        if array.dtype != np.float64:  # bfloat16 has no name outside JAX
            array = array.astype(np.float32)
        arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
    _check_arrays(build_rule(spec), arrays, "params")
    header = {
        "format": FORMAT_VERSION,
        "features": FEATURES_VERSION,
        "spec": spec,
        "info": info,
        "sha256": _digest(spec, info, arrays),
    }
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    # a file, not a name: to one without .npz numpy would add it
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **{_HEADER: text}, **arrays)  # type: ignore[arg-type]
    return path


def load_rule(path: str | Path) -> SavedRule:
    """Read a rule that `save_rule` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a rule file, is damaged, or was written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no rule file {path}: save_rule writes them")
    members = _read_members(path)
    header = _read_header(path, members.pop(_HEADER, None))
    spec, info = header["spec"], header["info"]
    if header["sha256"] != _digest(spec, info, members):
        raise ValueError(
            f"{path} is damaged (its digest does not match what it holds): copy or "
            "download it again"
        )
    try:
        rule = build_rule(spec)
        template = _check_arrays(rule, members, "the file")
    except ValueError as error:
        raise ValueError(f"{path} holds no usable rule: {error}") from error
    names, treedef = list(_named(template)), jax.tree.structure(template)
    params = jax.tree.unflatten(treedef, [jnp.asarray(members[n]) for n in names])
    return SavedRule(rule, params, spec, info)


def _read_members(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file, by name; as `np.load` does, but within known limits."""
    remedy = "write it with save_rule, or copy it again"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > _MAX_BYTES:
                raise ValueError(f"it holds more than {_MAX_BYTES >> 20} MiB")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed")  # its true size is unknown
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError("two of its arrays have one name")
            return {
                name: _parse_npy(archive.read(entry))
                for name, entry in zip(names, entries, strict=True)
            }
    except Exception as error:  # zipfile and numpy have a dozen kinds for a bad file
        raise ValueError(
            f"{path} is not a rule file, or is cut short or damaged ({error}): {remedy}"
        ) from error


def _parse_npy(data: bytes) -> np.ndarray:
    """A .npy, read without the allocation its header asks for before it is checked."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array has a layout that save_rule does not write")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype not in (np.float32, np.float64, np.uint8):
        raise ValueError(f"an array is of {dtype}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def _read_header(path: Path, raw: np.ndarray | None) -> dict[str, Any]:
    if raw is None:
        raise ValueError(
            f"{path} is not a rule file: it has no {_HEADER}; write it with save_rule"
        )
    try:
        if raw.nbytes > _MAX_HEADER_BYTES:
            raise ValueError(f"more than {_MAX_HEADER_BYTES} bytes")
        header = json.loads(raw.tobytes())
        json.dumps(header)  # the digest will
        version, features = int(header["format"]), int(header["features"])
    except (OverflowError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} has a header that cannot be read ({error}): copy it again"
        ) from error
    if version > FORMAT_VERSION or features > FEATURES_VERSION:
        raise ValueError(
            f"{path} was written by a newer metalstm (format {version}, features "
            f"{features}; this one reads {FORMAT_VERSION} and {FEATURES_VERSION}): "
            "upgrade metalstm"
        )
    if version != FORMAT_VERSION or features != FEATURES_VERSION:
        raise ValueError(
            f"{path} was trained on features {features} (format {version}), which this "
            "metalstm does not compute: train it again, or install the version it "
            "was made with"
        )
    for name, kind in (("spec", dict), ("info", dict), ("sha256", str)):
        if not isinstance(header.get(name), kind):
            raise ValueError(
                f"{path} has a header without {name}: write it with save_rule"
            )
    return header


def _check_arrays(rule: UpdateRule, arrays: dict[str, np.ndarray], what: str) -> PyTree:
    """Return the rule's parameters as shapes, the arrays being exactly those."""
    probe = jnp.zeros(())  # a rule that can be saved does not depend on the model

    def update(params):
        tx = rule.bind(params)
        return tx.update(probe, tx.init(probe), probe, value=probe)

    template = _shapes(rule.init, jax.random.key(0), probe)
    expected = {name: leaf.shape for name, leaf in _named(template).items()}
    given = {name: array.shape for name, array in arrays.items()}
    if expected != given:
        differing = sorted(
            name
            for name in expected.keys() | given.keys()
            if expected.get(name) != given.get(name)
        )
        some = ", ".join(
            f"{name} is {given.get(name, 'missing')} in place of "
            f"{expected.get(name, 'nothing')}"
            for name in differing[:3]
        )
        raise ValueError(
            f"{what} and the spec disagree: {some}. Rules with rates or biases for "
            "each tensor belong to one model and live in its checkpoints"
        )
    for name, array in arrays.items():
        if array.dtype == np.uint8 or not np.all(np.isfinite(array)):
            raise ValueError(f"{what}: {name} holds what is not a finite number")
    _shapes(update, template)
    return template


def _shapes(fn: Callable, *args: Any) -> PyTree:
    try:
        return jax.eval_shape(fn, *args)
    except Exception as error:  # whatever an argument of a wrong kind leads to
        raise ValueError(f"the spec makes no rule that runs: {error}") from error


def _named(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"params" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}= must be JSON: {error}") from error


def _digest(spec: Any, info: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """Of everything that a reader relies on, in an order of its own."""
    digest = hashlib.sha256(json.dumps([spec, info], sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
