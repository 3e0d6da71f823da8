"""Trained methods in files: arrays and JSON, never pickled.

A file is a ``.npz``: one array for each of the meta-parameters, named by its path, and
a JSON header with the method's spec (see `metalstm.specs`), what its examples look like
and a digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalstm import inputs
from metalstm.base import Batch, Episode, MetaAlgorithm, PyTree
from metalstm.data.episodes import (
    Sampler,
    classes_of,
    episode_key,
    sample_checked,
)
from metalstm.predictor import Predictor
from metalstm.records import GIVEN, to_spec
from metalstm.runtime.array_files import (
    as_json,
    differences,
    digest_of,
    named_leaves,
    read_members,
    write_members,
)
from metalstm.specs import build_algorithm

__all__ = ["load", "read_info", "save"]

FORMAT_VERSION = 1
_MAX_BYTES = 8 * 2**30
_DTYPES = (
    *(np.float16, np.float32, np.float64, np.bool_, np.int8, np.int16, np.int32),
    *(np.int64, np.uint16, np.uint32, np.uint64),
)
_PROBE = "probe"
_REMEDY = "write it with metalstm.save"


def save(
    path: str | Path,
    algorithm: MetaAlgorithm,
    params: PyTree,
    pool: Any,
    spec: Sampler,
    *,
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained method to one ``.npz``; atomic.

    The algorithm is written as the constructor that made it and its arguments. What no
    file can hold of them (a network of your own, an optax transform) is left out, and
    is given to `load` again.

    Args:
      path: the file; it is replaced if there is one.
      algorithm: what was trained.
      params: its meta-parameters, such as ``state.params``.
      pool: what it was trained on, for the shape and type of an example.
      spec: the tasks of the test: how many classes, and how examples are normalised.
      info: JSON: what it was trained on, its accuracy and so on.

    Raises:
      ValueError: ``params`` are not the algorithm's; ``info`` is not JSON; an example
        is something else than arrays in dicts and tuples; two objects that a file
        cannot hold have one name.

    >>> import tempfile
    >>> from metalstm import algorithms, data, nn
    >>> pool = data.make_pool(np.arange(24, dtype=np.float32).reshape(3, 4, 2))
    >>> spec, learner = data.EpisodeSpec(2, 1, 1), nn.mlp(None, widths=(4,))
    >>> algorithm = algorithms.prototypical(learner)
    >>> episode = spec.sample(jax.random.key(0), pool)
    >>> params = algorithm.init(jax.random.key(0), episode)
    >>> path = save(tempfile.mktemp(".npz"), algorithm, params, pool, spec)
    >>> load(path)([[0.0, 0.0], [1.0, 1.0]], ["a", "b"], [[0.9, 1.0]]).tolist()
    ['b']
    """
    path = Path(path)
    method_spec, given = to_spec(algorithm)
    episode = sample_checked(spec, episode_key(0, "test", 0), pool)
    way = classes_of(spec, episode)
    pixels = getattr(getattr(pool, "stored", None), "dtype", None) == jnp.uint8
    header = {
        "format": FORMAT_VERSION,
        "spec": method_spec,
        "given": sorted(given),
        "regression": way is None,
        "example": inputs.to_json(inputs.describe(episode.support.x, pixels=pixels)),
        "normalise": getattr(spec, "normalise", None),
        "num_classes": episode.query.y.shape[-1] if way is None else way,
        "info": dict(info or {}),
    }
    header = as_json("info", header)
    arrays = {name: _to_numpy(leaf) for name, leaf in named_leaves(params).items()}
    header["dtypes"] = {name: dtype for name, (_, dtype) in arrays.items()}
    stored = {name: array for name, (array, _) in arrays.items()}
    _check(stored, header, _template(algorithm, header), "params")
    header["way"] = _fixed_way(algorithm, params, episode, way)
    if given:
        stored[_PROBE] = _probe(algorithm, params, header)
    header["sha256"] = digest_of(header, stored)
    write_members(path, header, stored)
    return path


def load(path: str | Path, **given: Any) -> Predictor:
    """Read a method that `save` wrote, ready to predict.

    A method made by the library's constructors needs nothing else. A network of your
    own is given by the name of the argument that it was: ``load(path, learner=net)``,
    a rule that is an optax transform as ``rule=``, and an algorithm that no constructor
    of the library made as ``algorithm=``. What is given must predict on a fixed probe
    as what was saved did.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a file of `save`, is damaged, or was written by a newer
        version; an object is missing, or is another than the one saved.
    """
    path = Path(path)
    header, arrays = _read(path)
    names = header["given"]
    if sorted(given) != names:
        wanted = ", ".join(f"{name}=" for name in names) or "nothing else"
        raise ValueError(
            f"{path} was saved without what no file can hold: give load {wanted} "
            f"(it got {', '.join(sorted(given)) or 'nothing'})"
        )
    probe = arrays.pop(_PROBE, None)
    spec = _fill(header["spec"], given)
    algorithm = spec if isinstance(spec, MetaAlgorithm) else build_algorithm(spec)
    template = _template(algorithm, header)
    remedy = f"{path}; give what it was saved with" if names else str(path)
    _check(arrays, header, template, remedy)
    params = _to_params(arrays, header, template)
    if probe is not None:
        found = _probe(algorithm, params, header)
        same = found.shape == probe.shape
        if not same or not np.allclose(found, probe, 1e-2, 1e-2 * np.abs(probe).max()):
            raise ValueError(
                f"{', '.join(f'{name}=' for name in names)} predicts otherwise than "
                f"what was saved to {path}: give the same network or transform"
            )
    method_spec = header["spec"]
    return Predictor(
        method=str(method_spec.get("algorithm", "algorithm")),
        algorithm=algorithm,
        params=params,
        way=header["way"],
        example=inputs.from_json(header["example"]),
        normalise=header["normalise"],
        regression=header["regression"],
        spec=method_spec,
        source=None if given else (load, (path.absolute(),)),
    )


def read_info(path: str | Path) -> dict[str, Any]:
    """Return the ``info`` that `save` was given.

    Raises:
      FileNotFoundError, ValueError: as `load`.
    """
    return _read(Path(path))[0]["info"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: metalstm.save writes them")
    header, arrays = read_members(
        path, "metalstm.save", remedy=_REMEDY, dtypes=_DTYPES, max_bytes=_MAX_BYTES
    )
    version = header.get("format")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version!r}, and this metalstm reads {FORMAT_VERSION}: "
            "install the metalstm that wrote it"
        )
    if header.pop("sha256", None) != digest_of(header, arrays):
        raise ValueError(
            f"{path} is damaged (its digest does not match): copy it again"
        )
    return header, arrays


def _fixed_way(
    algorithm: MetaAlgorithm, params: PyTree, episode: Episode, way: int | None
) -> int | None:
    """The number of classes, or targets, that every task must have; None: any."""
    if way is None:
        return int(episode.query.y.shape[-1])

    def predict(params):
        key, x = jax.random.key(0), episode.query.x
        support = episode.support
        return algorithm.predict(params, key, support, x, num_classes=way + 1)

    try:
        scores = jax.eval_shape(predict, params)
    except (TypeError, ValueError):  # of the method, or of shapes that do not fit
        return way
    return None if scores.shape[-1] == way + 1 else way


def _example(header: Mapping[str, Any]) -> Episode:
    way, regression = header["num_classes"], header["regression"]
    example, num = inputs.from_json(header["example"]), 1 if regression else way
    x = jax.tree.map(lambda e: jnp.zeros((num, *e.shape), e.dtype), example)
    batch = Batch(x, jnp.zeros((1, way)) if regression else jnp.arange(way))
    return Episode(batch, batch)


def _template(algorithm: MetaAlgorithm, header: Mapping[str, Any]) -> PyTree:
    return jax.eval_shape(algorithm.init, jax.random.key(0), _example(header))


def _probe(
    algorithm: MetaAlgorithm, params: PyTree, header: Mapping[str, Any]
) -> np.ndarray:
    """Scores of fixed examples, which another network would score otherwise."""
    rng = np.random.RandomState(0)

    def drawn(batch: Batch) -> Batch:
        def like(x: jax.Array) -> jax.Array:
            integers = jnp.issubdtype(x.dtype, jnp.integer)
            drawn = (
                rng.randint(0, 2, x.shape) if integers else rng.uniform(size=x.shape)
            )
            return jnp.asarray(drawn, x.dtype)

        return batch._replace(x=jax.tree.map(like, batch.x))

    support, query = map(drawn, _example(header))
    way = None if header["regression"] else header["num_classes"]

    def predict(params):
        key = jax.random.key(0)
        return algorithm.predict(params, key, support, query.x, num_classes=way)

    return np.asarray(jax.jit(predict)(params), np.float32)


def _to_numpy(leaf: Any) -> tuple[np.ndarray, str]:
    """An array as a file can hold it, and its true type."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), "key"
    array = np.asarray(leaf)
    dtype = str(array.dtype)
    if array.dtype == jnp.bfloat16:  # which has no name outside JAX
        array = array.view(np.uint16)
    return np.ascontiguousarray(array).reshape(array.shape), dtype


def _from_numpy(array: np.ndarray, dtype: str) -> jax.Array:
    if dtype == "key":
        return jax.random.wrap_key_data(jnp.asarray(array))
    if dtype == "bfloat16":
        array = array.view(jnp.bfloat16)
    return jnp.asarray(array)


def _is_mean(arrays: Mapping[str, np.ndarray], template: PyTree) -> bool:
    """Whether the parameters are one array of a method that learns none."""
    return not jax.tree.leaves(template) and list(arrays) == ["params"]


def _check(
    arrays: Mapping[str, np.ndarray],
    header: Mapping[str, Any],
    template: PyTree,
    what: str,
) -> None:
    """Refuse arrays that are not the parameters of the method."""
    if _is_mean(arrays, template):
        return

    def shown(dtype: str, shape: Any) -> str:
        return f"{dtype} {list(shape)}"

    expected, given = {}, {}
    for name, leaf in named_leaves(template).items():
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        expected[name] = "key" if is_key else shown(str(leaf.dtype), leaf.shape)
    for name, array in arrays.items():
        dtype = header["dtypes"].get(name, "")
        given[name] = "key" if dtype == "key" else shown(dtype, array.shape)
    if some := differences(expected, given):
        raise ValueError(f"{what}: these are not the algorithm's parameters: {some}")


def _to_params(
    arrays: Mapping[str, np.ndarray], header: Mapping[str, Any], template: PyTree
) -> PyTree:
    leaves = {n: _from_numpy(a, header["dtypes"][n]) for n, a in arrays.items()}
    if _is_mean(arrays, template):
        return leaves["params"]
    names = named_leaves(template)
    structure = jax.tree.structure(template)
    return jax.tree.unflatten(structure, [leaves[name] for name in names])


def _fill(spec: Any, given: Mapping[str, Any]) -> Any:
    """Put what was given where the spec has a place for it."""
    if isinstance(spec, Mapping):
        if set(spec) == {GIVEN}:
            return given[spec[GIVEN]]
        return {key: _fill(value, given) for key, value in spec.items()}
    return [_fill(part, given) for part in spec] if isinstance(spec, list) else spec
