"""Rules in files: a spec and trained parameters, as arrays and JSON.

A file is a ``.npz``: one array for each of the rule's parameters, named by its path,
and a JSON header with the versions, the spec, what is known about the rule and a
digest. Nothing in it is ever unpickled or evaluated, and its size is limited before it
is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalstm.base import PyTree, UpdateRule
from metalstm.rules.features import FEATURES_VERSION
from metalstm.rules.spec import build_rule
from metalstm.runtime.array_files import (
    as_json,
    differences,
    digest_of,
    named_leaves,
    read_members,
    write_members,
)
from metalstm.runtime.files import finished_files

__all__ = ["SHIPPED", "SavedRule", "load_rule", "save_rule"]

SHIPPED = Path(__file__).parent / "shipped"

FORMAT_VERSION = 1
_MAX_BYTES = 64 * 2**20


class SavedRule(NamedTuple):
    rule: UpdateRule
    params: PyTree
    spec: dict[str, Any]  # what `build_rule` made the rule of
    info: dict[str, Any]  # as given to `save_rule`

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """Return the optax transform, trained parameters inside."""
        return self.rule.bind(self.params)


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
    spec, info = as_json("spec", spec), as_json("info", info or {})
    arrays = {}
    for name, leaf in named_leaves(params).items():
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
        "sha256": digest_of([spec, info], arrays),
    }
    write_members(path, header, arrays)
    return path


def load_rule(path: str | Path) -> SavedRule:
    """Read a rule that `save_rule` wrote.

    Args:
      path: the file; or, where there is none, the name of a rule of the package, such
        as ``"gates-v1"``.

    Raises:
      FileNotFoundError: there is no such file, and no such rule.
      ValueError: it is not a rule file, is damaged, or was written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        shipped = finished_files(SHIPPED, "*.npz")
        if str(path) not in shipped:
            raise FileNotFoundError(
                f"there is no rule file {path}: save_rule writes them; the rules of "
                f"the package are {', '.join(shipped)}"
            )
        path = shipped[str(path)]
    header, members = read_members(
        path,
        "rule",
        remedy="write it with save_rule",
        dtypes=(np.float32, np.float64),
        max_bytes=_MAX_BYTES,
    )
    _check_header(path, header)
    spec, info = header["spec"], header["info"]
    if header["sha256"] != digest_of([spec, info], members):
        raise ValueError(
            f"{path} is damaged (its digest does not match what it holds): copy or "
            "download it again"
        )
    try:
        rule = build_rule(spec)
        template = _check_arrays(rule, members, "the file")
    except ValueError as error:
        raise ValueError(f"{path} holds no usable rule: {error}") from error
    names, treedef = list(named_leaves(template)), jax.tree.structure(template)
    params = jax.tree.unflatten(treedef, [jnp.asarray(members[n]) for n in names])
    return SavedRule(rule, params, spec, info)


def _check_header(path: Path, header: dict[str, Any]) -> None:
    try:
        version, features = int(header["format"]), int(header["features"])
    except (OverflowError, KeyError, TypeError, ValueError) as error:
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


def _check_arrays(rule: UpdateRule, arrays: dict[str, np.ndarray], what: str) -> PyTree:
    """Return the rule's parameters as shapes, the arrays being exactly those."""
    probe = jnp.zeros(())  # a rule that can be saved does not depend on the model

    def update(params):
        tx = rule.bind(params)
        return tx.update(probe, tx.init(probe), probe, value=probe)

    template = _shapes(rule.init, jax.random.key(0), probe)
    expected = {name: leaf.shape for name, leaf in named_leaves(template).items()}
    given = {name: array.shape for name, array in arrays.items()}
    if some := differences(expected, given):
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
