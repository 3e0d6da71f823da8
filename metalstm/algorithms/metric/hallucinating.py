"""Imagine further support examples: feature hallucination.

Shapes: N support and M query images, d features, r generated for each support image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from metalstm.algorithms.metric.distances import class_means, squared_distances
from metalstm.algorithms.metric.engine import Comparison, compare_embeddings
from metalstm.base import Array, Learner, LearnerState, MetaAlgorithm, Norm, PyTree
from metalstm.batches import to_rank_of
from metalstm.checks import check_at_least, check_features
from metalstm.records import recorded

__all__ = ["generate", "hallucination"]


@recorded("algorithm")
def hallucination(
    learner: Learner,
    *,
    num_generated: int = 4,
    train_way: int | None = None,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Prototypical networks that imagine support examples (Wang et al., 2018).

    From a support image's features x and noise z ~ N(0, I) a generator makes G(x, z),
    the features of another example of its class (section 4.1). Real and generated
    features together make the prototypes. Embedding and generator are trained end to
    end by the query loss alone. G has three layers of d units and starts near the
    identity as in the paper, here as x plus a small correction, which serves features
    of either sign. At meta-test the noise follows the episode's key.

    Batch norm uses averages over meta-training (``query_norm="frozen"``).

    Args:
      learner: its outputs [N, d] are the embedding.
      num_generated: r, examples imagined from each support image; the paper instead
        draws the images to start from.
      train_way, train_queries: classes, and queries a class, in meta-training.

    Raises:
      ValueError: ``num_generated`` is not positive; from ``init``, embeddings that are
        not vectors.
    """
    remedy = "(with none this is prototypical)"
    check_at_least("num_generated", num_generated, 1, remedy)

    def apply(state, key, support, labels, query, *, way: int, norm: Norm):
        del norm
        noise_key, _ = jax.random.split(key)
        shape = (num_generated, *support.shape)
        noise = jax.random.normal(noise_key, shape, support.dtype)
        imagined = generate(state.params, support, noise)
        examples = jnp.concatenate([support, imagined.reshape(-1, support.shape[-1])])
        examples_labels = jnp.tile(labels, 1 + num_generated)
        prototypes = class_means(examples, examples_labels, way)
        return -squared_distances(query, prototypes), state

    return compare_embeddings(
        learner,
        Comparison(apply, _init_generator, "generator", jax.random.split),
        train_way=train_way,
        train_queries=train_queries,
    )


def generate(generator: PyTree, x: Array, noise: Array) -> Array:
    """G(x, z) = x + W3 relu(W2 relu(W1 [x, z])): x [N, d], noise [r, N, d]."""
    first, second, last = generator["layers"]
    seeds = jnp.broadcast_to(x, noise.shape)
    hidden = jnp.concatenate([seeds, noise], -1)
    for layer in (first, second):
        hidden = hidden @ layer["kernel"]
        hidden = jax.nn.relu(hidden + to_rank_of(layer["bias"], hidden))
    return seeds + hidden @ last["kernel"] + to_rank_of(last["bias"], hidden)


def _init_generator(key: Array, embedded: Array) -> LearnerState:
    check_features(embedded.shape, "the generator")
    width = embedded.shape[-1]
    layers = []
    for k, (rows, gain) in enumerate([(2 * width, 2.0), (width, 2.0), (width, 0.01)]):
        std = (gain / rows) ** 0.5  # the last layer's corrections are a tenth of x
        draw = jax.random.normal(jax.random.fold_in(key, k), (rows, width), jnp.float32)
        layers.append({"kernel": std * draw, "bias": jnp.zeros(width, jnp.float32)})
    return LearnerState({"layers": layers}, {}, {})
