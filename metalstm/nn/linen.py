"""A Linen module as a learner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import core
from flax import linen as nn
from jax import lax

from metalstm.base import Array, Learner, LearnerState, PyTree
from metalstm.nn.batch_statistics import run_with_statistics
from metalstm.nn.general_convolution import conv_general_dilated
from metalstm.nn.pooling import fast_flax_pools
from metalstm.nn.selection import joined, selected
from metalstm.nn.signatures import arguments_of, has_norm_switch

__all__ = ["from_linen"]


def from_linen(module: nn.Module, *, wrt: Any = None, fast: bool = True) -> Learner:
    """Make a learner of a Linen module; see `metalstm.nn.from_flax`."""
    kind = type(module)

    @contextlib.contextmanager
    def intercepted(key: Array | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            switch = _dropout_switch(on=key is not None)
            stack.enter_context(nn.intercept_methods(switch))
            if fast:
                stack.enter_context(fast_flax_pools())
                stack.enter_context(nn.intercept_methods(_convolve_fast))
            yield

    def init(key: Array, x: Array) -> LearnerState:
        with intercepted(None):
            args, kwargs = arguments_of(kind, x, norm="stored", dropout=False)
            variables = module.init({"params": key}, *args, **kwargs)
        params, stats, other = _split_collections(variables)
        if stats and not has_norm_switch(kind):
            raise ValueError(
                f"{kind.__name__} has batch statistics but no way to say which "
                "to use: let its __call__ take `train: bool` and build its norms with "
                "use_running_average=not train"
            )
        if wrt is not None:
            params, other["params"] = selected(params, wrt)
        return LearnerState(params, stats, other)

    def apply(state, x, *, norm, key=None):

        def run(stats):
            variables = {"params": state.params, **state.other}
            if wrt is not None:
                fixed = lax.stop_gradient(state.other["params"])
                variables["params"] = joined(state.params, fixed)
            variables |= {"batch_stats": stats} if stats else {}
            dropout = key is not None
            args, kwargs = arguments_of(kind, x, norm=norm, dropout=dropout)
            with intercepted(key):
                outputs, updated = module.apply(
                    variables,
                    *args,
                    # Layers that ask for another collection fall back to "params".
                    rngs=None if key is None else {"dropout": key, "params": key},
                    mutable=core.DenyList(["params", "intermediates"]),
                    **kwargs,
                )
            _, new_stats, other = _split_collections(updated)
            carried = state.other | {n: other[n] for n in state.other if n != "params"}
            return outputs, new_stats, carried

        outputs, stats, other = run_with_statistics(
            run, state.stats, norm, differentiable=True
        )
        return outputs, LearnerState(state.params, stats, other)

    return Learner(init, apply)


def _split_collections(variables: Mapping) -> tuple[PyTree, PyTree, PyTree]:
    other: dict[str, Any] = dict(core.unfreeze(dict(variables)))
    return other.pop("params", {}), other.pop("batch_stats", {}), other


def _convolve_fast(next_fn, args, kwargs, context) -> Any:
    """An interceptor that gives `nn.Conv` the function that convolves."""
    module = context.module
    if (
        not isinstance(module, nn.Conv)
        or context.method_name != "__call__"
        or module.conv_general_dilated is not None
        or module.conv_general_dilated_cls is not None
    ):
        return next_fn(*args, **kwargs)
    # the field is frozen, and a clone would be another module in the scope
    object.__setattr__(module, "conv_general_dilated", conv_general_dilated)
    try:
        return next_fn(*args, **kwargs)
    finally:
        object.__setattr__(module, "conv_general_dilated", None)


def _dropout_switch(*, on: bool) -> Callable:
    """An interceptor that makes `nn.Dropout` obey the pass, not the module's flag."""

    def intercept(next_fn, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dropout) or context.method_name != "__call__":
            return next_fn(*args, **kwargs)
        inputs = args[0] if args else kwargs["inputs"]
        if not on:
            return inputs
        if module.scope is None or module.deterministic is False:
            return next_fn(*args, **kwargs)
        rng = module.make_rng(module.rng_collection)
        active = module.clone(parent=None, deterministic=False)
        return active.apply({}, inputs, rng=rng)

    return intercept
