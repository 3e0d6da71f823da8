"""What the rule for ordinary training is meta-trained and meta-validated on.

Everything is generated, or comes with a package: scikit-learn's digits and tables,
letters of matplotlib's fonts, text of a small grammar. The tasks of the test are in
`held_out_tasks`: other data, other architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from metalstm.base import Array, PyTree
from metalstm.data.sources.labelled import ImageData, load_image_data
from metalstm.learned_optimizers import ProblemFamily, problems
from metalstm.nn import MLP

__all__ = ["Task", "grammar_text", "training_tasks", "validation_tasks"]


class Task(NamedTuple):
    name: str
    family: ProblemFamily
    data: Any
    costly: bool = False  # train half as many at once


# -- data ------------------------------------------------------------------------------


def digits() -> ImageData:
    """scikit-learn's 1,797 digits of 8 x 8, as floats in [0, 1]."""
    x, y = _sklearn("load_digits")
    return ImageData(jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32))


def table(name: str) -> ImageData:
    """One of scikit-learn's small tables, its columns (and float targets) whitened."""
    x, y = _sklearn(f"load_{name}")
    white = lambda a: (a - a.mean(0)) / a.std(0)  # noqa: E731
    if y.dtype.kind == "f":
        return ImageData(
            jnp.asarray(white(x), jnp.float32),
            jnp.asarray(white(y)[:, None], jnp.float32),
        )
    return ImageData(jnp.asarray(white(x), jnp.float32), jnp.asarray(y, jnp.int32))


def _sklearn(loader: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"meta-training reads the tables of scikit-learn ({error}): pip install "
            "'metalstm[learned-optimizers]'"
        ) from error
    return getattr(datasets, loader)(return_X_y=True)


def boxes(num_examples: int = 8_000, columns: int = 12) -> ImageData:
    """A table labelled by random trees' votes, a tenth of the labels redrawn."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_examples, columns)).astype(np.float32)
    votes = np.zeros(num_examples)
    for _ in range(30):
        chosen = rng.integers(columns, size=3)
        leaf = (x[:, chosen] > rng.standard_normal(3)) @ np.array([1, 2, 4])
        votes += rng.standard_normal(8)[leaf]
    y = (votes > np.median(votes)).astype(np.int32)
    redrawn = rng.random(num_examples) < 0.1
    y[redrawn] = rng.integers(2, size=redrawn.sum())
    return ImageData(jnp.asarray(x), jnp.asarray(y))


def letters(size: int = 14) -> ImageData:
    """The embedded letters, every ``28 // size`` pixels averaged, in [0, 1]."""
    train = load_image_data("glyphs").train
    x = np.asarray(train.x, np.float32).reshape(len(train.y), 28, 28) / 255
    k = 28 // size
    x = x.reshape(-1, size, k, size, k).mean((2, 4))[..., None]
    return ImageData(jnp.asarray(x), train.y)


def noisy(
    data: ImageData, copies: int, *, inputs: float, labels: float = 0.0, shift: int = 0
) -> ImageData:
    """Copies with Gaussian noise, moved by up to ``shift`` pixels, some labels redrawn.

    Networks of this size cannot learn them by heart, so that losses stay above zero as
    those of ordinary training do.
    """
    rng = np.random.default_rng(0)
    x = np.repeat(np.asarray(data.x), copies, 0)
    y = np.repeat(np.asarray(data.y), copies, 0)
    if shift:
        moves = rng.integers(-shift, shift + 1, (len(x), 2))
        x = np.stack([np.roll(a, by, (0, 1)) for a, by in zip(x, moves, strict=True)])
    x = x + inputs * rng.standard_normal(x.shape, np.float32)
    redrawn = rng.random(len(y)) < labels
    y[redrawn] = rng.permutation(y[redrawn])
    return ImageData(jnp.asarray(x, jnp.float32), jnp.asarray(y))


_RULES = {
    "S": ("N V N.", "N V that N V N.", "if N V N, N V.", "N and N V."),
    "N": ("the A B", "a B", "every B", "the B of N", "C"),
    "A": ("old", "red", "tiny", "bright", "A and A"),
    "B": ("tree", "river", "stone", "bird", "lamp", "house", "cloud"),
    "C": ("ada", "noor", "emil"),
    "V": ("sees", "likes", "moves", "finds", "knows", "A D"),
    "D": ("paints", "carries", "holds"),
}


def grammar_text(num_characters: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Sentences of a random context-free grammar: int32 characters, how many kinds."""
    rng = np.random.default_rng(seed)

    def expand(symbol: str, depth: int) -> str:
        options = _RULES[symbol]
        # deep down the first option, which has the fewest symbols of its own
        choice = options[rng.integers(len(options)) if depth < 6 else 1]
        words = (expand(c, depth + 1) if c in _RULES else c for c in choice)
        return "".join(words)

    parts: list[str] = []
    total = 0
    while total < num_characters:
        parts.append(expand("S", 0) + " ")
        total += len(parts[-1])
    text = "".join(parts)[:num_characters]
    kinds = sorted(set(text))
    return np.array([kinds.index(c) for c in text], np.int32), len(kinds)


def windows(tokens: np.ndarray, length: int, stride: int = 3) -> ImageData:
    """Inputs [M, length] and the characters that follow each position."""
    starts = np.arange(0, len(tokens) - length - 1, stride)
    rows = starts[:, None] + np.arange(length + 1)
    cut = jnp.asarray(tokens[rows])
    return ImageData(cut[:, :-1], cut[:, 1:])


# -- networks --------------------------------------------------------------------------


class CharacterGRU(nn.Module):
    kinds: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.kinds, self.width)(tokens)
        x = nn.RNN(nn.GRUCell(self.width))(x)
        return nn.Dense(self.kinds)(x)


class ContextMLP(nn.Module):
    """Predict each character from the four before it."""

    kinds: int
    width: int
    context: int = 4

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.kinds, 8)(tokens)
        pad = jnp.pad(x, ((0, 0), (self.context - 1, 0), (0, 0)))
        length = x.shape[1]
        x = jnp.concatenate([pad[:, k : k + length] for k in range(self.context)], -1)
        return nn.Dense(self.kinds)(nn.gelu(nn.Dense(self.width)(x)))


class NormalisedMLP(nn.Module):
    """Layer norm before each activation, and a residual."""

    outputs: int
    width: int
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x.reshape(len(x), -1))
        for _ in range(self.layers):
            x = x + nn.Dense(self.width)(nn.silu(nn.LayerNorm()(x)))
        return nn.Dense(self.outputs)(x)


class SmallCNN(nn.Module):
    outputs: int
    filters: int = 8
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        for k in range(2):
            x = nn.Conv(self.filters * (k + 1), (3, 3), strides=2)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.norm else x)
        return nn.Dense(self.outputs)(x.reshape(len(x), -1))


def next_character(outputs: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


# -- problems without data -------------------------------------------------------------


def noisy_quadratics(
    dim: int = 32, condition: float = 1e3, noise: float = 0.3
) -> ProblemFamily:
    """1/2 sum_k l_k (theta_k - y_k - noise_k)^2 in a random basis, l from 1 down.

    The eigenvalues l are log-spaced to 1 / condition, the noise is a minibatch's.
    """

    def sample(key: Array, data: PyTree) -> PyTree:
        del data
        basis_key, y_key = jax.random.split(key)
        basis, _ = jnp.linalg.qr(jax.random.normal(basis_key, (dim, dim)))
        return {"basis": basis, "y": jax.random.normal(y_key, (dim,))}

    def init(key: Array, task: PyTree) -> PyTree:
        del task
        return {"theta": jax.random.normal(key, (dim,))}

    def batch(key: Array, data: PyTree, size: int | None = None) -> PyTree:
        del data
        return jax.random.normal(key, (size or 1, dim))

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        eigenvalues = condition ** -jnp.linspace(0.0, 1.0, dim)
        error = task["basis"] @ params["theta"] - task["y"] - noise * batch
        return 0.5 * (eigenvalues * jnp.square(error)).sum(-1).mean()

    return ProblemFamily(sample, init, batch, loss)


def teacher(
    make: Callable[[], nn.Module], inputs: int, *, batch_size: int, noise: float
) -> ProblemFamily:
    """Regress on a random two-layer tanh teacher of Gaussian inputs, plus noise."""
    module = make()

    def sample(key: Array, data: PyTree) -> PyTree:
        del data
        a, b = jax.random.split(key)
        return {
            "a": jax.random.normal(a, (inputs, 32)) * 2 / inputs**0.5,
            "b": jax.random.normal(b, (32, 1)) / 32**0.5,
        }

    def init(key: Array, task: PyTree) -> PyTree:
        del task
        return module.init(key, jnp.zeros((1, inputs)))["params"]

    def batch(key: Array, data: PyTree, size: int | None = None) -> PyTree:
        del data
        x_key, noise_key = jax.random.split(key)
        size = size or batch_size
        x = jax.random.normal(x_key, (size, inputs))
        return x, noise * jax.random.normal(noise_key, (size, 1))

    def loss(params: PyTree, task: PyTree, batch: PyTree) -> Array:
        x, noise = batch
        y = jnp.tanh(x @ task["a"]) @ task["b"] + noise
        return jnp.square(module.apply({"params": params}, x) - y).mean()

    return ProblemFamily(sample, init, batch, loss)


class RowGRU(nn.Module):
    """Classify an image by a recurrent network that reads its rows."""

    outputs: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(self.width))(x[..., 0])
        return nn.Dense(self.outputs)(x[:, -1])


class AttentionModel(nn.Module):
    """One block of causal attention, without an MLP."""

    kinds: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.kinds, self.width)(tokens)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        return nn.Dense(self.kinds)(nn.LayerNorm()(x))


def autoencoder(
    inputs: int, width: int, code: int, *, batch_size: int
) -> ProblemFamily:
    """Reconstruct flat inputs through a bottleneck."""
    module = MLP(inputs, (width, code, width), jax.nn.relu)

    def measure(outputs: Array, y: Array) -> Array:
        return jnp.square(outputs - y).mean()

    return problems.supervised(module, measure, batch_size=batch_size)


# -- the two sets ----------------------------------------------------------------------


def _inputs(data: ImageData) -> ImageData:
    return ImageData(data.x, data.x)


def _mlp(outputs: int, hidden: Sequence[int], activation: Callable, batch_size: int):
    module = MLP(outputs, tuple(hidden), activation)
    return problems.supervised(module, batch_size=batch_size)


def training_tasks(with_noise: bool = True) -> tuple[Task, ...]:
    """Families of small networks; theta_0 and minibatches differ from run to run.

    Args:
      with_noise: that images and tables are noisy copies.
    """
    numbers, glyphs = digits(), letters()
    moved = ImageData(numbers.x.reshape(-1, 8, 8, 1), numbers.y)
    blurred, cancer, wine, diabetes = (
        glyphs,
        *map(table, ("breast_cancer", "wine", "diabetes")),
    )
    if with_noise:
        moved = noisy(moved, 12, inputs=0.2, labels=0.05, shift=1)
        blurred = noisy(glyphs, 40, inputs=0.3, labels=0.02, shift=2)
        cancer, wine, diabetes = (
            noisy(plain, 20, inputs=0.3, labels=0.05)
            for plain in (cancer, wine, diabetes)
        )
    flat = _inputs(glyphs._replace(x=glyphs.x.reshape(-1, 196)))
    tokens, kinds = grammar_text(60_000)
    text = windows(tokens, 16)
    supervised = problems.supervised
    wide = MLP(1, (64,), jnp.tanh)
    gru, window = CharacterGRU(kinds, 16), ContextMLP(kinds, 48)
    return (
        Task("digits-relu", _mlp(10, (32,), jax.nn.relu, 64), moved),
        Task("digits-tanh", _mlp(10, (32, 32), jnp.tanh, 32), numbers),
        Task("digits-deep", _mlp(10, (24,) * 4, jax.nn.gelu, 64), moved),
        Task("digits-wide", _mlp(10, (128,), jax.nn.relu, 64), moved, True),
        Task("digits-norm", supervised(NormalisedMLP(10, 24), batch_size=32), moved),
        Task("digits-wider", _mlp(10, (256, 128), jax.nn.gelu, 32), moved, True),
        Task("letters-code", autoencoder(196, 40, 8, batch_size=32), flat, True),
        Task("letters-sigmoid", _mlp(10, (20,), jax.nn.sigmoid, 32), blurred, True),
        Task("letters-elu", _mlp(10, (32, 16), jax.nn.elu, 16), blurred, True),
        Task("letters-cnn", supervised(SmallCNN(10), batch_size=16), blurred, True),
        Task("cancer", _mlp(2, (16,), jax.nn.relu, 32), cancer),
        Task("wine", _mlp(3, (16, 16), jax.nn.silu, 16), wine),
        Task("diabetes", _mlp(1, (32,), jnp.tanh, 64), diabetes),
        Task("text-gru", supervised(gru, next_character, batch_size=8), text, True),
        Task("text-mlp", supervised(window, next_character, batch_size=16), text),
        Task("noisy-quadratics", noisy_quadratics(), ()),
        Task("teacher", teacher(lambda: wide, 8, batch_size=64, noise=0.1), ()),
    )


def validation_tasks() -> tuple[Task, ...]:
    """Families that nothing is meta-trained on; they choose the best rule."""
    numbers = digits()
    squares = ImageData(numbers.x.reshape(-1, 8, 8, 1), numbers.y)
    moved = noisy(squares, 12, inputs=0.2, labels=0.05, shift=1)
    blurred = noisy(letters(), 40, inputs=0.3, labels=0.02, shift=2)
    tokens, kinds = grammar_text(30_000, seed=1)
    deep = NormalisedMLP(1, 48, layers=3)
    attention = AttentionModel(kinds, 24)
    normed = SmallCNN(10, 6, norm=True)
    supervised = problems.supervised
    return (
        Task("autoencoder", autoencoder(64, 48, 6, batch_size=32), _inputs(numbers)),
        Task(
            "attention",
            supervised(attention, next_character, batch_size=8),
            windows(tokens, 24),
        ),
        Task("cnn-norm", supervised(normed, batch_size=16), blurred),
        Task("rows-gru", supervised(RowGRU(10, 24), batch_size=16), moved),
        Task("deep-teacher", teacher(lambda: deep, 16, batch_size=16, noise=0.3), ()),
        Task("table", _mlp(2, (64, 64), jax.nn.gelu, 32), boxes()),
        Task("wide", _mlp(10, (160, 80), jax.nn.leaky_relu, 32), blurred),
    )
