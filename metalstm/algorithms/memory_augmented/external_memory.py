"""A network that keeps the support set in an external memory: MANN.

Shapes: N support images in their order, d features, H controller units, S memory slots
of W numbers, R read heads.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.common import accuracy, task_loss, with_running_statistics
from metalstm.algorithms.metric.engine import unit, with_train_options
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

__all__ = ["MemoryNetState", "mann"]

_USAGE_DECAY = 0.95  # gamma of equation 6


class MemoryNetState(NamedTuple):
    h: Array  # [H]
    c: Array  # [H]
    memory: Array  # [S, W]
    read_weights: Array  # [R, S], of the previous step
    usage: Array  # [S]
    reads: Array  # [R W], of the previous step


def mann(
    learner: Learner,
    way: int,
    *,
    hidden_size: int = 200,
    num_slots: int = 128,
    slot_size: int = 40,
    num_reads: int = 4,
    train_queries: int | None = None,
) -> MetaAlgorithm:
    """Memory-augmented network with least-recently-used access (Santoro et al., 2016).

    The support set is a sequence: at step t an LSTM controller sees the features x_t
    and the *previous* label y_{t-1}, so that a label meets its image only through
    memory. Each query is then a step of its own from where the support set ended,
    together with the last support label; one query knows nothing of the others. The
    objective is the queries' cross-entropy.

    With keys k_t = tanh(W_k h_t), one for each head (equations 2 to 8):

        w^r_t = softmax of cos(k_t, M_{t-1}),    r_t = w^r_t M_{t-1}
        w^w_t = sigmoid(alpha_t) w^r_{t-1} + (1 - sigmoid(alpha_t)) w^lu_{t-1}
        w^u_t = gamma w^u_{t-1} + w^r_t + w^w_t
        M_t = M_{t-1} + w^w_t^T k_t, the least used slots zeroed before.

    Head i's w^lu is the i-th least used slot. Memory is read before it is written,
    which the paper leaves open. Batch norm uses averages over meta-training
    (``query_norm="frozen"``).

    Args:
      learner: its outputs [N, d] are what the controller sees.
      way: classes of every task; labels are inputs and outputs of fixed size.
      hidden_size, num_slots, slot_size, num_reads: H, S, W, R; the paper's by default.
      train_queries: queries a class in meta-training.

    Raises:
      ValueError: more heads than slots; from ``predict``, another way; from ``init``,
        features that are not vectors.
    """
    if not 1 <= num_reads <= num_slots:
        raise ValueError(
            f"num_reads={num_reads}: choose at least 1 and at most the {num_slots} "
            "slots, since each head writes to a slot of its own"
        )

    def init(key: Array, episode: Episode) -> LearnerState:
        body_key, key = jax.random.split(key)
        x = episode.support.x[:1]
        state = learner.init(body_key, x)
        features, _ = jax.eval_shape(
            lambda s: learner.apply(s, x, norm="stored"), state
        )
        if len(features.shape) != 2:
            raise ValueError(
                f"the learner returned shape {features.shape}, but the controller "
                "needs features [N, d]: flatten them"
            )
        read = num_reads * slot_size
        sizes = {
            "controller": (
                features.shape[-1] + way + read + hidden_size,
                4 * hidden_size,
            ),
            "interpolation": (hidden_size, num_reads),
            "keys": (hidden_size, read),
            "outputs": (hidden_size + read, way),
        }
        memory_net = {
            name: _dense(jax.random.fold_in(key, k), *shape)
            for k, (name, shape) in enumerate(sizes.items())
        }
        return state._replace(
            params={"embedding": state.params, "memory_net": memory_net}
        )

    def start(dtype) -> MemoryNetState:
        return MemoryNetState(
            h=jnp.zeros(hidden_size, dtype),
            c=jnp.zeros(hidden_size, dtype),
            memory=jnp.zeros((num_slots, slot_size), dtype),
            read_weights=jnp.zeros((num_reads, num_slots), dtype),
            usage=jnp.zeros(num_slots, dtype),
            reads=jnp.zeros(num_reads * slot_size, dtype),
        )

    def run(state, support: Batch, query_x, *, norm: Norm, key: Array | None = None):
        images = jnp.concatenate([support.x, query_x])
        embedded, after = learner.apply(
            state._replace(params=state.params["embedding"]), images, norm=norm, key=key
        )
        net = state.params["memory_net"]
        shown, asked = jnp.split(embedded, [support.x.shape[0]])
        labels = jax.nn.one_hot(support.y, way, dtype=embedded.dtype)
        late = jnp.concatenate([jnp.zeros((1, way), embedded.dtype), labels])
        memory, _ = lax.scan(
            lambda memory, xs: (memory_step(net, memory, *xs)[0], ()),
            start(embedded.dtype),
            (shown, late[:-1]),
        )
        one = lambda x: memory_step(net, memory, x, late[-1])[1]  # noqa: E731
        return jax.vmap(one)(asked), after.stats

    def loss(state: LearnerState, key: Array, episode: Episode):
        support, query = episode
        stats, other = lax.stop_gradient((state.stats, state.other))
        state = state._replace(stats=stats, other=other)
        scores, stats = run(state, support, query.x, norm="gather", key=key)
        metrics = {"accuracy": accuracy(scores, query.y)}
        return task_loss(scores, query.y), Aux(metrics, lax.stop_gradient(stats))

    def predict(state, key, support: Batch, query_x: Array, *, num_classes: int):
        del key
        if num_classes != way:
            raise ValueError(
                f"the task has {num_classes} classes but the network was made for "
                f"way={way}: choose way={way}"
            )
        return run(state, support, query_x, norm="stored")[0]

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
        train_sampler=with_train_options(None, train_queries),
        query_norm="frozen",
    )


def memory_step(
    net: PyTree, state: MemoryNetState, x: Array, late_label: Array
) -> tuple[MemoryNetState, Array]:
    """One step of the controller and its memory: x [d], late_label [way] -> scores."""
    num_reads = state.read_weights.shape[0]
    inputs = jnp.concatenate([x, late_label, state.reads, state.h])
    i, f, o, g = jnp.split(_linear(net["controller"], inputs), 4)
    c = jax.nn.sigmoid(f + 1) * state.c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    keys = jnp.tanh(_linear(net["keys"], h)).reshape(num_reads, -1)
    gate = jax.nn.sigmoid(_linear(net["interpolation"], h))[:, None]

    read_weights = jax.nn.softmax(unit(keys) @ unit(state.memory).T)
    reads = (read_weights @ state.memory).ravel()

    oldest = jnp.argsort(state.usage)[:num_reads]
    least_used = jax.nn.one_hot(oldest, state.usage.size, dtype=x.dtype)
    write_weights = gate * state.read_weights + (1 - gate) * least_used
    memory = state.memory * (1 - least_used.sum(0))[:, None] + write_weights.T @ keys
    usage = _USAGE_DECAY * state.usage + read_weights.sum(0) + write_weights.sum(0)

    scores = _linear(net["outputs"], jnp.concatenate([h, reads]))
    return MemoryNetState(h, c, memory, read_weights, usage, reads), scores


def _linear(layer: PyTree, x: Array) -> Array:
    return x @ layer["kernel"] + layer["bias"]


def _dense(key: Array, rows: int, columns: int) -> PyTree:
    kernel = jax.random.normal(key, (rows, columns)) * rows**-0.5
    return {"kernel": kernel, "bias": jnp.zeros(columns)}
