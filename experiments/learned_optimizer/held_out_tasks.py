"""The held-out test of rules for ordinary training: its tasks, fixed before training.

Nothing here may change once a rule has been meta-trained for it; a change makes another
test, under another ``VERSION``. No data is among those of `meta_tasks`, and no network,
though some are larger relatives of networks there. A task's loss is measured on 1,024
training examples (fresh ones where they are generated), 10,000 updates instead of 2,000
where ``num_steps`` says so.
"""

from __future__ import annotations

import functools
import pkgutil
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from metalstm.base import Array, PyTree
from metalstm.data.sources.labelled import ImageData
from metalstm.data.sources.mini_imagenet import load_mini_imagenet
from metalstm.data.sources.omniglot import load_omniglot
from metalstm.learned_optimizers import ProblemFamily, problems
from metalstm.nn import MLP

__all__ = ["TASKS", "VERSION", "HeldOut", "Loaded"]

VERSION = 2
"""2: the pendulum's torque is weak. With the strong one of version 1 all optimizers
ended at the same loss. Changed when no trained rule had been tested."""


class Loaded(NamedTuple):
    family: ProblemFamily
    data: Any


class HeldOut(NamedTuple):
    about: str
    load: Callable[[Path], Loaded]  # from the folder of the data sets
    num_steps: int = 2_000


# -- data ------------------------------------------------------------------------------


@functools.cache
def photos(folder: Path, split: str) -> ImageData:
    """mini-ImageNet as 28 x 28 x 3 floats in [0, 1], the classes of one split."""
    pool = load_mini_imagenet(folder / "mini_imagenet").pool(split)
    images = np.asarray(pool.images).reshape(-1, 28, 3, 28, 3, 3)
    x = images.mean((2, 4), dtype=np.float32) / 255
    return ImageData(jnp.asarray(x), jnp.repeat(jnp.arange(len(pool.counts)), 600))


@functools.cache
def characters(folder: Path) -> ImageData:
    """Omniglot's characters of meta-training, 28 x 28; the label is the alphabet."""
    data = load_omniglot(folder / "tensorflow_datasets")
    names = [name.split("/")[0] for name in data.class_names["train"]]
    alphabets = sorted(set(names))
    labels = np.array([alphabets.index(name) for name in names], np.int32)
    counts = np.asarray(data.train.counts)
    x = np.asarray(data.train.images, np.float32).reshape(-1, 28, 28, 1) / 255
    return ImageData(jnp.asarray(x), jnp.asarray(np.repeat(labels, counts)))


def text(characters: str, length: int = 32) -> tuple[ImageData, int]:
    """Windows of printable ASCII, everything else a space; and the number of kinds."""
    raw = np.frombuffer(characters.encode("ascii", "replace"), np.uint8)
    codes = np.where((raw < 32) | (raw > 126), 32, raw).astype(np.int32) - 32
    starts = np.arange(0, len(codes) - length - 1, 16)
    rows = jnp.asarray(codes[starts[:, None] + np.arange(length + 1)])
    return ImageData(rows[:, :-1], rows[:, 1:]), 95


def documentation() -> str:
    """The language reference that Python ships for its help()."""
    topics = pydoc_data.topics.topics
    return " ".join(topics[name] for name in sorted(topics))


def source_code() -> str:
    """The standard library's asyncio and email packages."""
    parts = []
    for package in ("asyncio", "email"):
        module = __import__(package)
        names = sorted(m.name for m in pkgutil.iter_modules(module.__path__))
        paths = [Path(module.__path__[0], f"{name}.py") for name in names]
        parts += [path.read_text() for path in paths if path.exists()]
    return "\n".join(parts)


# -- networks --------------------------------------------------------------------------


class ResNet(nn.Module):
    """A stem of stride 2, three residual blocks with group norm, mean over pixels."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), strides=2, use_bias=False)(x)
        for width, stride in ((16, 1), (32, 2), (32, 1)):
            y = nn.relu(nn.GroupNorm(4)(x))
            short = x
            if stride > 1:
                short = nn.Conv(width, (1, 1), strides=stride, use_bias=False)(y)
            y = nn.Conv(width, (3, 3), strides=stride, use_bias=False)(y)
            y = nn.relu(nn.GroupNorm(4)(y))
            x = short + nn.Conv(width, (3, 3), use_bias=False)(y)
        x = nn.relu(nn.GroupNorm(4)(x)).mean((1, 2))
        return nn.Dense(self.classes, name="head")(x)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    heads: int
    causal: bool

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
        y = nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    classes: int
    width: int = 48

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), strides=7)(x).reshape(len(x), -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(2):
            x = Block(4, causal=False)(x)
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(1))


class Transformer(nn.Module):
    kinds: int
    width: int = 48

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.kinds, self.width)(tokens)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(2):
            x = Block(4, causal=True)(x)
        return nn.Dense(self.kinds)(nn.LayerNorm()(x))


class GRU(nn.Module):
    kinds: int
    width: int = 48

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.kinds, self.width)(tokens)
        for _ in range(2):
            x = nn.RNN(nn.GRUCell(self.width))(x)
        return nn.Dense(self.kinds)(x)


def _next_character(outputs: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


# -- tasks -----------------------------------------------------------------------------


def _resnet(folder: Path) -> Loaded:
    data = photos(folder, "train")
    return Loaded(problems.supervised(ResNet(64), batch_size=32), data)


def _vit(folder: Path) -> Loaded:
    data = characters(folder)
    classes = int(data.y.max()) + 1
    return Loaded(problems.supervised(ViT(classes), batch_size=64), data)


def _transformer(folder: Path) -> Loaded:
    data, kinds = text(documentation())
    family = problems.supervised(Transformer(kinds), _next_character, batch_size=16)
    return Loaded(family, data)


def _gru(folder: Path) -> Loaded:
    data, kinds = text(source_code())
    family = problems.supervised(GRU(kinds), _next_character, batch_size=16)
    return Loaded(family, data)


def _autoencoder(folder: Path) -> Loaded:
    x = characters(folder).x.reshape(-1, 784)
    module = MLP(784, (128, 16, 128), jax.nn.sigmoid)

    def measure(outputs: Array, y: Array) -> Array:
        return optax.sigmoid_binary_cross_entropy(outputs, y).mean()

    family = problems.supervised(module, measure, batch_size=64)
    return Loaded(family, ImageData(x, x))


def _generated(
    module: nn.Module,
    inputs: int,
    draw: Callable[[Array, int], PyTree],
    measure: Callable[[Callable[[Array], Array], PyTree], Array],
    batch_size: int,
) -> Loaded:
    """A family without instances of its own: ``measure(network, minibatch)``."""

    def init(key: Array, task: PyTree) -> PyTree:
        del task
        return module.init(key, jnp.zeros((1, inputs)))["params"]

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        del task

        def network(x: Array) -> Any:
            return module.apply({"params": params}, x)

        return measure(network, batch)

    family = ProblemFamily(
        sample=lambda key, data: (),
        init=init,
        batch=lambda key, data, size=None: draw(key, size or batch_size),
        loss=loss,
    )
    return Loaded(family, ())


def _tabular(folder: Path) -> Loaded:
    """Friedman's first function of ten uniform inputs, five of which do not matter."""

    def draw(key: Array, size: int) -> PyTree:
        x_key, noise_key = jax.random.split(key)
        x = jax.random.uniform(x_key, (size, 10))
        y = 10 * jnp.sin(jnp.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
        y = y + 10 * x[:, 3] + 5 * x[:, 4] + jax.random.normal(noise_key, (size,))
        return x, (y[:, None] - 14.4) / 4.9

    def measure(network, batch):
        return jnp.square(network(batch[0]) - batch[1]).mean()

    return _generated(MLP(1, (64, 64), jax.nn.relu), 10, draw, measure, 128)


def _heat_equation(folder: Path) -> Loaded:
    """u_t = 0.1 u_xx on [0, 1]^2, u = sin(pi x) + sin(3 pi x) / 2 at t = 0, 0 at sides.

    The squared residual, plus ten times the squared errors at the start and the sides.
    """

    def draw(key: Array, size: int) -> PyTree:
        keys = jax.random.split(key, 4)
        inside = jax.random.uniform(keys[0], (size, 2))
        start = jax.random.uniform(keys[1], (size // 2, 1))
        side = jax.random.bernoulli(keys[2], 0.5, (size // 2, 1)).astype(float)
        time = jax.random.uniform(keys[3], (size // 2, 1))
        return inside, start, jnp.hstack([side, time])

    def measure(network, batch):
        inside, start, side = batch
        u = lambda point: network(point[None])[0, 0]  # noqa: E731
        x_axis, t_axis = jnp.eye(2)
        along = lambda f, axis: lambda p: jax.jvp(f, (p,), (axis,))[1]  # noqa: E731

        def residual(point):
            u_xx = along(along(u, x_axis), x_axis)(point)
            return along(u, t_axis)(point) - 0.1 * u_xx

        wanted = jnp.sin(jnp.pi * start) + jnp.sin(3 * jnp.pi * start) / 2
        at_start = network(jnp.hstack([start, jnp.zeros_like(start)])) - wanted
        parts = jax.vmap(residual)(inside), at_start, network(side)
        weighted = zip((1, 10, 10), parts, strict=True)
        return sum(weight * jnp.square(error).mean() for weight, error in weighted)

    return _generated(MLP(1, (32, 32, 32), jnp.tanh), 2, draw, measure, 64)


def _policy(folder: Path) -> Loaded:
    """Swing pendulums up: the cost of 40 simulated steps, differentiated through.

    The torque is too weak to lift them at once.
    """

    def draw(key: Array, size: int) -> PyTree:
        low = jnp.array([-jnp.pi, -1.0])
        return jax.random.uniform(key, (size, 2), minval=low, maxval=-low)

    def measure(network, states):
        def step(state, _):
            angle, speed = state.T
            observed = jnp.stack([jnp.sin(angle), jnp.cos(angle), speed], 1)
            torque = jnp.tanh(network(observed)[:, 0])
            speed = speed + 0.1 * (5 * jnp.sin(angle) + 3 * torque)
            angle = angle + 0.1 * speed
            cost = 1 - jnp.cos(angle) + 0.05 * speed**2 + 0.01 * torque**2
            return jnp.stack([angle, speed], 1), cost.mean()

        return jax.lax.scan(step, states, length=40)[1].mean()

    return _generated(MLP(1, (32, 32), jax.nn.elu), 3, draw, measure, 32)


def _maml(folder: Path) -> Loaded:
    """MAML's meta-loss on sinusoids: one inner step of 0.01, 8 tasks of 10 points."""

    def draw(key: Array, size: int) -> PyTree:
        keys = jax.random.split(key, 3)
        x = jax.random.uniform(keys[0], (size, 20, 1), minval=-5.0, maxval=5.0)
        height = jax.random.uniform(keys[1], (size, 1, 1), minval=0.1, maxval=5.0)
        phase = jax.random.uniform(keys[2], (size, 1, 1), maxval=jnp.pi)
        return x, height * jnp.sin(x - phase)

    module = MLP(1, (40, 40), jax.nn.relu)

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        def error(params, x, y):
            return jnp.square(module.apply({"params": params}, x) - y).mean()

        def one(x, y):
            grads = jax.grad(error)(params, x[:10], y[:10])
            adapted = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
            return error(adapted, x[10:], y[10:])

        return jax.vmap(one)(*batch).mean()

    made = _generated(module, 1, draw, lambda network, batch: jnp.float32(0), 8)
    return Loaded(made.family._replace(loss=loss), ())


def _fine_tuning(folder: Path) -> Loaded:
    """The network of "resnet", pre-trained there, with a new head for 16 new classes.

    Pre-training: 1,500 updates of AdamW at 3e-3 with a cosine, always the same.
    """
    start = _resnet(folder)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, 1_500))
    params = _trained(start, tx, 1_500)
    data = photos(folder, "validation")
    family = problems.supervised(ResNet(16), batch_size=32)

    def init(key: Array, task: PyTree) -> PyTree:
        return {**params, "head": family.init(key, task)["head"]}

    return Loaded(family._replace(init=init), data)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(family: ProblemFamily, tx: Any, num_steps: int, data: Any) -> PyTree:
    task = family.sample(jax.random.key(0), data)
    params = family.init(jax.random.key(1), task)

    def step(carry, key):
        params, state = carry
        grads = jax.grad(family.loss)(params, task, family.batch(key, data))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(2), num_steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def _trained(problem: Loaded, tx: Any, num_steps: int) -> PyTree:
    return _run(problem.family, tx, num_steps, problem.data)


TASKS: dict[str, HeldOut] = {
    "resnet": HeldOut("ResNet with group norm, 64 classes of photos", _resnet),
    "vit": HeldOut("vision transformer, alphabets of drawn characters", _vit),
    "transformer": HeldOut("transformer, characters of English", _transformer),
    "gru": HeldOut("two-layer GRU, characters of source code", _gru),
    "tabular": HeldOut("MLP, Friedman's function with noise", _tabular, 10_000),
    "autoencoder": HeldOut("sigmoid autoencoder of drawn characters", _autoencoder),
    "heat": HeldOut("tanh MLP solves the heat equation", _heat_equation, 10_000),
    "policy": HeldOut("policy of a pendulum, through the simulation", _policy),
    "maml": HeldOut("MAML's meta-loss on sinusoids", _maml, 10_000),
    "fine-tuning": HeldOut("a pre-trained ResNet on new classes", _fine_tuning),
}
