"""A network that keeps the support set in an external memory: MANN.

Shapes: N support images in their order, d features, H controller units, S memory slots
of W numbers, R read heads.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metalstm.algorithms.metric.distances import unit
from metalstm.algorithms.metric.engine import Comparison, compare_embeddings
from metalstm.base import Array, Learner, LearnerState, MetaAlgorithm, Norm, PyTree
from metalstm.checks import check_choice, check_features
from metalstm.records import recorded

__all__ = ["MemoryNetState", "MemorySizes", "mann", "memory_step"]

_USAGE_DECAY = 0.95  # gamma of equation 6
_STRENGTH = 5.0  # where beta starts


class MemorySizes(NamedTuple):
    hidden_size: int  # H
    num_slots: int  # S
    slot_size: int  # W
    num_reads: int  # R


class MemoryNetState(NamedTuple):
    """What the controller carries from step to step."""

    h: Array  # [H]
    c: Array  # [H]
    memory: Array  # [S, W]
    read_weights: Array  # [R, S], of the previous step
    usage: Array  # [S]
    reads: Array  # [R W], of the previous step


@recorded("algorithm")
def mann(
    learner: Learner,
    way: int,
    *,
    hidden_size: int = 200,
    num_slots: int = 128,
    slot_size: int = 40,
    num_reads: int = 4,
    key_strength: Literal["learned", "one"] = "learned",
    train_queries: int | None = None,
    train_learner: bool = True,
) -> MetaAlgorithm:
    """Memory-augmented network with least-recently-used access (Santoro et al., 2016).

    The support set is a sequence: at step t an LSTM controller sees the features x_t
    and the *previous* label y_{t-1}, so that a label meets its image only through
    memory. Each query is then one step from where the support set ended, together with
    the last support label; no query sees another. The objective is the queries'
    cross-entropy.

    With keys k_t = tanh(W_k h_t), one for a head (equations 2 to 8):

        w^w_t = sigmoid(alpha_t) w^r_{t-1} + (1 - sigmoid(alpha_t)) w^lu_{t-1}
        M_t = M_{t-1} + w^w_t^T k_t, the least used slots zeroed before,
        w^r_t = softmax of beta_t cos(k_t, M_t),    r_t = w^r_t M_t
        w^u_t = gamma w^u_{t-1} + w^r_t + w^w_t.

    Head i's w^lu is the i-th least used slot. A head finds what it has just written, so
    that the next step, which brings the label, can write it to the same slot. Batch
    norm uses averages over meta-training (``query_norm="frozen"``).

    Args:
      learner: its outputs [N, d] are what the controller sees.
      way: classes of every task; labels are inputs and outputs of fixed size.
      hidden_size, num_slots, slot_size, num_reads: H, S, W, R; the paper's by default.
      key_strength: beta. ``"learned"``: softplus of a linear function of h_t that
        starts at 5, as in Neural Turing Machines (Graves et al., 2014, equation 5);
        ``"one"``, as the paper has it: a read is then a mean of nearly all slots, from
        which little is learned unless they are few.
      train_queries: queries a class in meta-training.
      train_learner: False keeps a learner that was trained before as it is, the
        averages of its batch norm included, and meta-trains the memory alone.

    Raises:
      ValueError: more heads than slots, or another ``key_strength``; from ``predict``,
        another way; from ``init``, features that are not vectors.
    """
    if not 1 <= num_reads <= num_slots:
        raise ValueError(
            f"num_reads={num_reads}: choose at least 1 and at most the {num_slots} "
            "slots, since no two heads may write to one slot"
        )
    check_choice("key_strength", key_strength, ("learned", "one"))
    sizes = MemorySizes(hidden_size, num_slots, slot_size, num_reads)
    return compare_embeddings(
        learner,
        _memory_comparison(way, sizes, key_strength),
        train_way=way,
        train_queries=train_queries,
        train_learner=train_learner,
    )


def _memory_comparison(way: int, sizes: MemorySizes, key_strength: str) -> Comparison:
    """Score queries by a network that read the support set into its memory."""

    def init(key: Array, embedded: Array) -> LearnerState:
        check_features(embedded.shape, "the controller")
        net = _init_memory_net(key, embedded.shape[-1], way, sizes)
        if key_strength == "one":
            del net["strength"]
        return LearnerState(net, {}, {})

    def apply(state, key, support, labels, query, *, way: int, norm: Norm):
        del key, norm
        if way != network_way:
            raise ValueError(
                f"the task has {way} classes but the network was made for "
                f"way={network_way}: choose way={network_way}"
            )
        net = state.params
        onehot = jax.nn.one_hot(labels, way, dtype=support.dtype)
        late = jnp.concatenate([jnp.zeros((1, way), support.dtype), onehot])
        memory, _ = lax.scan(
            lambda memory, xs: (memory_step(net, memory, *xs)[0], ()),
            _empty_memory(sizes, support.dtype),
            (support, late[:-1]),
        )
        answer = lambda x: memory_step(net, memory, x, late[-1])[1]  # noqa: E731
        return jax.vmap(answer)(query), state

    network_way = way
    return Comparison(apply, init, "memory_net", jax.random.split)


def _init_memory_net(key: Array, width: int, way: int, sizes: MemorySizes) -> PyTree:
    """Draw the layers of a controller that reads features [width]."""
    hidden, reads = sizes.hidden_size, sizes.num_reads * sizes.slot_size
    shapes = {
        "interpolation": (hidden, sizes.num_reads),
        "keys": (hidden, reads),
        "outputs": (hidden + reads, way),
        "strength": (hidden, sizes.num_reads),
    }
    net = {
        name: _init_layer(jax.random.fold_in(key, k), *shape)
        for k, (name, shape) in enumerate(shapes.items())
    }
    # as if each input were the only one: a label is one number among hundreds
    parts = [
        _init_layer(jax.random.fold_in(key, len(net) + k), rows, 4 * hidden, inputs)
        for k, (rows, inputs) in enumerate(
            [(width, width), (way, 1), (reads, reads), (hidden, hidden)]
        )
    ]
    kernel = 0.5 * jnp.concatenate([part["kernel"] for part in parts])
    return net | {"controller": {"kernel": kernel, "bias": parts[0]["bias"]}}


def _empty_memory(sizes: MemorySizes, dtype) -> MemoryNetState:
    zeros = lambda *shape: jnp.zeros(shape, dtype)  # noqa: E731
    return MemoryNetState(
        h=zeros(sizes.hidden_size),
        c=zeros(sizes.hidden_size),
        memory=zeros(sizes.num_slots, sizes.slot_size),
        read_weights=zeros(sizes.num_reads, sizes.num_slots),
        usage=zeros(sizes.num_slots),
        reads=zeros(sizes.num_reads * sizes.slot_size),
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

    oldest = jnp.argsort(state.usage)[:num_reads]
    least_used = jax.nn.one_hot(oldest, state.usage.size, dtype=x.dtype)
    write_weights = gate * state.read_weights + (1 - gate) * least_used
    emptied = state.memory * (1 - least_used.sum(0))[:, None]
    memory = emptied + write_weights.T @ keys

    logits = unit(keys) @ unit(memory).T
    if "strength" in net:
        logits *= jax.nn.softplus(_linear(net["strength"], h) + _STRENGTH)[:, None]
    read_weights = jax.nn.softmax(logits)
    reads = (read_weights @ memory).ravel()
    usage = _USAGE_DECAY * state.usage + read_weights.sum(0) + write_weights.sum(0)

    scores = _linear(net["outputs"], jnp.concatenate([h, reads]))
    return MemoryNetState(h, c, memory, read_weights, usage, reads), scores


def _linear(layer: PyTree, x: Array) -> Array:
    return x @ layer["kernel"] + layer["bias"]


def _init_layer(
    key: Array, rows: int, columns: int, inputs: int | None = None
) -> PyTree:
    """``inputs``: how many of the rows are not zero; default: all."""
    scale = (rows if inputs is None else inputs) ** -0.5
    kernel = jax.random.normal(key, (rows, columns), jnp.float32) * scale
    return {"kernel": kernel, "bias": jnp.zeros(columns, jnp.float32)}
