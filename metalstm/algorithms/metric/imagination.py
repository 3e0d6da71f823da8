"""Imagine further support examples: feature hallucination.

Shapes: N support and M query images, d features, r generated for each support image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import accuracy, task_loss, with_running_statistics
from metalstm.algorithms.metric.engine import (
    class_means,
    squared_distances,
    with_train_options,
)
from metalstm.base import (
    Array,
    Aux,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    Norm,
    PyTree,
    make_algorithm,
)

__all__ = ["hallucination"]


def hallucination(
    learner: Learner,
    *,
    num_generated: int = 4,
    train_way: int | None = None,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Prototypical networks that imagine support examples (Wang et al., 2018).

    A generator makes of a support image's features x and noise z ~ N(0, I) the features
    of another example of its class, G(x, z) (section 4.1); real and generated together
    make the prototypes. Embedding and generator are trained end to end by the query
    loss, without a loss of the generator's own. G has three layers of d units and
    starts near the identity as in the paper, here as x plus a small correction, which
    serves features of either sign. At meta-test the noise follows the episode's key.

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
    if num_generated < 1:
        raise ValueError(
            f"num_generated={num_generated}: choose at least 1; with none this is "
            "prototypical"
        )

    def init(key: Array, episode: Episode) -> LearnerState:
        body_key, generator_key = jax.random.split(key)
        x = episode.support.x[:1]
        state = learner.init(body_key, x)
        features, _ = jax.eval_shape(
            lambda s: learner.apply(s, x, norm="stored"), state
        )
        if len(features.shape) != 2:
            raise ValueError(
                f"the learner returned shape {features.shape}, but the generator needs "
                "features [N, d]: flatten them"
            )
        generator = _init_generator(generator_key, features.shape[-1])
        return state._replace(
            params={"embedding": state.params, "generator": generator}
        )

    def run(state, key: Array, support: Batch, query_x, *, way: int, norm: Norm):
        noise_key, dropout_key = jax.random.split(key)
        images = jnp.concatenate([support.x, query_x])
        embedded, after = learner.apply(
            state._replace(params=state.params["embedding"]),
            images,
            norm=norm,
            key=dropout_key if norm == "gather" else None,
        )
        real, query = jnp.split(embedded, [support.x.shape[0]])
        noise = jax.random.normal(noise_key, (num_generated, *real.shape), real.dtype)
        imagined = generate(state.params["generator"], real, noise)
        examples = jnp.concatenate([real, imagined.reshape(-1, real.shape[-1])])
        labels = jnp.tile(support.y, 1 + num_generated)
        prototypes = class_means(examples, labels, way)
        return -squared_distances(query, prototypes), after.stats

    def loss(state: LearnerState, key: Array, episode: Episode):
        support, query = episode
        stats, other = lax.stop_gradient((state.stats, state.other))
        state = state._replace(stats=stats, other=other)
        # no task has more classes than support images
        way = support.x.shape[0] if train_way is None else train_way
        scores, stats = run(state, key, support, query.x, way=way, norm="gather")
        present = jnp.arange(way)[None] <= support.y.max()
        scores = jnp.where(present, scores, -jnp.inf)
        metrics = {"accuracy": accuracy(scores, query.y)}
        return task_loss(scores, query.y), Aux(metrics, lax.stop_gradient(stats))

    def predict(state, key: Array, support: Batch, query_x, *, num_classes: int):
        return run(state, key, support, query_x, way=num_classes, norm="stored")[0]

    slots = with_running_statistics(
        loss,
        read=lambda state: state.stats,
        write=lambda state, stats: state._replace(stats=stats),
    )
    return make_algorithm(
        init=init,
        loss=loss,
        predict=predict,
        init_carry=slots["init_carry"],
        meta_gradient=slots["meta_gradient"],
        absorb=slots["absorb"],
        train_sampler=with_train_options(train_way, train_queries),
        query_norm="frozen",
    )


def generate(generator: PyTree, x: Array, noise: Array) -> Array:
    """G(x, z) = x + W3 relu(W2 relu(W1 [x, z])): x [N, d], noise [r, N, d]."""
    first, second, last = generator["layers"]
    seeds = jnp.broadcast_to(x, noise.shape)
    hidden = jnp.concatenate([seeds, noise], -1)
    for layer in (first, second):
        hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
    return seeds + hidden @ last["kernel"] + last["bias"]


def _init_generator(key: Array, width: int) -> PyTree:
    layers = []
    for k, (rows, gain) in enumerate([(2 * width, 2.0), (width, 2.0), (width, 0.01)]):
        std = (gain / rows) ** 0.5  # the last layer's corrections are a tenth of x
        draw = jax.random.normal(jax.random.fold_in(key, k), (rows, width))
        layers.append({"kernel": std * draw, "bias": jnp.zeros(width)})
    return {"layers": layers}
