"""Record golden numbers of metalstm: `record.py a|b|c --out FILE [--start GOLDEN]`.

Part a: float64 meta-gradients and 20 meta-steps of every algorithm and rule, and direct
unrolls. Part b: float32 Conv4 gradients, pretrained rules, evaluation. Part c: checksums
of episodes. `--start` takes inputs and initial meta-parameters from a recording (a
golden.npz) instead of from the library, so that a redesign of init or sampling shows as
a difference of `init`/`inputs` alone. `merge` joins parts into golden.npz + index.json.

A recording is an .npz of one vector an entry, named "part/case|kind", and a JSON string
"__index__": {"entries": {name: {"leaves": [[keystr, shape, dtype], ..], ..}}, ..}. Every
value is stored as float64 (exact for float32, bfloat16 and int32).

ONLY the section between the lines ADAPTER knows metalstm's names.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "golden_work/jaxcache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("METALSTM_CACHE_DIR", "golden_work/cache")
if len(sys.argv) > 1 and sys.argv[1] == "a":
    os.environ["JAX_ENABLE_X64"] = "1"
    # compiling is most of the time. Not for part b: with these flags XLA's program for the
    # second order of max-pool and layer norm gives NaN, and without them it does not
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 "
                          "--xla_llvm_disable_expensive_passes=true")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

WAY, SHOT, QUERIES, DIM = 3, 2, 2, 6
META_STEPS, TASKS, INNER = 20, 3, 3
DATA = Path("golden_work/data")

# =============================== ADAPTER: begin ========================================
import metalstm
from metalstm import algorithms, data, learned_optimizers, nn as learners, rules
from metalstm.learned_optimizers import problems
from metalstm.base import Batch, Episode, LearnerState
from metalstm.inner import first_order, second_order
from metalstm.learned_optimizers.problems import ProblemSampler

# (pattern, replacement) for keystr paths: what a leaf is called now -> what it is called
# in the recording that --start names. Empty for the recording version.
LEAF_NAMES: list[tuple[str, str]] = []


def differentiation(order: str | None, memory: str | None) -> dict:
    """Options of an algorithm factory. New API: differentiation=first_order(...) |
    second_order(keep=memory). None: the factory's default."""
    if order is None and memory is None:
        return {}
    keep = {"plain": "all"}.get(memory, memory)
    how = {"second": second_order, "first": first_order, None: first_order}[order]
    return {"differentiation": how() if keep is None else how(keep)}


def unroll(loss_fn, rule, rule_params, params, batches, *, num_steps, order, memory,
           truncate_every):
    """-> (final params, losses [num_steps]); loss_fn(params, batch) -> scalar."""
    how = second_order if order == "second" else first_order
    final, trace = metalstm.unroll(
        lambda params, stats, batch, key: (loss_fn(params, batch), stats),
        rule,
        rule_params,
        params,
        batches,
        num_steps=num_steps,
        differentiation=how({"plain": "all"}.get(memory, memory), truncate_every=truncate_every),
    )
    return final.params, trace.losses


_smooth_adam = functools.partial(optax.adam, eps_root=1e-8)
_sgd_momentum = functools.partial(optax.sgd, momentum=0.9)
_gates = functools.partial(rules.lstm_gates, input_bias=(-2.0, -1.0))
RULES = {
    "gates_code_h3": lambda: _gates(hidden_size=3),
    "gates_code_h20": lambda: rules.lstm_gates(),
    "gates_paper": lambda: _gates(variant="paper"),
    "gates_paper_h3": lambda: _gates(variant="paper", hidden_size=3),
    "gates_h0": lambda: _gates(hidden_size=0),
    "gates_tensor": lambda: _gates(hidden_size=0, bias_per="tensor"),
    "gates_tensor_head": lambda: _gates(
        hidden_size=2, bias_per="tensor", input_bias_of={"head": (-1.0, -0.5)}
    ),
    "gates_tensor_and_step": lambda: _gates(
        hidden_size=2, bias_per="tensor_and_step", num_bias_steps=2
    ),
    "gates_full_features": lambda: _gates(hidden_size=2, feature_gradient="full"),
    "gates_forget_one": lambda: _gates(hidden_size=2, forget="one"),
    "gates_input_constant": lambda: _gates(hidden_size=2, input="constant"),
    "gates_both_fixed": lambda: _gates(forget="one", input="constant"),
    "gates_ablated": lambda: _gates(
        hidden_size=2, loss_input=False, theta_input=False, carry_input=False, p=5.0
    ),
    "l2l_log_sign": lambda: rules.l2l(hidden_size=3),
    "l2l_raw": lambda: rules.l2l(hidden_size=3, num_layers=1, features="raw"),
    "l2l_moments": lambda: rules.l2l(hidden_size=3, features="moments"),
    "l2l_moments_shortcut": lambda: rules.l2l(
        hidden_size=3, num_layers=1, features="moments", shortcut=0.2, relative=True
    ),
    "gradient_memory": lambda: rules.chain(
        rules.gradient_memory(hidden_size=3), optax.scale(-0.05)
    ),
    "two_layer": lambda: rules.two_layer(memory={"hidden_size": 3}),
    "two_layer_gates_h2": lambda: rules.two_layer(
        memory={"hidden_size": 3},
        gates={"hidden_size": 2, "loss_input": False, "feature_gradient": "stopped"},
    ),
    "sgd_rule": lambda: rules.learned_sgd(0.1),
    "sgd_rule_steps": lambda: rules.learned_sgd((0.05, 0.2), num_steps=2),
    "sgd_tensor": lambda: rules.learned_sgd((0.05, 0.2), per="tensor"),
    "sgd_tensor_steps": lambda: rules.learned_sgd((0.05, 0.2), per="tensor", num_steps=2),
    "sgd_parameter": lambda: rules.learned_sgd((0.05, 0.2), per="parameter"),
    "sgd_parameter_steps": lambda: rules.learned_sgd(
        (0.05, 0.2), per="parameter", num_steps=2
    ),
    "chain_clip_gates": lambda: rules.chain(
        optax.clip_by_global_norm(0.5), _gates(hidden_size=2)
    ),
    "chain_clip_value_gates": lambda: rules.chain(  # smooth where the norm's is not
        optax.clip(0.2), _gates(hidden_size=2)
    ),
    "chain_sgd_scale": lambda: rules.chain(rules.learned_sgd(0.1), optax.scale(0.7)),
    "chain_rules": lambda: rules.chain(
        rules.learned_sgd(-1.0), _gates(hidden_size=2, loss_input=False)
    ),
    "by_group": lambda: rules.by_group(
        {"matrix": rules.l2l(hidden_size=2), "vector": rules.learned_sgd(0.1)},
        rules.matrix_or_vector,
    ),
    "by_group_conv_dense": lambda: rules.by_group(
        {"conv": rules.learned_sgd(0.1), "dense": _gates(hidden_size=2)},
        rules.conv_or_dense,
    ),
    "only_head": lambda: rules.only(rules.learned_sgd(0.1), "head"),
    "tunable_adam": lambda: rules.tunable(_smooth_adam, learning_rate=0.1, b1=0.8),
    "tunable_sgd": lambda: rules.tunable(_sgd_momentum, learning_rate=0.1),
    "optax_sgd": lambda: rules.as_rule(optax.sgd(0.1)),
    "optax_sgd_momentum": lambda: rules.as_rule(optax.sgd(0.1, momentum=0.9)),
}


@functools.cache
def make_rule(name: str):
    return RULES[name]()


class NormNet(nn.Module):
    """Dense, batch norm, tanh, dense: smooth, with statistics."""

    num_classes: int | None = WAY

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(5)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(x)
        x = jnp.tanh(x)
        return x if self.num_classes is None else nn.Dense(self.num_classes)(x)


class DropNet(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool):
        x = jnp.tanh(nn.Dense(5)(x))
        return nn.Dense(WAY)(nn.Dropout(0.3)(x, deterministic=deterministic))


def _nnx_net(rngs):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(DIM, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, momentum=0.8, rngs=rngs)
            self.out = nnx.Linear(5, WAY, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.first(x))))

    return Net(rngs)


def _drawn_in_float64(learner):
    """For methods that draw theta_0 in every episode."""
    return learner._replace(init=lambda key, x: as_float64(learner.init(key, x)))


@functools.cache
def make_learner(name: str):
    mlp = functools.partial(learners.mlp, widths=(5,), activation=jnp.tanh)
    if name.startswith("conv-"):  # conv-<max_pool|stride>-<batch|layer>[-features]
        _, downsample, norm, *rest = name.split("-")
        way = None if rest else 5
        return learners.conv4(way, 8, downsample=downsample, norm=norm)
    return {
        "mlp": lambda: mlp(WAY),
        "mlp64": lambda: _drawn_in_float64(mlp(WAY)),
        "mlp_features": lambda: mlp(None),
        "norm": lambda: learners.from_flax(NormNet()),
        "norm_features": lambda: learners.from_flax(NormNet(None)),
        "tied": lambda: learners.tied_head(mlp(None)),
        "dropout": lambda: learners.from_flax(DropNet()),
        "nnx": lambda: learners.from_flax(_nnx_net),
    }[name]()


# rule of the pre-training baselines' heads, and the like
def _sgd():
    return rules.as_rule(optax.sgd(0.3))


@functools.cache
def make_family(name: str):
    return {
        "quadratics": lambda: problems.quadratics(3),
        "sinusoids": lambda: problems.sinusoids(hidden=(3,), batch_size=4),
        "scaled": lambda: problems.with_random_scaling(problems.quadratics(3), 0.5, 2.0),
    }[name]()


def _learned_optimizer(family, rule, diff, **options):
    options = {"unroll_steps": 4, "horizon": 8} | options
    return learned_optimizers.learned_optimizer(
        make_family(family), make_rule(rule), num_tasks=TASKS, **options, **diff
    )


def make_algorithm(name: str, order: str | None = None, memory: str | None = None):
    """`name` may be "learned_init:RULE", "learned_optimizer:FAMILY:RULE:VARIANT" or one
    of the table's."""
    diff = differentiation(order, memory)
    a, L, T = algorithms, make_learner, {"num_steps": INNER}
    gates = make_rule("gates_code_h3")
    kind, *rest = name.split(":")
    if kind == "learned_init":
        return a.learned_init(L("mlp"), make_rule(rest[0]), **T, **diff)
    if kind == "learned_optimizer":
        family, rule, variant = rest
        options = {
            "plain": {},
            "full": {"unroll_steps": 8, "horizon": 8},
            "log": {"loss_transform": "log"},
            "relative": {"loss_transform": "relative"},
            "weights": {"weights": lambda t: t / 4.0},
            "stagger": {"stagger": True},
            "curriculum": {"horizon": lambda step: 4 + 4 * (step // 3)},
            "vmap": {"task_mapping": "vmap"},
            "scan": {"task_mapping": "scan"},
            "stacked": {"task_mapping": "stacked"},
            "pes": {"estimator": "pes"},
            "pes_log": {"estimator": "pes", "loss_transform": "log", "stagger": True},
        }[variant]
        return _learned_optimizer(family, rule, diff, **options)
    N = lambda **o: T | o | diff  # noqa: E731
    table = {
        # adapt by gradients
        "meta_lstm": lambda: a.published_meta_lstm(L("mlp"), gates, **N()),
        "meta_lstm_default_rule": lambda: a.published_meta_lstm(L("norm"), **N()),
        "meta_lstm_norm": lambda: a.published_meta_lstm(L("norm"), gates, **N()),
        "meta_lstm_norm_support": lambda: a.published_meta_lstm(
            L("norm"), gates, **N(train_query_norm="support", gradient_scale=1.0)
        ),
        "meta_lstm_norm_support+1": lambda: a.published_meta_lstm(
            L("norm"), gates, **N(train_query_norm="support+1", query_norm="support+1")
        ),
        "meta_lstm_norm_frozen": lambda: a.published_meta_lstm(
            L("norm"), gates, **N(query_norm="frozen", train_query_norm="frozen")
        ),
        "meta_lstm_no_init": lambda: a.published_meta_lstm(L("mlp64"), gates, **N(learn_init=False)),
        "meta_lstm_minibatch": lambda: a.published_meta_lstm(L("mlp"), gates, **N(batch_size=2)),
        "meta_lstm_dropout": lambda: a.published_meta_lstm(L("dropout"), gates, **N()),
        "meta_lstm_test_steps": lambda: a.published_meta_lstm(
            L("mlp"), gates, **N(num_test_steps=5, scan_unroll=2)
        ),
        "maml": lambda: a.maml(L("mlp"), 0.3, **N()),
        "maml_norm": lambda: a.maml(L("norm"), 0.3, **N()),
        "maml_norm_support": lambda: a.maml(
            L("norm"), 0.3, **N(train_query_norm="support")
        ),
        "maml_norm_transductive": lambda: a.maml(
            L("norm"), 0.3, **N(query_norm="transductive")
        ),
        "maml_norm_frozen": lambda: a.maml(L("norm"), 0.3, **N(query_norm="frozen")),
        "maml_nnx": lambda: a.maml(L("nnx"), 0.3, **N()),
        "maml_tied_head": lambda: a.maml(
            L("tied"), 0.3, **N(train_way=WAY, gradient_scale="way")
        ),
        "maml_vmap": lambda: a.maml(L("mlp"), 0.3, **N(task_mapping="vmap")),
        "fomaml": lambda: a.fomaml(L("mlp"), 0.3, **N()),
        "fomaml_norm": lambda: a.fomaml(L("norm"), 0.3, **N()),
        "anil": lambda: a.anil(L("mlp"), 0.3, **N()),
        "meta_sgd": lambda: a.meta_sgd(L("mlp"), **N()),
        "reptile": lambda: a.reptile(L("mlp"), **N(num_test_steps=4)),
        "reptile_sgd_norm": lambda: a.reptile(
            L("norm"), rules.as_rule(optax.sgd(0.1)), **N(num_test_steps=4)
        ),
        "reptile_minibatch": lambda: a.reptile(
            L("mlp"), 0.01, **N(num_test_steps=4, batch_size=3, test_batch_size=2)
        ),
        "reptile_weights": lambda: a.reptile(
            L("mlp"), _sgd(), **N(num_test_steps=4, gradient_weights=[1.0, 0.5, 0.2])
        ),
        "reptile_tied": lambda: a.reptile(
            L("tied"), 0.01, **N(num_test_steps=4, train_way=WAY)
        ),
        "implicit_maml": lambda: a.implicit_maml(L("mlp"), 0.3, **N(cg_steps=3)),
        "implicit_maml_norm_support": lambda: a.implicit_maml(
            L("norm"), 0.3, **N(cg_steps=3, train_query_norm="support", strength=1.0)
        ),
        "gradient_agreement_fomaml": lambda: a.gradient_agreement(
            a.fomaml(L("mlp"), 0.3, **N())
        ),
        "gradient_agreement_reptile": lambda: a.gradient_agreement(
            a.reptile(L("mlp"), 0.01, **N(num_test_steps=4))
        ),
        "from_scratch": lambda: a.from_scratch(L("mlp64"), _sgd(), num_steps=5),
        # compare embeddings
        "prototypical": lambda: a.prototypical(L("mlp_features")),
        "prototypical_norm_cosine": lambda: a.prototypical(
            L("norm_features"), distance="cosine"
        ),
        "prototypical_scale": lambda: a.prototypical(L("norm_features"), scale="learned"),
        "matching": lambda: a.matching(L("mlp_features")),
        "matching_euclidean_norm": lambda: a.matching(
            L("norm_features"), distance="euclidean", scale=0.5
        ),
        "matching_fce": lambda: a.matching(L("mlp_features"), context_steps=2),
        "relation": lambda: a.relation(
            L("norm_features"),
            learners.relation_net(filters=4, initializer="flax"),
            train_way=WAY,
        ),
        "relation_cross_entropy": lambda: a.relation(
            L("mlp_features"),
            learners.relation_net(filters=4),
            train_way=WAY,
            loss="cross_entropy",
        ),
        "siamese": lambda: a.siamese(L("norm_features")),
        "siamese_triplet": lambda: a.siamese(
            L("mlp_features"), loss="triplet", margin=1.0
        ),
        "hallucination": lambda: a.hallucination(L("norm_features"), num_generated=2),
        "mann": lambda: a.mann(
            L("norm_features"), WAY, hidden_size=4, num_slots=5, slot_size=3, num_reads=2
        ),
        "nearest_neighbour": lambda: a.nearest_neighbour(),
        # pre-train, then compare or tune; WAY classes
        "pretrained_centroid": lambda: a.pretrained_features(L("norm_features"), WAY),
        "pretrained_neighbour_cosine": lambda: a.pretrained_features(
            L("norm_features"), WAY, compare="neighbour", classifier="cosine"
        ),
        "pretrained_cosine": lambda: a.pretrained_features(
            L("mlp_features"), WAY, compare="cosine"
        ),
        "margin_am_softmax": lambda: a.margin_classifier(
            L("norm_features"), WAY, loss="am_softmax"
        ),
        "margin_arcface": lambda: a.margin_classifier(
            L("norm_features"), WAY, loss="arcface"
        ),
        "margin_sphereface": lambda: a.margin_classifier(
            L("mlp_features"), WAY, loss="sphereface"
        ),
        "fine_tuning_head": lambda: a.fine_tuning(
            L("norm_features"), WAY, _sgd(), tune="head", num_steps=4
        ),
        "fine_tuning_all": lambda: a.fine_tuning(
            L("norm_features"), WAY, _sgd(), tune="all", num_steps=4
        ),
        "fine_tuning_default_cosine": lambda: a.fine_tuning(
            L("mlp_features"), WAY, tune="all", num_steps=4, classifier="cosine"
        ),
    }
    return table[name]()


def conv_algorithm(name: str, net: str):
    """Part b: float32, 5 way."""
    a, L = algorithms, make_learner
    gates = make_rule("gates_code_h3")
    if name == "meta_lstm_first":
        return a.published_meta_lstm(L(net), gates, num_steps=3, **differentiation("first", None))
    if name == "meta_lstm_second":
        return a.published_meta_lstm(L(net), gates, num_steps=2, **differentiation("second", None))
    if name == "maml":
        return a.maml(L(net), 0.1, num_steps=2)
    if name == "fomaml":
        return a.fomaml(L(net), 0.1, num_steps=3)
    if name == "reptile":
        return a.reptile(L(net), 0.01, num_steps=3)
    return a.prototypical(L(net + "-features"))


def init_meta(algorithm, key, task):
    return algorithm.init(key, task)


def init_carry(algorithm, key, params, task):
    return algorithm.init_carry(key, params, task)


def meta_gradient(algorithm, params, carry, keys, tasks):
    """-> (gradient, metrics)"""
    grads, _, metrics = algorithm.meta_gradient(params, carry, keys, tasks)
    return grads, metrics


def train_state(algorithm, optimizer, seed, task, params):
    """A state at `params` (a copy), as init_train_state makes it at its own."""
    state = metalstm.init_train_state(algorithm, optimizer, seed, task)
    carry = algorithm.init_carry(jax.random.key(seed + 1), params, task)
    new = state._replace(params=params, opt_state=optimizer.init(params), carry=carry)
    return jax.tree.map(jnp.array, new)


def train_step(algorithm, optimizer, accumulate=None):
    """(state, tasks [T]) -> (state, metrics)"""
    return metalstm.make_train_step(algorithm, optimizer, accumulate_tasks=accumulate)


def params_of(state):
    return state.params


def opt_state_of(state):
    return state.opt_state


def predict(algorithm, params, key, support, query_x, way):
    return algorithm.predict(params, key, support, query_x, num_classes=way)


def adapt(algorithm, params, key, support):
    """-> (params, losses, observed gates)"""
    inner, trace = algorithm.adapt(params, key, support)
    return inner.params, trace.losses, trace.observed


def make_episode(sx, sy, qx, qy):
    return Episode(Batch(jnp.asarray(sx), jnp.asarray(sy)),
                   Batch(jnp.asarray(qx), jnp.asarray(qy)))


def make_batch(x, y):
    return Batch(jnp.asarray(x), jnp.asarray(y))


def draws(family: str, num_batches: int, key, num: int):
    """[num] draws of a problem family."""
    sampler = ProblemSampler(make_family(family), num_batches)
    return jax.vmap(lambda k: sampler.sample(k, None))(jax.random.split(key, num))


def pretrained(name):
    """-> an optax transform; None: the names"""
    if name is None:
        return [card.name for card in metalstm.pretrained_optimizer()]
    return metalstm.pretrained_optimizer(name)


def float_copy(tx):
    return rules.with_float_copy(tx)


def evaluate(algorithm, params, spec, num_episodes):
    return metalstm.evaluate(algorithm, params, None, spec, num_episodes=num_episodes)


def loss_curves(family, tx, **options):
    return learned_optimizers.curves.loss_curves(make_family(family), tx, **options)


def episode_key(seed, split, step, task):
    return data.episode_key(seed, split, step, task)


SPLITS = ("train", "validation", "test")


def data_sources():
    """name -> () -> {split: (sample fn(key) -> pytree)}, dataset checksum"""
    def pooled(load, spec):
        def make():
            dataset = load()
            out = {}
            for split in SPLITS:
                fn = jax.jit(spec.sample)
                out[split] = functools.partial(_sample, fn, dataset.pool(split))
            return out, dataset.checksum
        return make

    def _sample(fn, pool, key):
        return fn(key, pool)

    def free(spec):
        return lambda: ({s: jax.jit(spec.sample) for s in SPLITS}, "")

    def family(f, num_batches=3):
        sampler = ProblemSampler(f, num_batches)
        return lambda: ({s: jax.jit(lambda k: sampler.sample(k, None)) for s in SPLITS}, "")

    E = data.EpisodeSpec
    tmp = Path("golden_work/golden/tmp_sources_new")
    tmp.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(0)
    arrays_file = tmp / "arrays.npz"
    x = rng.randint(0, 256, (120, 9, 7)).astype(np.uint8)
    np.savez(arrays_file, x=x, y=np.repeat(np.arange(12), 10))
    folder = tmp / "folder"
    from PIL import Image
    for c in range(12):
        (folder / f"class{c:02d}").mkdir(parents=True, exist_ok=True)
        for k in range(6):
            pixels = rng.randint(0, 256, (20, 24, 3)).astype(np.uint8)
            path = folder / f"class{c:02d}" / f"{k}.png"
            Image.fromarray(pixels).save(path)
            os.utime(path, (1e9, 1e9))
    augment = data.augment
    letters = functools.partial(data.load_image_data, "glyphs")

    def labelled():
        d = letters()
        return {"train": lambda key: (d.train.x[:50], d.train.y[:50]),
                "test": lambda key: (d.test.x, d.test.y)}, d.checksum

    omniglot = functools.partial(data.load_omniglot, str(DATA / "tensorflow_datasets"))
    out = {
        "glyphs": pooled(data.load_glyphs, E(5, 1, 3)),
        "glyphs_classification": pooled_classification(data.load_glyphs),
        "glyphs_augmented": pooled(
            data.load_glyphs,
            E(5, 1, 3, augment=augment.compose(augment.shift(2), augment.crop()),
              normalise=((0.5,), (0.25,))),
        ),
        "labelled_glyphs": labelled,
        "sinusoid_spec": free(data.SinusoidSpec(5, 10)),
        "cluster_spec": free(data.ClusterSpec(5, 2, 3)),
        "quadratics": family(problems.quadratics(10)),
        "quadratics_uniform": family(
            problems.quadratics(10, distribution="uniform", init_std=0.01)
        ),
        "logistic_regression": family(problems.logistic_regression(4, num_examples=10)),
        "plateau": family(problems.plateau(4, num_examples=6)),
        "sinusoid_family": family(problems.sinusoids(hidden=(5,), batch_size=4)),
        "scaled_quadratics": family(
            problems.with_random_scaling(problems.quadratics(4), 0.1, 10.0)
        ),
        "arrays": pooled(
            functools.partial(data.load_arrays, arrays_file), E(2, 2, 3)
        ),
        "image_folder": pooled(
            functools.partial(data.load_image_folders, folder, image_size=16,
                              min_images=2), E(2, 1, 2, rotations=True)
        ),
        "omniglot": pooled(omniglot, E(5, 1, 5)),
        "omniglot_rotations": pooled(omniglot, E(5, 2, 3, rotations=True)),
        "omniglot_characters": pooled(
            functools.partial(omniglot, split="characters"), E(20, 1, 1)
        ),
        "mini_imagenet": pooled(
            functools.partial(data.load_mini_imagenet, str(DATA / "mini_imagenet")),
            E(5, 1, 3, normalise=data.IMAGENET),
        ),
    }
    return out


def pooled_classification(load):
    def make():
        dataset = load()
        out = {}
        for split in SPLITS:
            pool = dataset.pool(split)
            spec = data.ClassificationSpec(8, int(pool.num_classes), data.EpisodeSpec(5, 1))
            out[split] = functools.partial(
                lambda s, p, key: jax.jit(s.sample)(key, p), spec, pool
            )
        return out, dataset.checksum
    return make
# ================================ ADAPTER: end =========================================


def leaf_names(tree):
    return [(jax.tree_util.keystr(path), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def old_name(name: str) -> str:
    for pattern, to in LEAF_NAMES:
        name = re.sub(pattern, to, name)
    return name


class Recording:
    def __init__(self, start: str | None):
        self.arrays, self.entries, self.notes, self.failures = {}, {}, {}, {}
        self.start = None if start is None else load(start)
        self.autosave = None  # (file, part)

    def add(self, name: str, tree, **extra) -> None:
        leaves, parts = [], []
        for path, leaf in leaf_names(tree):
            value = np.array(leaf)  # a copy: train steps donate
            leaves.append([old_name(path), list(value.shape), str(value.dtype)])
            parts.append(value.astype(np.float64).ravel())
        self.arrays[name] = np.concatenate(parts) if parts else np.zeros(0)
        self.entries[name] = {"leaves": leaves, **extra}

    def given(self, name: str, tree, **extra):
        """Record `tree`; return it, or what the recording to start from has for it."""
        self.add(name, tree, **extra)
        if self.start is None or name not in self.start[1]["entries"]:
            return tree
        return fill(tree, *unpack(self.start, name))

    def save(self, out: str, part: str, seconds: float) -> None:
        index = {
            "parts": {part: {"seconds": round(seconds, 1), "jax": jax.__version__,
                             "optax": optax.__version__, "from": metalstm.__file__,
                             "started_from_golden": self.start is not None}},
            "entries": self.entries, "notes": self.notes, "failures": self.failures,
        }
        np.savez_compressed(out, __index__=np.array(json.dumps(index)), **self.arrays)


def load(path):
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return arrays, json.loads(arrays.pop("__index__").item())


def unpack(recording, name):
    """-> [(path, array)] in the recorded order"""
    arrays, index = recording
    flat, out, at = arrays[name], [], 0
    for path, shape, dtype in index["entries"][name]["leaves"]:
        size = int(np.prod(shape))
        out.append((path, flat[at : at + size].reshape(shape)))
        at += size
    return (out,)


def fill(tree, leaves):
    """`tree` with the recorded values: by path, else by place where shapes agree."""
    ours = leaf_names(tree)
    by_path = dict(leaves)
    names = [old_name(path) for path, _ in ours]
    if set(names) == set(by_path):
        values = [by_path[name] for name in names]
    elif [np.shape(x) for _, x in ours] == [x.shape for _, x in leaves]:
        values = [x for _, x in leaves]
    else:
        raise ValueError(f"leaves {names} are not the recorded {list(by_path)}: "
                         "add renames to LEAF_NAMES")
    for (path, leaf), value in zip(ours, values, strict=True):
        if np.shape(leaf) != value.shape:
            raise ValueError(f"{path} has shape {np.shape(leaf)}, recorded {value.shape}")
    new = [jnp.asarray(v, jnp.result_type(leaf)) for (_, leaf), v in zip(ours, values)]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def as_float64(tree):
    def one(x):
        x = jnp.asarray(x)
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(one, tree)


def keep_gradient() -> optax.GradientTransformation:
    """Its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


def cluster_episodes(num, seed, way=WAY, shot=SHOT, queries=QUERIES, dim=DIM):
    """float64 arrays with a leading [num]; labels in shuffled order."""
    rng = np.random.RandomState(seed)
    parts = []
    for _ in range(num):
        centres = rng.normal(size=(way, dim))
        one = []
        for n in (shot, queries):
            y = rng.permutation(np.repeat(np.arange(way), n))
            one += [centres[y] + 0.5 * rng.normal(size=(len(y), dim)), y.astype(np.int32)]
        parts.append(one)
    return [np.stack(x) for x in zip(*parts, strict=True)]


def at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


# -- part a ------------------------------------------------------------------------------

MEMORIES = ("plain", "remat", "mixed", "segments")


def algorithm_cases():
    """(case, algorithm, order, memory, tasks, outer, extras)"""
    out = []

    def add(name, order=None, memory=None, tasks="episodes", outer="adam", **extra):
        parts = [name.replace(":", "."), order, memory, extra.get("tag")]
        out.append(("/".join(["a", *(p for p in parts if p)]), name, order, memory,
                    tasks, outer, extra))

    both = ("first", "second")
    for order in both:
        for memory in MEMORIES:
            add("meta_lstm", order, memory)
            add("maml_norm", order, memory)
    for memory in MEMORIES:
        for rule in ("l2l_log_sign", "sgd_tensor_steps", "two_layer"):
            add(f"learned_init:{rule}", "second", memory)
    for name in RULES:
        for order in both:
            # refused: a norm's derivative at a zero gradient is not finite
            if (name, order) != ("chain_clip_gates", "second"):
                add(f"learned_init:{name}", order)
    for name in ("meta_lstm_norm", "meta_lstm_norm_support", "meta_lstm_norm_frozen",
                 "meta_lstm_no_init", "maml", "anil", "meta_sgd", "maml_tied_head"):
        for order in both:
            add(name, order)
    for name in ("meta_lstm_default_rule", "meta_lstm_minibatch", "meta_lstm_dropout",
                 "meta_lstm_test_steps", "maml_norm_support", "maml_norm_transductive",
                 "maml_norm_frozen", "maml_nnx", "maml_vmap", "fomaml", "fomaml_norm",
                 "gradient_agreement_fomaml", "prototypical", "prototypical_norm_cosine",
                 "prototypical_scale", "matching", "matching_euclidean_norm",
                 "matching_fce", "relation", "relation_cross_entropy", "siamese",
                 "siamese_triplet", "hallucination", "mann", "from_scratch",
                 "nearest_neighbour", "meta_lstm_norm_support+1"):
        add(name)
    add("maml", "second", accumulate=1, tag="accumulate")
    for name in ("meta_lstm", "maml", "anil"):
        add(name, adapt=True, tag="adapt", steps=0)
    for name in ("reptile", "reptile_sgd_norm", "reptile_minibatch", "reptile_weights",
                 "reptile_tied", "gradient_agreement_reptile"):
        add(name, outer="sgd")
    for name in ("implicit_maml", "implicit_maml_norm_support"):
        add(name)
    for name in ("pretrained_centroid", "pretrained_neighbour_cosine", "pretrained_cosine",
                 "margin_am_softmax", "margin_arcface", "margin_sphereface",
                 "fine_tuning_head", "fine_tuning_all", "fine_tuning_default_cosine"):
        add(name, tasks="batches")
    q = "learned_optimizer:quadratics:"
    for rule in ("l2l_log_sign", "l2l_moments_shortcut", "two_layer", "gates_code_h3",
                 "sgd_tensor"):
        for order in both:
            add(f"{q}{rule}:plain", order, tasks="quadratics4")
        add(f"{q}{rule}:pes", tasks="quadratics4")
    for memory in MEMORIES:
        add(f"{q}l2l_raw:plain", "second", memory, tasks="quadratics4")
        add(f"{q}l2l_raw:plain", "first", memory, tasks="quadratics4")
    for variant in ("full", "log", "relative", "weights", "stagger", "curriculum", "vmap",
                    "scan", "stacked", "pes_log"):
        steps = 8 if variant == "full" else 4
        add(f"{q}l2l_log_sign:{variant}", tasks=f"quadratics{steps}")
    add("learned_optimizer:sinusoids:l2l_log_sign:plain", tasks="sinusoids4")
    add("learned_optimizer:sinusoids:gates_code_h3:plain", "second", tasks="sinusoids4")
    add("learned_optimizer:sinusoids:sgd_parameter:pes", tasks="sinusoids4")
    add("learned_optimizer:scaled:l2l_moments:plain", tasks="scaled4")
    return out


def task_sets(rec):
    """[META_STEPS, TASKS, ...] of each kind, and one test episode."""
    raw = cluster_episodes(META_STEPS * TASKS, 1)
    lead = [x.reshape(META_STEPS, TASKS, *x.shape[1:]) for x in raw]
    out = {"episodes": rec.given("a/inputs/episodes", make_episode(*lead))}
    out["batches"] = rec.given("a/inputs/batches", make_batch(lead[2], lead[3]))
    for family, steps in (("quadratics", 4), ("quadratics", 8), ("sinusoids", 4),
                          ("scaled", 4)):
        drawn = draws(family, steps + 1, jax.random.key(5), META_STEPS * TASKS)
        drawn = jax.tree.map(lambda x: x.reshape(META_STEPS, TASKS, *x.shape[1:]),
                             as_float64(drawn))
        out[f"{family}{steps}"] = rec.given(f"a/inputs/{family}{steps}", drawn)
    test = make_episode(*(x[0] for x in cluster_episodes(1, 2)))
    out["test"] = rec.given("a/inputs/test_episode", test)
    return out


def run_algorithm(rec, sets, case, name, order, memory, tasks, outer, extra):
    algorithm = make_algorithm(name, order, memory)
    tasks_of, test = sets[tasks], sets["test"]
    one = at(at(tasks_of, 0), 0)
    params = as_float64(init_meta(algorithm, jax.random.key(3), one))
    if tasks == "episodes" and hasattr(params, "learner") and jax.tree.leaves(
        params.learner.stats
    ):  # averages that are not the initial 0 and 1
        stats = jax.tree.map(lambda x: x + 0.3, params.learner.stats)
        params = params._replace(learner=params.learner._replace(stats=stats))
    params = rec.given(f"{case}|init", params, tol="init")
    key = jax.random.key(11)
    if extra.get("adapt"):
        fn = jax.jit(lambda p, s: adapt(algorithm, p, key, s))
        rec.add(f"{case}|adapt", fn(params, test.support))
        return
    if getattr(algorithm, "trainable", True):
        tx = optax.adam(0.01) if outer == "adam" else optax.sgd(0.5)
        optimizer = optax.chain(keep_gradient(), tx)
        state = train_state(algorithm, optimizer, 4, one, params)
        step = train_step(algorithm, optimizer, extra.get("accumulate"))
        history = []
        for k in range(META_STEPS):
            state, metrics = step(state, at(tasks_of, k))
            if k == 0:
                rec.add(f"{case}|grad", opt_state_of(state)[0])
            history.append(jax.tree.map(np.array, metrics))
        series = jax.tree.map(lambda *xs: np.stack(xs), *history)
        rec.add(f"{case}|metrics", series)
        rec.add(f"{case}|final", params_of(state))
        if not series["finite"].all():
            rec.notes[case] = f"{int((~series['finite']).sum())} steps not finite"
        params = params_of(state)
    if name.startswith("learned_optimizer"):
        return
    fn = jax.jit(lambda p, s, x: predict(algorithm, p, key, s, x, WAY))
    rec.add(f"{case}|predict", fn(params, test.support, test.query.x))


def unroll_cases():
    out = []
    for rule in RULES:
        out += [(rule, "first", "plain", 2), (rule, "second", "plain", 2),
                (rule, "second", "mixed", None), (rule, "first", "plain", None)]
    for rule in ("gates_code_h3", "l2l_log_sign", "sgd_tensor"):
        for order in ("first", "second"):
            for memory in MEMORIES:
                for truncate in (None, 2):
                    out.append((rule, order, memory, truncate))
    return list(dict.fromkeys(out))


def run_unroll(rec, inputs, rule_name, order, memory, truncate):
    case = f"a/unroll/{rule_name}/{order}/{memory}/truncate{truncate}"
    rule = make_rule(rule_name)
    params, batches, last = inputs
    weights = as_float64(rule.init(jax.random.key(9), params))
    weights = rec.given(f"a/unroll/{rule_name}|init", weights, tol="init")

    def loss_fn(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
        outputs = hidden @ params["head"]["kernel"] + params["head"]["bias"]
        return jnp.square(outputs - y).mean()

    def objective(weights, params, batches, last):
        final, losses = unroll(
            loss_fn, rule, weights, params, batches, num_steps=5, order=order,
            memory=memory, truncate_every=truncate)
        value = loss_fn(final, last) + 0.3 * jnp.sum(losses * jnp.arange(1.0, 6.0))
        return value, (final, losses)

    fn = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
    (value, (final, losses)), grads = fn(weights, params, batches, last)
    rec.add(f"{case}|grad", {"rule": grads[0], "params": grads[1]})
    rec.add(f"{case}|final", {"params": final, "losses": losses, "value": value})


def part_a(rec, only):
    sets = task_sets(rec)
    rng = np.random.RandomState(7)
    params = {"body": {"kernel": 0.6 * rng.normal(size=(4, 5)), "bias": 0.1 * rng.normal(size=5)},
              "head": {"kernel": 0.6 * rng.normal(size=(5, 2)), "bias": 0.1 * rng.normal(size=2)}}
    x, y = rng.normal(size=(6, 8, 4)), rng.normal(size=(6, 8, 2))
    inputs = rec.given("a/inputs/unroll", jax.tree.map(
        jnp.asarray, (params, (x[:5], y[:5]), (x[5], y[5]))))
    jobs = [(c[0], functools.partial(run_algorithm, rec, sets, *c)) for c in algorithm_cases()]
    jobs += [(f"a/unroll/{'/'.join(map(str, c))}", functools.partial(run_unroll, rec, inputs, *c))
             for c in unroll_cases()]
    run_all(rec, jobs, only)
    # bfloat16 parameters behind a float32 copy
    def copies(rec):
        tx = float_copy(optax.sgd(1e-3, momentum=0.9))
        p = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), params)
        def step(carry, _):
            p, s = carry
            g = jax.tree.map(lambda v: (jnp.sin(3 * v) + 0.1).astype(v.dtype), p)
            u, s = tx.update(g, s, p)
            return (optax.apply_updates(p, u), s), None
        (p, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=30))((p, tx.init(p)))
        rec.add("a/with_float_copy|final", p, tol="float32")
    run_all(rec, [("a/with_float_copy", lambda: copies(rec))], only)


def run_all(rec, jobs, only):
    seen = {}
    for k, (case, job) in enumerate(jobs):
        if only and not re.search(only, case):
            continue
        if case in seen:
            continue
        seen[case] = True
        began = time.time()
        try:
            job()
        except Exception as error:
            rec.failures[case] = f"{type(error).__name__}: {error}"[:500]
            print(f"FAILED {case}: {rec.failures[case]}", flush=True)
            if os.environ.get("GOLDEN_TRACE"):
                traceback.print_exc()
        if rec.autosave is not None and k % 20 == 19:  # a killed run keeps its part
            rec.save(*rec.autosave, 0)
        print(f"{k + 1}/{len(jobs)} {case} {time.time() - began:.1f} s", flush=True)


# -- part b ------------------------------------------------------------------------------


def part_b(rec, only):
    rng = np.random.RandomState(3)
    centres = rng.uniform(size=(2, 5, 28, 28, 1))
    def images(n):
        y = np.stack([rng.permutation(np.repeat(np.arange(5), n)) for _ in range(2)])
        x = np.stack([centres[t][y[t]] for t in range(2)])
        x = np.clip(x + 0.3 * rng.normal(size=x.shape), 0, 1)
        return x.astype(np.float32), y.astype(np.int32)
    episodes = rec.given("b/inputs/episodes", make_episode(*images(1), *images(2)))
    one = at(episodes, 0)
    keys = jax.random.split(jax.random.key(1), 2)

    def conv(net, name):
        algorithm = conv_algorithm(name, net)
        case = f"b/{net}/{name}"
        params = init_meta(algorithm, jax.random.key(3), one)
        params = rec.given(f"{case}|init", params, tol="init")
        carry = init_carry(algorithm, jax.random.key(2), params, one)
        fn = jax.jit(functools.partial(meta_gradient, algorithm))
        grads, metrics = fn(params, carry, keys, episodes)
        rec.add(f"{case}|grad", grads, tol="float32")
        rec.add(f"{case}|metrics", metrics, tol="float32")
        fn = jax.jit(lambda p, s, x: predict(algorithm, p, jax.random.key(11), s, x, 5))
        if name in ("meta_lstm_first", "prototypical"):
            out = fn(params, one.support, one.query.x)
            rec.add(f"{case}|predict", out, tol="float32")

    jobs = []
    for net in ("conv-max_pool-batch", "conv-stride-batch", "conv-max_pool-layer",
                "conv-stride-layer"):
        for name in ("meta_lstm_first", "meta_lstm_second", "maml", "fomaml",
                     "prototypical", "reptile"):
            # every algorithm on the published net and on the other extreme
            if net in ("conv-stride-batch", "conv-max_pool-layer") and name not in (
                "meta_lstm_first", "maml"):
                continue
            jobs.append((f"b/{net}/{name}", functools.partial(conv, net, name)))

    def shipped(name):
        theta = jnp.asarray(np.random.RandomState(0).normal(size=10), jnp.float32)
        w = jnp.asarray(np.random.RandomState(1).normal(size=(10, 10)), jnp.float32)
        tx = optax.with_extra_args_support(pretrained(name))
        loss = lambda t: jnp.square(w @ t - 1).sum()  # noqa: E731
        def step(carry, _):
            t, s = carry
            v, g = jax.value_and_grad(loss)(t)
            u, s = tx.update(g, s, t, value=v)
            return (optax.apply_updates(t, u), s), v
        (t, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=50))((theta, tx.init(theta)))
        rec.add(f"b/pretrained/{name}|final", {"theta": t, "losses": losses}, tol="float32")

    for name in pretrained(None):
        jobs.append((f"b/pretrained/{name}", functools.partial(shipped, name)))

    def curves():
        out = loss_curves("quadratics", optax.adam(0.1), num_instances=4, num_steps=20)
        rec.add("b/loss_curves/quadratics_adam|final", np.asarray(out), tol="float32")
    jobs.append(("b/loss_curves", curves))

    def evaluation():
        spec = data.ClusterSpec(WAY, SHOT, 4, dim=DIM)
        for name in ("maml_norm", "prototypical", "meta_lstm_norm", "nearest_neighbour"):
            algorithm = make_algorithm(name)
            params = init_meta(algorithm, jax.random.key(3), spec.sample(jax.random.key(0)))
            params = rec.given(f"b/evaluate/{name}|init", params, tol="init")
            result = evaluate(algorithm, params, spec, 16)
            rec.add(f"b/evaluate/{name}|final", {"accuracies": result.accuracies,
                    "mean": result.mean, "ci95": result.ci95}, tol="float32")
    jobs.append(("b/evaluate", evaluation))
    run_all(rec, jobs, only)


# -- part c ------------------------------------------------------------------------------


def part_c(rec, only):
    sources = data_sources()

    def source(name, make):
        samplers, digest = make()
        rec.notes[f"c/{name}/dataset_checksum"] = digest
        for split, sample in samplers.items():
            for seed, step, task in ((0, 0, 0), (0, 0, 1), (0, 7, 2), (5, 1, 0)):
                tree = sample(episode_key(seed, split, step, task))
                leaves = leaf_names(tree)
                where = f"c/{name}/{split}/seed{seed}-step{step}-task{task}"
                h = hashlib.sha256()
                shapes = []
                for path, leaf in leaves:
                    value = np.ascontiguousarray(np.array(leaf))
                    own = hashlib.sha256(value.tobytes()).hexdigest()
                    h.update(value.tobytes())
                    shapes.append([old_name(path), list(value.shape), str(value.dtype), own])
                rec.entries[where] = {"sha256": h.hexdigest(), "leaves_sha": shapes}
                if sum(np.size(x) for _, x in leaves) < 400:  # small: values too
                    rec.add(f"{where}|values", tree, tol="float32")
                if name == "labelled_glyphs":
                    break

    run_all(rec, [(f"c/{n}", functools.partial(source, n, m)) for n, m in sources.items()],
            only)


NOTES = {
    "x64: randomness": "keys fold as in 32 bit; jax.random.normal draws float64 where the "
        "library gives no dtype, so inputs drawn by it (quadratics) are recorded",
    "x64: rule and learner init": "the library draws float32; cast to float64 here",
    "x64: averages over meta-training": "the carry's weight 1 / (steps + 1) is float32",
    "mann, relation": "smallest construction: features of the batch-norm net [N, 5], "
        "relation_net(filters=4) on vectors (ReLU inside)",
    "learn_init=False, from_scratch": "a learner whose init casts to float64, since the "
        "scan's carry would change its type",
    "not run": "learned_init with chain(clip_by_global_norm, gates) in second order is "
        "refused by the library; nearest_neighbour and from_scratch have only predict",
    "rounding alone": "other compiler flags move part a by up to 2.2e-10 (70 entries tried); part b's "
        "conv-max_pool-batch/reptile|grad (Adam divides by tiny gradients) and "
        "pretrained/l2l-quadratics|final by 1.3e-4, all other entries of b by < 2e-5",
    "first update": "the state of keep_gradient() is the meta-gradient "
        "at init, taken from the first public train step",
}


def merge(paths, out):
    arrays, index = {}, {"parts": {}, "entries": {}, "notes": {}, "failures": {}}
    for path in paths:
        own, its = load(path)
        arrays |= own
        for part, run in its["parts"].items():  # one part may come in several files
            run["seconds"] += index["parts"].get(part, {}).get("seconds", 0)
        for name in index:
            index[name] |= its[name]
    index["notes"] |= NOTES
    done = {name.split("|")[0] for name in index["entries"]}
    index["failures"] = {c: e for c, e in index["failures"].items() if c not in done}
    np.savez_compressed(out, __index__=np.array(json.dumps(index)), **arrays)
    text = json.dumps(index, indent=1)
    # a leaf a line
    text = re.sub(r"\[\s+(\"[^\n]*),\s+\[([^\]]*)\],\s+(\"[^\]]*?)\s+\]",
                  lambda m: f"[{m[1]}, [{' '.join(m[2].split())}], {' '.join(m[3].split())}]",
                  text)
    Path(out).with_name("index.json").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["a", "b", "c", "merge"])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--out", required=True)
    parser.add_argument("--start")
    parser.add_argument("--only", help="regular expression of cases")
    args = parser.parse_args()
    if args.part == "merge":
        merge(args.files, args.out)
        sys.exit()
    began = time.time()
    recording = Recording(args.start)
    recording.autosave = (args.out, args.part)
    {"a": part_a, "b": part_b, "c": part_c}[args.part](recording, args.only)
    recording.save(args.out, args.part, time.time() - began)
    print(f"{len(recording.entries)} entries, {len(recording.failures)} failures, "
          f"{time.time() - began:.0f} s")
