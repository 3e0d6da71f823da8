"""Split a function in two: what does not read its last argument, and what does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

__all__ = ["Split", "split_function"]

PyTree = Any

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call")


class Split(NamedTuple):
    """Two functions of which ``later(earlier(*fixed), last)`` is the one split."""

    earlier: Callable[..., list[jax.Array]]
    later: Callable[[Sequence[jax.Array], PyTree], PyTree]


class _Waiting:
    """Stands for a value of the other half."""


_WAITING = _Waiting()


def split_function(fn: Callable, *args: PyTree) -> Split:
    """Split ``fn(*fixed, last)``, traced for arguments like ``args``.

    The operations are those of ``fn``, each in one of the halves: all that does not
    depend on ``last`` is in ``earlier``. Both can be jitted.
    """
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    out_tree = jax.tree.structure(out_shape)
    num_last = len(jax.tree.leaves(args[-1]))

    def halve(jaxpr, consts, values, at):
        """Run the operations of one half; values of the other are `_WAITING`."""
        environment = dict(zip(jaxpr.constvars, consts, strict=True))
        environment |= dict(zip(jaxpr.invars, values, strict=True))

        def read(atom):
            is_literal = isinstance(atom, core.Literal)
            return atom.val if is_literal else environment[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            literal = [isinstance(atom, core.Literal) for atom in eqn.invars]
            reads_last = [
                not is_literal and at.reads_last(value)
                for is_literal, value in zip(literal, inputs, strict=True)
            ]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if any(reads_last) and eqn.primitive.name in _CALLS and inner is not None:
                given = [
                    at.constants([value])[0] if is_literal else value
                    for is_literal, value in zip(literal, inputs, strict=True)
                ]
                consts = at.constants(inner.consts)
                outputs = halve(inner.jaxpr, consts, given, at)
            else:
                outputs = at.run(eqn, inputs, literal, any(reads_last))
            environment |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    places: list[int] = []  # of each value that the later half reads, in its order

    def earlier(*fixed):
        values = [*jax.tree.leaves(fixed), *[_WAITING] * num_last]
        half = _Earlier()
        half.keep(halve(closed.jaxpr, closed.consts, values, half))
        places[:] = half.places
        return half.kept

    def later(kept, last):
        num_fixed = len(closed.jaxpr.invars) - num_last
        values = [*[_WAITING] * num_fixed, *jax.tree.leaves(last)]
        half = _Later([kept[place] for place in places])
        consts = half.constants(closed.consts)
        outputs = halve(closed.jaxpr, consts, values, half)
        outputs = [next(half.kept) if out is _WAITING else out for out in outputs]
        return jax.tree.unflatten(out_tree, outputs)

    jax.eval_shape(earlier, *args[:-1])  # fills `places`
    return Split(earlier, later)


class _Earlier:
    """Runs what does not read the last argument, and keeps what the rest will need."""

    def __init__(self):
        self.kept: list[jax.Array] = []
        self.places: list[int] = []
        self._place_of: dict[int, int] = {}

    def reads_last(self, value: Any) -> bool:
        return value is _WAITING

    def constants(self, values: Sequence[Any]) -> Sequence[Any]:
        return values

    def keep(self, values: Sequence[Any]) -> None:
        for value in values:
            if value is not _WAITING:
                place = self._place_of.setdefault(id(value), len(self.kept))
                if place == len(self.kept):
                    self.kept.append(value)  # which also keeps its id its own
                self.places.append(place)

    def run(self, eqn, inputs, literal, reads_last: bool) -> list[Any]:
        if not reads_last:
            return _bind(eqn, inputs)
        self.keep([x for x, fixed in zip(inputs, literal, strict=True) if not fixed])
        return [_WAITING] * len(eqn.outvars)


class _Later:
    """Runs what reads the last argument, with what was kept."""

    def __init__(self, kept: Sequence[Any]):
        self.kept = iter(kept)

    def reads_last(self, value: Any) -> bool:
        return value is not _WAITING

    def constants(self, values: Sequence[Any]) -> Sequence[Any]:
        return [_WAITING] * len(values)

    def run(self, eqn, inputs, literal, reads_last: bool) -> list[Any]:
        if not reads_last:
            return [_WAITING] * len(eqn.outvars)
        inputs = [next(self.kept) if value is _WAITING else value for value in inputs]
        return _bind(eqn, inputs)


def _bind(eqn, inputs: Sequence[Any]) -> list[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]
