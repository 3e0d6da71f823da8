"""An NNX module as a learner."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.base import Array, Learner, LearnerState, Norm, PyTree
from metalstm.nn.batch_statistics import run_with_statistics
from metalstm.nn.general_convolution import conv_general_dilated
from metalstm.nn.pooling import fast_flax_pools
from metalstm.nn.selection import raise_nothing_selected
from metalstm.nn.signatures import arguments_of, parameters_of

if TYPE_CHECKING:  # a quarter of the time of `import metalstm`, for its users alone
    from flax import nnx

__all__ = ["from_nnx"]


def from_nnx(
    make: Callable[..., nnx.Module], *, wrt: Any = None, fast: bool = True
) -> Learner:
    """Make a learner of what ``make(rngs)`` returns; see `metalstm.nn.from_flax`.

    The generators are not part of the state: every pass makes them from its key.
    """
    from flax import nnx

    params = nnx.Param if wrt is None else nnx.All(nnx.Param, wrt)
    kinds = (params, nnx.BatchStat, nnx.RngState, ...)

    @functools.cache
    def template(norm: Norm, dropout: bool) -> tuple[nnx.GraphDef, tuple]:
        """Structure without arrays: training and evaluation are different ones."""

        def checked():
            model = _call(make, nnx.Rngs(0))
            if isinstance(model, nnx.Module):
                return model
            raise ValueError(
                f"the function given to from_flax returned a {type(model).__name__}; "
                "it must return an nnx.Module (a Linen module is passed itself)"
            )

        model = nnx.eval_shape(checked)
        for _, node in nnx.iter_graph(model) if fast else ():
            is_conv = isinstance(node, nnx.Conv)
            if is_conv and node.conv_general_dilated is lax.conv_general_dilated:
                node.conv_general_dilated = conv_general_dilated
        model.set_attributes(
            use_running_average=norm == "stored",
            deterministic=not dropout,
            raise_if_not_found=False,
        )
        if not dropout:  # also where the module passes `deterministic` itself
            model.set_attributes(nnx.Dropout, rate=0.0, raise_if_not_found=False)
            model.set_attributes(
                nnx.MultiHeadAttention, dropout_rate=0.0, raise_if_not_found=False
            )
        if norm == "gather":  # exact for flax's layer; see `_gather` for others
            model.set_attributes(nnx.BatchNorm, momentum=0.0, raise_if_not_found=False)
        graphdef, *parts = nnx.split(model, *kinds)
        return graphdef, tuple(parts)

    def init(key: Array, x: Array) -> LearnerState:
        model = _call(make, nnx.Rngs(key))
        template("stored", False)
        arguments_of(type(model), x, norm="stored", dropout=False)  # or refuse x
        _, *parts = nnx.split(model, *kinds)
        params, stats, _, other = map(nnx.to_pure_dict, parts)
        if wrt is not None and not params:
            raise_nothing_selected(wrt, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return LearnerState(params, stats, other)

    def apply(state, x, *, norm, key=None):
        graphdef, parts = template(norm, key is not None)

        fixed = state.other if wrt is None else lax.stop_gradient(state.other)

        def run(stats):
            generators = _fresh_generators(parts[2], key)
            arrays = (state.params, stats, generators, fixed)
            model = nnx.merge(graphdef, *map(_filled, parts, arrays))
            dropout = key is not None
            args, kwargs = arguments_of(type(model), x, norm=norm, dropout=dropout)
            with fast_flax_pools() if fast else contextlib.nullcontext():
                outputs = model(*args, **kwargs)
            _, *split = nnx.split(model, *kinds)
            _, new_stats, _, other = split
            return outputs, nnx.to_pure_dict(new_stats), nnx.to_pure_dict(other)

        outputs, stats, other = run_with_statistics(
            run, state.stats, norm, differentiable=False
        )
        return outputs, LearnerState(state.params, stats, other)

    return Learner(init, apply)


def _call(make: Callable[..., nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """Call a class or a function; ``rngs`` is keyword-only in most classes."""
    if isinstance(make, type) and getattr(make, "__init__") is object.__init__:  # noqa: B009
        return make()  # layers without parameters
    return make(rngs=rngs) if "rngs" in parameters_of(make) else make(rngs)


def _fresh_generators(abstract: nnx.State, key: Array | None) -> PyTree:
    """Fresh generators: one key per stream, folded in by its place; counts at zero."""
    from flax import nnx

    key = jax.random.key(0) if key is None else key
    leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(abstract))
    fresh = [
        jax.random.fold_in(key, index)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, fresh)


def _filled(abstract: nnx.State, arrays: PyTree) -> nnx.State:
    from flax import nnx

    filled = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(filled, arrays)
    return filled
