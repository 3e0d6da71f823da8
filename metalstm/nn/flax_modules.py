"""Learners: what an inner loop adapts, made from any flax module.

``from_flax`` accepts a user's own Linen module or a function that makes an NNX one, and
returns pure functions over pure arrays: usable in a `lax.scan` carry, under `vmap`,
`grad` and `jit`. The factories below wrap the networks of the literature.

Randomness comes from the ``key`` of a pass alone. An NNX module's generators are
therefore not part of the state: they are made from the key on every pass.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import core
from flax import linen as nn

from metalstm.base import Array, Learner, LearnerState, Norm, PyTree
from metalstm.nn.heads import tied_head
from metalstm.nn.networks import MLP, Conv4, RelationNet, ResNet12

if TYPE_CHECKING:  # a quarter of the time of `import metalstm`, for its users alone
    from flax import nnx

__all__ = [
    "MLP",
    "Conv4",
    "RelationNet",
    "ResNet12",
    "conv4",
    "from_flax",
    "mlp",
    "relation_net",
    "resnet12",
    "tied_head",
]


def conv4(num_classes: int | None, filters: int = 32, **options: Any) -> Learner:
    """The four-block convolutional learner; ``options`` are `Conv4`'s attributes."""
    return from_flax(Conv4(num_classes=num_classes, filters=filters, **options))


def mlp(
    num_classes: int | None, widths: tuple[int, ...] = (64, 64), **options
) -> Learner:
    """A multi-layer perceptron; ``options`` are `MLP`'s attributes."""
    return from_flax(MLP(num_classes=num_classes, widths=tuple(widths), **options))


def relation_net(**options: Any) -> Learner:
    """What scores (classes, queries); ``options`` are `RelationNet`'s attributes."""
    return from_flax(RelationNet(**options))


def resnet12(num_classes: int | None, **options: Any) -> Learner:
    """The few-shot ResNet-12; ``options`` are `ResNet12`'s attributes."""
    return from_flax(ResNet12(num_classes=num_classes, **options))


def from_flax(module: nn.Module | Callable[[nnx.Rngs], nnx.Module]) -> Learner:
    """Make a learner of a Linen module, or of a function that makes an NNX module.

    Linen: ``__call__`` takes x [N, ...] and, where the module has a batch norm, one of
    ``train``, ``training``, ``is_training`` or ``use_running_average``; it is passed
    accordingly. ``deterministic``, if there, is whether dropout is off. `nn.Dropout` is
    switched by the pass's key alone, whatever the module says; other random layers ask
    ``self.has_rng("dropout")``.

    NNX: every layer's ``use_running_average`` and ``deterministic`` are set, as
    ``module.train()`` and ``module.eval()`` do. NNX's batch norm stops gradients at its
    averages (flax 0.12): where a query is normalised by the support set's, they are
    constants to a second-order meta-gradient. Linen's are not.

    ``stats`` is Linen's collection "batch_stats" or NNX's `BatchStat` variables, and
    ``other`` is every further variable except generators.

    >>> learner = from_flax(MyNet(num_classes=5))
    >>> learner = from_flax(lambda rngs: MyNNXNet(5, rngs=rngs))

    Raises:
      ValueError: for an NNX instance, for a class instead of an instance, and (when
        initialised) for a Linen module with batch statistics and no switch for them.
    """
    if _is_nnx_module(module):
        name = type(module).__name__
        raise ValueError(
            f"from_flax got an instance of the NNX module {name}: its parameters are "
            "already drawn, so it cannot be initialised again from another key. "
            "Pass the function that makes it: "
            f"from_flax(lambda rngs: {name}(..., rngs=rngs))"
        )
    if isinstance(module, nn.Module):
        return _from_linen(module)
    if isinstance(module, type) or not callable(module):
        raise ValueError(
            f"from_flax got {module!r}: pass a Linen module (an instance) or a "
            "function of rngs that makes an NNX module: "
            "from_flax(lambda rngs: Net(rngs=rngs))"
        )
    return _from_nnx(module)


def _is_nnx_module(module: object) -> bool:
    loaded = sys.modules.get("flax.nnx")  # as it is by whoever made a module
    return loaded is not None and isinstance(module, loaded.Module)


def _from_linen(module: nn.Module) -> Learner:
    accepted = inspect.signature(type(module).__call__).parameters
    norm_switches = {"train", "training", "is_training", "use_running_average"}
    switches = (norm_switches | {"deterministic"}) & set(accepted)

    def flags(norm: Norm, key: Array | None) -> dict[str, Any]:
        use_batch = norm != "stored"
        values = dict.fromkeys(("train", "training", "is_training"), use_batch)
        values["use_running_average"] = not use_batch
        values["deterministic"] = key is None
        return {name: values[name] for name in switches}

    def init(key: Array, x: Array) -> LearnerState:
        with nn.intercept_methods(_dropout_switch(on=False)):
            variables = module.init({"params": key}, x, **flags("stored", None))
        params, stats, other = _split_collections(variables)
        if stats and not switches & norm_switches:
            raise ValueError(
                f"{type(module).__name__} has batch statistics but no way to say which "
                "to use: let its __call__ take `train: bool` and build its norms with "
                "use_running_average=not train"
            )
        return LearnerState(params, stats, other)

    def apply(state, x, *, norm, key=None):
        _check_norm(norm)

        def run(stats):
            variables = {"params": state.params, **state.other}
            variables |= {"batch_stats": stats} if stats else {}
            with nn.intercept_methods(_dropout_switch(on=key is not None)):
                outputs, updated = module.apply(
                    variables,
                    x,
                    # Layers with a collection of their own fall back to "params".
                    rngs=None if key is None else {"dropout": key, "params": key},
                    mutable=core.DenyList(["params", "intermediates"]),
                    **flags(norm, key),
                )
            _, new_stats, other = _split_collections(updated)
            return outputs, new_stats, {name: other[name] for name in state.other}

        outputs, stats, other = _with_statistics(
            run, state.stats, norm, differentiable=True
        )
        return outputs, LearnerState(state.params, stats, other)

    return Learner(init, apply)


def _split_collections(variables: Mapping) -> tuple[PyTree, PyTree, PyTree]:
    other: dict[str, Any] = dict(core.unfreeze(dict(variables)))
    return other.pop("params", {}), other.pop("batch_stats", {}), other


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


def _from_nnx(factory: Callable[[nnx.Rngs], nnx.Module]) -> Learner:
    from flax import nnx

    kinds = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)

    @functools.cache
    def template(norm: Norm, dropout: bool) -> tuple[nnx.GraphDef, tuple]:
        """Structure without arrays: training and evaluation are different ones."""

        def make():
            model = factory(nnx.Rngs(0))
            if isinstance(model, nnx.Module):
                return model
            raise ValueError(
                f"the function given to from_flax returned a {type(model).__name__}; "
                "it must return an nnx.Module (a Linen module is passed itself)"
            )

        model = nnx.eval_shape(make)
        model.set_attributes(
            use_running_average=norm == "stored",
            deterministic=not dropout,
            raise_if_not_found=False,
        )
        if norm == "gather":  # exact for flax's own layer; see _gather for others
            model.set_attributes(nnx.BatchNorm, momentum=0.0, raise_if_not_found=False)
        graphdef, *parts = nnx.split(model, *kinds)
        return graphdef, tuple(parts)

    def init(key: Array, x: Array) -> LearnerState:
        template("stored", False)
        _, *parts = nnx.split(factory(nnx.Rngs(key)), *kinds)
        params, stats, _, other = map(nnx.to_pure_dict, parts)
        return LearnerState(params, stats, other)

    def apply(state, x, *, norm, key=None):
        _check_norm(norm)
        graphdef, parts = template(norm, key is not None)

        def run(stats):
            generators = _generators(parts[2], key)
            arrays = (state.params, stats, generators, state.other)
            model = nnx.merge(graphdef, *map(_fill, parts, arrays))
            outputs = model(x)
            _, *split = nnx.split(model, *kinds)
            _, new_stats, _, other = split
            return outputs, nnx.to_pure_dict(new_stats), nnx.to_pure_dict(other)

        outputs, stats, other = _with_statistics(
            run, state.stats, norm, differentiable=False
        )
        return outputs, LearnerState(state.params, stats, other)

    return Learner(init, apply)


def _generators(abstract: nnx.State, key: Array | None) -> PyTree:
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


def _fill(abstract: nnx.State, arrays: PyTree) -> nnx.State:
    from flax import nnx

    filled = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(filled, arrays)
    return filled


def _with_statistics(
    run: Callable, stats: PyTree, norm: Norm, *, differentiable: bool
) -> tuple:
    """Do one pass and return (outputs, statistics after it, other variables)."""
    if norm == "stored" or not jax.tree.leaves(stats):
        outputs, _, other = run(stats)
        return outputs, stats, other
    if norm == "batch":
        return run(stats)
    return _gather(run, stats, differentiable=differentiable)


def _gather(run: Callable, stats: PyTree, *, differentiable: bool) -> tuple:
    """One pass after which the averages are this batch's, whatever the momentum m.

    A moving average is affine in its old value, new = m * old + (1 - m) * batch. The
    pass at old = 0 gives (1 - m) * batch, and its derivative by the old value gives m.
    No output depends on the old value, so the derivative costs nothing. Where the
    module stops gradients (``differentiable=False``) a second pass at a large old value
    gives m instead; compiled, the two share all but the averages. An average that
    the pass leaves alone (m = 1) comes back as it was.
    """
    leaves, treedef = jax.tree.flatten(stats)
    where = [
        i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]

    def averages(old):
        filled = list(leaves)
        for i, leaf in zip(where, old, strict=True):
            filled[i] = leaf
        outputs, new, other = run(jax.tree.unflatten(treedef, filled))
        new = jax.tree.leaves(new)
        return [new[i] for i in where], (outputs, new, other)

    zeros = [jnp.zeros_like(leaves[i]) for i in where]
    if differentiable:
        ones = [jnp.ones_like(leaf) for leaf in zeros]
        weighted, momentum, aux = jax.jvp(averages, (zeros,), (ones,), has_aux=True)
    else:
        large = 2.0**20
        weighted, aux = averages(zeros)
        shifted, _ = averages([jnp.full_like(leaf, large) for leaf in zeros])
        momentum = [(b - a) / large for a, b in zip(weighted, shifted, strict=True)]
    outputs, gathered, other = aux
    for i, new, m in zip(where, weighted, momentum, strict=True):
        untouched = m == 1
        batch = new / jnp.where(untouched, 1, 1 - m)
        gathered[i] = jnp.where(untouched, leaves[i], batch).astype(leaves[i].dtype)
    return outputs, jax.tree.unflatten(treedef, gathered), other


def _check_norm(norm: str) -> None:
    if norm not in ("batch", "gather", "stored"):
        raise ValueError(f"norm={norm!r}: choose 'batch', 'gather' or 'stored'")
