"""Problems that an optimizer is trained and compared on.

A family is four pure functions; an instance is drawn from a key. Written for ONE
instance; the caller vmaps. Data sets are arguments, never closed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from metalstm.algorithms.common import task_loss
from metalstm.base import Array, Learner, LearnerState, PyTree
from metalstm.batches import first_example, num_examples
from metalstm.checks import check_at_least, check_choice, check_positive
from metalstm.data.episodes import prepare_examples
from metalstm.nn import MLP, conv4, from_flax

__all__ = [
    "Draw",
    "ProblemFamily",
    "ProblemSampler",
    "conv_classifier",
    "logistic_regression",
    "mlp_classifier",
    "plateau",
    "quadratics",
    "sinusoids",
    "supervised",
]


class ProblemFamily(NamedTuple):
    """Problems drawn at random: what to minimise, from where, on which batches."""

    # (key, data) -> task: what makes this instance, () when all share the data
    sample: Callable[[Array, PyTree], PyTree]
    init: Callable[[Array, PyTree], PyTree]  # (key, task) -> params: theta_0
    # (key, data, size=None) -> batch: one minibatch of the family's size or another; ()
    # when the loss has none. What depends on the task is computed in the loss.
    batch: Callable[..., PyTree]
    # (params, task, batch) -> scalar
    loss: Callable[[PyTree, PyTree, PyTree], Array]


class Draw(NamedTuple):
    """One instance and the minibatches of a segment of its training."""

    task: PyTree
    params: PyTree  # theta_0
    batches: PyTree  # leading [num_batches]


@dataclass(frozen=True)
class ProblemSampler:
    """What `metalstm.make_train_loop` draws problems with; ``data`` is its pool.

    Args:
      family: a `ProblemFamily`.
      num_batches: minibatches of a draw. `learned_optimizer` takes one more
        than it makes updates, for the loss after the last update.
    """

    family: ProblemFamily
    num_batches: int

    def __post_init__(self) -> None:
        check_at_least("num_batches", self.num_batches, 1)

    def sample(self, key: Array, data: Any = None) -> Draw:
        task_key, init_key, batch_key = jax.random.split(key, 3)
        task = self.family.sample(task_key, data)
        params = self.family.init(init_key, task)
        keys = jax.random.split(batch_key, self.num_batches)
        return Draw(task, params, jax.vmap(lambda k: self.family.batch(k, data))(keys))


def _no_batch(key: Array, data: PyTree, size: int | None = None) -> tuple[()]:
    del key, data, size
    return ()


def quadratics(
    dim: int = 10,
    *,
    distribution: Literal["normal", "uniform"] = "normal",
    init_std: float = 1.0,
) -> ProblemFamily:
    """||W theta - y||^2 with W [dim, dim] and y [dim] drawn entry by entry.

    Andrychowicz et al. (2016), section 3.1: N(0, 1) in the text, U(0, 1) and theta_0 of
    standard deviation 0.01 in the authors' code.

    Args:
      dim: of theta.
      distribution: of the entries, "normal" for N(0, 1) or "uniform" for U(0, 1).
      init_std: theta_0 ~ N(0, init_std^2).
    """
    _check_positive(dim=dim, init_std=init_std)
    check_choice("distribution", distribution, ("normal", "uniform"))
    entries = jax.random.normal if distribution == "normal" else jax.random.uniform

    def sample(key: Array, data: PyTree) -> PyTree:
        del data
        w_key, y_key = jax.random.split(key)
        return {"w": entries(w_key, (dim, dim)), "y": entries(y_key, (dim,))}

    def init(key: Array, task: PyTree) -> PyTree:
        del task
        return {"theta": init_std * jax.random.normal(key, (dim,))}

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        del batch
        return jnp.square(task["w"] @ params["theta"] - task["y"]).sum()

    return ProblemFamily(sample, init, _no_batch, loss)


def logistic_regression(
    dim: int = 10,
    *,
    num_examples: int = 100,
    noise: float = 1.0,
    weight_decay: float = 1e-3,
    init_std: float = 1.0,
) -> ProblemFamily:
    """Binary classification of Gaussian points by a noisy random direction.

    x ~ N(0, I), the label is whether w.x + noise * N(0, 1) is positive, w ~ N(0, I).
    The loss is the mean cross-entropy over all examples + weight_decay / 2 ||theta||^2.
    """
    _check_positive(dim=dim, num_examples=num_examples, init_std=init_std)

    def sample(key: Array, data: PyTree) -> PyTree:
        del data
        x_key, w_key, noise_key = jax.random.split(key, 3)
        x = jax.random.normal(x_key, (num_examples, dim))
        score = x @ jax.random.normal(w_key, (dim,))
        score = score + noise * jax.random.normal(noise_key, (num_examples,))
        return {"x": x, "y": (score > 0).astype(jnp.float32)}

    def init(key: Array, task: PyTree) -> PyTree:
        del task
        return {"bias": jnp.zeros(()), "w": init_std * jax.random.normal(key, (dim,))}

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        del batch
        logits = task["x"] @ params["w"] + params["bias"]
        fit = optax.sigmoid_binary_cross_entropy(logits, task["y"]).mean()
        return fit + weight_decay / 2 * jnp.square(params["w"]).sum()

    return ProblemFamily(sample, init, _no_batch, loss)


def plateau(
    dim: int = 10,
    *,
    num_examples: int = 32,
    steepness: tuple[float, float] = (5.0, 20.0),
) -> ProblemFamily:
    """High loss, hardly any gradient: a saturated neuron whose answers are all wrong.

    Mean squared error of sigmoid(theta.x) against labels [w.x > 0], w a random unit
    vector, x ~ N(0, I). theta_0 = -s w + N(0, 1): confidently wrong, on a plateau that
    is wider and flatter the larger s, which is log-uniform in ``steepness``. Shrinking
    theta, as a forget gate below 1 does, leads off it; the gradient alone hardly does.
    """
    _check_positive(dim=dim, num_examples=num_examples)
    check_range("steepness", steepness)

    def sample(key: Array, data: PyTree) -> PyTree:
        del data
        x_key, w_key, steep_key = jax.random.split(key, 3)
        x = jax.random.normal(x_key, (num_examples, dim))
        w = jax.random.normal(w_key, (dim,))
        w = w / jnp.linalg.norm(w)
        y = (x @ w > 0).astype(jnp.float32)
        return {"x": x, "y": y, "start": -log_uniform(steep_key, steepness) * w}

    def init(key: Array, task: PyTree) -> PyTree:
        return {"theta": task["start"] + jax.random.normal(key, (dim,))}

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        del batch
        outputs = jax.nn.sigmoid(task["x"] @ params["theta"])
        return jnp.square(outputs - task["y"]).mean()

    return ProblemFamily(sample, init, _no_batch, loss)


def sinusoids(
    *,
    hidden: Sequence[int] = (20,),
    batch_size: int = 32,
    init_std: float | None = None,
) -> ProblemFamily:
    """Fit a (sin(x - phase)) by a tanh MLP: a ~ U(0.1, 5), phase ~ U(0, pi).

    Every minibatch is drawn anew: x ~ U(-5, 5), as in MAML's regression.
    """
    check_positive("batch_size", batch_size)
    learner = from_flax(MLP(1, tuple(hidden), jnp.tanh))

    def sample(key: Array, data: PyTree) -> PyTree:
        del data
        a_key, phase_key = jax.random.split(key)
        amplitude = jax.random.uniform(a_key, minval=0.1, maxval=5.0)
        return {
            "amplitude": amplitude,
            "phase": jax.random.uniform(phase_key, minval=0.0, maxval=math.pi),
        }

    def init(key: Array, task: PyTree) -> PyTree:
        del task
        params = learner.init(key, jnp.zeros((1, 1))).params
        return _redrawn(key, params, init_std)

    def batch(key: Array, data: PyTree, size: int | None = None) -> PyTree:
        del data
        return jax.random.uniform(key, (size or batch_size, 1), minval=-5.0, maxval=5.0)

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        outputs, _ = learner.apply(LearnerState(params, {}, {}), batch, norm="batch")
        target = task["amplitude"] * jnp.sin(batch - task["phase"])
        return jnp.square(outputs - target).mean()

    return ProblemFamily(sample, init, batch, loss)


class _Start(NamedTuple):
    """The task of `supervised`: what a module needs to draw and run its parameters."""

    example: Array  # [1, ...] one input
    state: LearnerState  # batch statistics and the like; no parameters


def supervised(
    model: nn.Module | Callable | Learner,
    loss_fn: Callable[[Array, Array], Array] | None = None,
    *,
    batch_size: int = 128,
    init_std: float | None = None,
) -> ProblemFamily:
    """Train any flax model on ``data``, which has arrays x [M, ...] and y [M, ...].

    Instances differ in theta_0 and in their minibatches, which are drawn with
    replacement. uint8 images are scaled to [0, 1]. A batch norm uses the batch's
    statistics; dropout is off.

    Args:
      model: as for `metalstm.from_flax`, or a `Learner`.
      loss_fn: (outputs [N, d], y [N, ...]) -> scalar. None: the mean cross-entropy for
        integer y, the mean squared error for floats.
      batch_size: images of a minibatch.
      init_std: draw every parameter from N(0, init_std^2); None: the model's own way.
    """
    check_positive("batch_size", batch_size)
    learner = model if isinstance(model, Learner) else from_flax(model)
    measure = task_loss if loss_fn is None else loss_fn

    def sample(key: Array, data: PyTree) -> PyTree:
        example = _prepared(first_example(data.x))
        state = learner.init(key, example)
        return _Start(example, state._replace(params=()))

    def init(key: Array, task: PyTree) -> PyTree:
        return _redrawn(key, learner.init(key, task.example).params, init_std)

    def batch(key: Array, data: PyTree, size: int | None = None) -> PyTree:
        rows = jax.random.randint(key, (size or batch_size,), 0, num_examples(data.x))
        return jax.tree.map(lambda leaf: leaf[rows], (data.x, data.y))

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        x, y = batch
        state = task.state._replace(params=params)
        outputs, _ = learner.apply(state, _prepared(x), norm="batch")
        return measure(outputs, y)

    return ProblemFamily(sample, init, batch, loss)


_ACTIVATIONS = {
    "elu": jax.nn.elu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def mlp_classifier(
    hidden: Sequence[int] = (20,),
    *,
    num_classes: int = 10,
    activation: Literal["elu", "relu", "sigmoid", "tanh"] = "sigmoid",
    init_std: float | None = 0.01,
    batch_size: int = 128,
) -> ProblemFamily:
    """Classify ``data`` by a multi-layer perceptron; the defaults are L2L's MNIST."""
    check_choice("activation", activation, _ACTIVATIONS)
    module = MLP(num_classes, tuple(hidden), _ACTIVATIONS[activation])
    return supervised(module, batch_size=batch_size, init_std=init_std)


def conv_classifier(
    filters: int = 8,
    *,
    num_blocks: int = 2,
    num_classes: int = 10,
    norm: Literal["batch", "none"] = "batch",
    batch_size: int = 64,
) -> ProblemFamily:
    """Classify images by a small convolutional network, `metalstm.nn.Conv4`."""
    learner = conv4(num_classes, filters, num_blocks=num_blocks, norm=norm)
    return supervised(learner, batch_size=batch_size)


def _prepared(x: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: prepare_examples(leaf, None), x)


def _redrawn(key: Array, params: PyTree, std: float | None) -> PyTree:
    """Every leaf from N(0, std^2); None leaves them as they are."""
    if std is None:
        return params
    leaves, treedef = jax.tree.flatten(params)
    keys = (jax.random.fold_in(key, k) for k in range(len(leaves)))
    drawn = [std * jax.random.normal(next(keys), x.shape, x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, drawn)


def log_uniform(key: Array, limits: tuple[float, float], shape: tuple = ()) -> Array:
    low, high = math.log(limits[0]), math.log(limits[1])
    return jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))


def check_range(name: str, limits: tuple[float, float]) -> None:
    if not 0 < limits[0] <= limits[1]:
        raise ValueError(f"{name}={tuple(limits)}: give 0 < low <= high")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        check_positive(name, number)
