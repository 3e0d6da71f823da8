"""What rules for ordinary training read: normalised moments of each tensor's gradient.

Each tensor is updated in its own shape, so sharded ones stay where they are: only sums
over a tensor travel.

Notation: a tensor of n coordinates; Z features of the tensor, F of a coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.rules.flat import coordinate_dtype

__all__ = [
    "LEFT",
    "LENGTH",
    "NUM_COORDINATE",
    "NUM_TENSOR",
    "SIZE",
    "MomentsState",
    "Tensor",
    "bounded_step",
    "rms",
    "tensor_rule",
]

NUM_TENSOR, NUM_COORDINATE = 16, 6  # Z, F
# of Z: logs of the tensor's size, of what is left of training, of its length
SIZE, LEFT, LENGTH = 7, 14, 15
_DECAYS = (0.9, 0.99, 0.999)  # of the averages of the gradient
_SQUARE_DECAY = 0.99  # of the average of its square
_LARGEST = 10.0  # of a coordinate's normalised update
_LOG_STEPS = (-15.0, -1.0)
_TINY = 1e-30  # added to squares: a tensor whose gradient is zero does not move


class MomentsState(NamedTuple):
    """Four numbers a parameter, float32, or float64 as it is; and the memory."""

    step: Array  # int32, updates done
    means: tuple[PyTree, PyTree, PyTree]  # with the decays 0.9, 0.99, 0.999
    square: PyTree
    memory: tuple[PyTree, ...]  # of each tensor; () but for a recurrent rule


class Tensor(NamedTuple):
    """One tensor before its update. Arrays are not corrected, to make no new ones."""

    averages: list[Array]  # the gradient, then its three averages
    scales: list[Array]  # 1 / the weights that each has so far
    lengths: list[Array]  # rms of each
    square: Array  # the average square, corrected, and above 0
    unit: Array  # the rms over the tensor of its root u
    moved: Array  # 0 where the gradient has always been zero, else 1
    theta: Array
    size: Array  # rms of theta
    features: Array  # [Z], of the tensor
    memory: PyTree  # what `tensor_rule`'s move returned


def tensor_rule(
    init: Callable[[Array], PyTree],
    move: Callable[[PyTree, Tensor], tuple[Array, PyTree]],
    memory: Callable[[Array], PyTree] = lambda theta: (),
) -> UpdateRule:
    """Make a rule of the change of one tensor.

    It reads no loss. A gradient that is not finite anywhere changes nothing, neither
    parameters nor state; nor does one whose sum of squares is above the largest number
    of its type (3.4e38 in float32), which costs no other pass to find: clip before.

    Args:
      init: key -> the rule's parameters, of any model.
      move: (rule's parameters, tensor) -> what is added to theta; the new memory.
      memory: theta -> the tensor's memory at first.

    Raises:
      ValueError: from ``update``, when no parameters are given, or a parameter has no
        gradient.
    """

    def bind(rule: PyTree) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            def zeros():  # new arrays, so that the state can be donated
                return jax.tree.map(
                    lambda p: jnp.zeros(jnp.shape(p), coordinate_dtype(p)), params
                )

            square = zeros()
            memories = tuple(memory(z) for z in jax.tree.leaves(square))
            means = zeros(), zeros(), zeros()
            return MomentsState(jnp.int32(0), means, square, memories)

        def update_fn(
            updates, state, params=None, *, progress=-1.0, num_steps=0.0, **extra
        ):
            del extra
            if params is None:
                raise ValueError(
                    "the rule needs the parameters: tx.update(grads, state, params)"
                )
            leaves, treedef = jax.tree.flatten(updates)
            columns = (*state.means, state.square, params)
            *olds, thetas = map(jax.tree.leaves, columns)
            if len(leaves) != len(thetas):
                raise ValueError(
                    f"there are {len(leaves)} gradients of {len(thetas)} parameters: "
                    "give each parameter an array, zeros for None, or mask the others "
                    "with optax.masked"
                )
            # of the state's type, whatever the gradients': it must be a scan's carry
            kinds = [mean.dtype for mean in olds[0]]
            grads = list(map(jnp.asarray, leaves, kinds))
            norms = [jnp.square(g).sum() for g in grads]
            finite = jnp.isfinite(sum(norms))
            step = state.step + finite
            # numbers that leave all as it was, where a select would copy every array
            decays = [jnp.where(finite, b, 1) for b in (*_DECAYS, _SQUARE_DECAY)]
            moves, moments, memories = [], [], []
            for g, norm, theta, past, *old in zip(
                grads, norms, thetas, state.memory, *olds, strict=True
            ):
                g = jnp.where(finite, g, 0)
                new = _moments(g, old, decays)
                length = jnp.sqrt(jnp.where(finite, norm, 0) / max(g.size, 1) + _TINY)
                time = step, progress, num_steps
                tensor = _tensor(g, length, new, jnp.asarray(theta, g.dtype), *time)
                weights = jax.tree.map(lambda w: jnp.asarray(w, g.dtype), rule)  # noqa: B023
                delta, present = move(weights, tensor._replace(memory=past))
                moves.append(finite * delta)
                moments.append(new)
                keep = lambda a, b: jnp.where(finite, a, b)  # noqa: E731
                memories.append(jax.tree.map(keep, present, past))
            types = map(jnp.result_type, leaves, thetas)
            moves = [d.astype(kind) for d, kind in zip(moves, types, strict=True)]
            *means, square = (
                jax.tree.unflatten(treedef, [m[k] for m in moments]) for k in range(4)
            )
            new_state = MomentsState(step, tuple(means), square, tuple(memories))
            return jax.tree.unflatten(treedef, moves), new_state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    traits = RuleTraits(coordinatewise=False, smooth=True, reads_loss=False)
    return UpdateRule(lambda key, params: init(key), bind, traits)


def bounded_step(
    move: Array,
    log_step: Array,
    orthogonal: bool = False,
    length: Array | None = None,
) -> tuple[Array, Array]:
    """The step s, at most e^-1, and move / rms(move), at most 10 in a coordinate.

    With ``orthogonal``, a matrix becomes one with orthogonal rows or columns instead;
    ``length`` takes the place of rms(move).
    """
    step = jnp.exp(jnp.clip(log_step, *_LOG_STEPS))
    matrix = orthogonal and move.ndim > 1 and move.size
    length = rms(move) if length is None else length
    move = _orthogonalized(move) if matrix else move * (1 / length)
    return step, jnp.clip(move, -_LARGEST, _LARGEST)


def _orthogonalized(x: Array) -> Array:
    """Newton and Schulz's iteration with Muon's coefficients (Jordan et al., 2024).

    All axes but the last are one. The singular values become about equal, and the rms
    about 1, but for matrices of low rank. Unlike optax's, it has a derivative at 0.
    """
    matrix = x.reshape(-1, x.shape[-1])
    wide = matrix.shape[0] <= matrix.shape[1]
    y = matrix if wide else matrix.T
    y = y * (1 / (rms(y) * y.size**0.5))
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y + (2.0315 * a @ a - 4.7750 * a) @ y
    return y.shape[1] ** 0.5 * (y if wide else y.T).reshape(x.shape)


def rms(x: Array) -> Array:
    return jnp.sqrt(_mean(jnp.square(x)) + _TINY)


def _mean(x: Array) -> Array:
    return x.sum() / max(x.size, 1)


def _moments(g: Array, old: list[Array], decays: list[Array]) -> list[Array]:
    added = (g, g, g, jnp.square(g))
    rows = zip(decays, old, added, strict=True)
    return [(b * m + (1 - b) * x).astype(g.dtype) for b, m, x in rows]


def _tensor(
    g: Array, length: Array, moments: list[Array], theta: Array,
    step: Array, progress, num_steps,
) -> Tensor:  # fmt: skip
    steps = jnp.maximum(step, 1).astype(g.dtype)
    *means, square = moments
    *scales, square_scale = (
        1 / (1 - jnp.power(b, steps)) for b in (*_DECAYS, _SQUARE_DECAY)
    )
    mean_square = square_scale * _mean(square)
    # coordinates that have never had a gradient: 1e-6 of the others' u, not 0
    square = square_scale * square + (1e-12 * mean_square + _TINY)
    scales = [jnp.ones((), g.dtype), *scales]
    lengths = [length, *map(rms, means)]
    # the derivative of a division by 1e-30 overflows
    moved = jax.lax.stop_gradient(mean_square / (mean_square + _TINY))
    unit = jnp.sqrt(mean_square + _TINY)
    size = jnp.minimum(rms(theta), jnp.finfo(g.dtype).max)  # of a mask of finfo.min
    tensor = Tensor(
        [g, *means], scales, lengths, square, unit, moved, theta, size, scales[0], ()
    )
    return tensor._replace(features=_features(tensor, steps, progress, num_steps))


def _features(tensor: Tensor, steps: Array, progress, num_steps) -> Array:
    """The signal in each average, angles, size and shape, time: [Z], about 1."""
    theta, size = tensor.theta, tensor.size
    fan_in = math.prod(theta.shape[:-1]) if theta.ndim > 1 else 1
    known = progress >= 0
    done = jnp.where(known, progress, 0)
    g, fast, _, slow = tensor.averages
    lengths = tensor.lengths
    # one root after the other: their product may underflow, and its derivative
    cosine = lambda a, b, *sizes: _mean(a * b) / sizes[0] / sizes[1]  # noqa: E731
    corrected = zip(lengths, tensor.scales, strict=True)
    features = [
        *(jnp.log(scale * length / tensor.unit) / 3 for length, scale in corrected),
        cosine(g, fast, lengths[0], lengths[1]),
        cosine(fast, slow, lengths[1], lengths[3]),
        cosine(fast, theta, lengths[1], size),
        jnp.log(size + 1e-3) / 3 + 1,
        math.log(max(theta.size, 1)) / 3 - 2,
        math.log(max(fan_in, 1)) / 3 - 1,
        float(theta.ndim > 1),
        jnp.log(steps) / 3 - 2,
        done,
        known,
        jnp.log(1.01 - done) / 3,
        # a length that is not known counts as 1,000 updates
        jnp.log(jnp.where(num_steps > 0, num_steps, 1e3) / 1e3) / 3,
    ]
    return jnp.stack([jnp.asarray(feature, steps.dtype) for feature in features])
