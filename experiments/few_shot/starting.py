"""What ``--init-from`` names: found, compared with the new method, and taken from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import metalstm
from experiments.common.saved_options import located, to_json
from metalstm import nn
from metalstm.base import LearnerState, PyTree

_MODULES = {"conv4": nn.Conv4, "mlp": nn.MLP, "resnet12": nn.ResNet12}
# of a network: what changes no function of trained arrays
_FREE = {
    "num_classes", "zero_head", "initializer", "scale_init", "momentum", "learner",
    "method", "name", "parent",
}  # fmt: skip


@dataclasses.dataclass
class _Unknown:
    """A network of a user's, whose options its record has."""


class New(NamedTuple):
    """The method that starts."""

    name: str
    spec: Mapping[str, Any]
    params: PyTree  # as drawn
    reads_averages: bool  # its batch norms use stored averages, and it gathers none
    is_trained: bool  # further
    data: Mapping[str, Any]  # of `Source.describe`
    flag: str = "--init-from"  # that names the trained one


def start_from(init_from: str, new: New) -> LearnerState:
    """Return the learner that a method starts from; print what was taken from where.

    Raises:
      ValueError: nothing is found there, or what is there would be another function in
        the new method, was trained on images normalised in another way, or has a
        trained rule that no --episodes would test.
    """
    try:
        path, source = _found(init_from)
        started = nn.init_from(learner_of(new.params), learner_of(source.params))
        _compare(source, new)
        _check_averages(started.state, new)
        _check_rule(path, source, new)
    except (OSError, ValueError) as error:
        raise ValueError(f"{new.flag} {init_from}: {error}") from error
    left = [*started.left]
    if _rule_of(new.params):
        left.append("its rule")
    drawn = f"; as drawn: {', '.join(left)}" if left else ""
    print(
        f"{new.name} starts from {source.method} of {path}: {len(started.taken)} "
        f"arrays{drawn}",
        flush=True,
    )
    then, now = _shape_of(source), tuple(new.data["image_shape"])
    if then not in (None, now):
        print(f"note: it was trained on images of {then}, and these have {now}")
    return started.state


def learner_of(params: PyTree) -> LearnerState:
    """The network in a method's meta-parameters.

    Raises:
      ValueError: it has none.
    """
    learner = getattr(params, "learner", params)
    if not isinstance(learner, LearnerState):
        raise ValueError("the method has no network to start from another's")
    return learner


def _found(init_from: str) -> tuple[Path, metalstm.Predictor]:
    folder, colon, method = init_from.rpartition(":")
    if not colon or Path(init_from).exists():
        folder, method = init_from, ""
    path = located(Path(folder))
    if path.suffix != ".npz":
        return path, metalstm.load_run(path, method or None)
    if method:
        raise ValueError(f"a file holds one method: drop :{method}")
    return path, metalstm.load(path)


def _compare(source: metalstm.Predictor, new: New) -> None:
    then, now = (_network(spec) for spec in (source.spec, new.spec))
    for name in sorted(then.keys() & now.keys() - _FREE):
        if then[name] != now[name]:
            raise ValueError(
                f"its network was trained with {name}={then[name]}, and this one has "
                f"{name}={now[name]}, which makes another function of the same arrays: "
                f"give {_flag(name, then[name])}, or start from one trained as it is"
            )
    normalised = [_listed(source.normalise), _listed(new.data["normalise"])]
    if normalised[0] != normalised[1]:
        raise ValueError(
            f"it was trained on images with normalise={normalised[0]}, and these have "
            f"{normalised[1]}: give the --normalise it was trained with"
        )


def _network(spec: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a method's network, without a head around it, as in JSON."""
    network = (spec or {}).get("of", spec or {}).get("learner")
    while isinstance(network, Mapping) and "body" in network:
        network = network["body"]
    if not isinstance(network, Mapping):
        return {}
    # a call of the constructor records the options that it was given
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(
            _MODULES.get(str(network.get("learner")), _Unknown)
        )
        if field.default is not dataclasses.MISSING
    }
    return to_json(defaults | dict(network))


def _flag(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{dashed}", *map(str, values)])


def _listed(normalise: Any) -> Any:
    return normalise and [[float(x) for x in part] for part in normalise]


def _shape_of(source: metalstm.Predictor) -> tuple[int, ...] | None:
    shape = getattr(source.example, "shape", None)
    return shape and tuple(shape)


def _check_averages(started: LearnerState, new: New) -> None:
    now, drawn = (
        jax.tree.leaves(jax.tree.map(np.asarray, state.stats))
        for state in (started, learner_of(new.params))
    )
    as_drawn = all(map(np.array_equal, now, drawn))
    if new.reads_averages and now and as_drawn:
        raise ValueError(
            "it was trained with the support set's statistics and has no averages, "
            f"which {new.name} reads: train it with --query-norm frozen "
            "--train-query-norm frozen, or start from another"
        )


def _check_rule(path: Path, source: metalstm.Predictor, new: New) -> None:
    mine, theirs = _rule_of(new.params), _rule_of(source.params)
    if mine and mine == theirs and not new.is_trained:
        raise ValueError(
            f"--episodes 0 would test its network with a rule that is not trained: "
            f"--evaluate {path} tests both, or train the rule with --episodes"
        )


def _rule_of(params: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a method's rule's arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(getattr(params, "rule", ()))
    return [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in leaves]
