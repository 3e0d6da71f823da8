"""Every train and evaluation step as each platform is given it, wherever this runs.

Nothing is compiled here: a step is traced and lowered for the platform.
"""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export
from test_algorithms import CASES, EPISODE

import metalstm
from metalstm import algorithms, data, learned_optimizers, nn, rules, second_order
from metalstm.data.sources.labelled import ImageData
from metalstm.learned_optimizers import problems
from metalstm.learned_optimizers.curves import _curves
from metalstm.runtime.compilation import traced_for
from metalstm.tasks import map_tasks

LIBRARY = Path(metalstm.__file__).parent
XLA_NAMES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
KEY = jax.random.key(0)
OPTIMIZER = metalstm.adam_clipped()
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 19, 12, 12, 1), np.uint8)
SPEC = data.EpisodeSpec(way=3, shot=2, queries=2)
CONV = nn.conv4(3, 4, num_blocks=2)
FEATURES = nn.conv4(None, 4, num_blocks=2)
WITH_IMAGES = {
    "published_meta_lstm": algorithms.published_meta_lstm(
        CONV, rules.lstm_gates(hidden_size=2), num_steps=2
    ),
    "maml": algorithms.maml(CONV, 0.1, num_steps=2, differentiation=second_order()),
    "maml, what is kept": algorithms.maml(
        CONV, 0.1, num_steps=2, differentiation=second_order(keep="mixed")
    ),
    "prototypical": algorithms.prototypical(FEATURES),
    "relation": algorithms.relation(
        nn.conv4(None, 4, num_blocks=2, num_halvings=1, feature_maps=True),
        nn.relation_net(filters=4),
        train_way=3,
    ),
}


def exported(monkeypatch, platform: str, fn, *args, names=None) -> str:
    """The program of ``fn`` for a platform; JAX's default device is not asked for."""

    def asked():
        raise AssertionError("the traced program depends on where it is traced")

    with monkeypatch.context() as patch, traced_for(platform):
        patch.setattr(jax, "default_backend", asked)
        names = names or [XLA_NAMES[platform]]
        text = export.export(jax.jit(fn), platforms=names)(*args).mlir_module()
    assert not re.search(r"tensor<[\dx]*f64>", text)
    # constants of where to slice, and the counters of JAX's own loops, are no arrays
    arrays = (line for line in text.splitlines() if re.search(r"<[\dx]+xi64>", line))
    assert not [line for line in arrays if not re.search(r"dense<|array<i64", line)]
    return text


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_s_steps_export(name, platform, monkeypatch):
    algorithm, task = CASES[name].algorithm, CASES[name].task or EPISODE
    support, query = EPISODE

    def predict(params, query_x):
        return algorithm.predict(params, KEY, support, query_x, num_classes=tiny.WAY)

    def run(task, query_x):
        state = metalstm.init_train_state(algorithm, OPTIMIZER, 0, task)
        loss = 0.0
        if jax.tree.leaves(state.params):
            step = metalstm.make_train_step(algorithm, OPTIMIZER)
            state, metrics = step(
                state, jax.tree.map(lambda x: jnp.stack([x, x]), task)
            )
            loss = metrics["loss"]
        both = jnp.stack([query_x, query_x])
        return loss, map_tasks(lambda x: predict(state.params, x), both)

    names = ["cuda", "tpu"] if platform == "gpu" else None  # they differ with images
    exported(monkeypatch, platform, run, task, query.x, names=names)


@pytest.mark.parametrize("platform", XLA_NAMES)
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_steps_with_images_export_in_their_platform_s_form(name, platform, monkeypatch):
    algorithm, pool = WITH_IMAGES[name], data.make_pool(IMAGES)

    def run(seed, pool):
        episode = SPEC.sample(jax.random.key(seed), pool)
        state = metalstm.init_train_state(algorithm, OPTIMIZER, seed, episode)
        train = metalstm.make_train_loop(algorithm, OPTIMIZER, SPEC, num_tasks=2)
        state, metrics = train(state, pool)
        support, query = episode
        return metrics["loss"], algorithm.predict(
            state.params, KEY, support, query.x, num_classes=3
        )

    text = exported(monkeypatch, platform, run, 0, pool)
    has_cells = re.search(r"tensor<(\d+x)+2x\d+x2x4xf32>", text) is not None
    assert has_cells == (platform == "cpu")
    has_windows = re.search(r"= array<i64: 1, (1, )?2, 2, 1>", text) is not None
    assert has_windows == (platform != "cpu")


@pytest.mark.parametrize("platform", XLA_NAMES)
@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_learned_optimizers_steps_export(estimator, platform, monkeypatch):
    family = problems.mlp_classifier(hidden=(3,), batch_size=4)
    images = ImageData(jnp.zeros((20, 4, 4, 1), jnp.uint8), jnp.arange(20) % 10)
    rule = rules.l2l(hidden_size=2, num_layers=2)
    algorithm = learned_optimizers.learned_optimizer(
        family, rule, num_tasks=2, unroll_steps=2, horizon=4, estimator=estimator
    )
    sampler = problems.ProblemSampler(family, 3)
    curves = _curves(family, rule, 2, 2, 1, None, None, None)

    def run(seed, images):
        draw = sampler.sample(jax.random.key(seed), images)
        state = metalstm.init_train_state(algorithm, OPTIMIZER, seed, draw)
        train = metalstm.make_train_loop(algorithm, OPTIMIZER, sampler, num_tasks=2)
        state, metrics = train(state, images)
        return metrics["loss"], curves(state.params, images, seed)

    exported(monkeypatch, platform, run, np.uint32(0), images)


def test_one_function_alone_asks_where_a_program_is_traced():
    asking = [
        str(path.relative_to(LIBRARY))
        for path in LIBRARY.rglob("*.py")
        if "default_backend" in path.read_text()
    ]
    assert asking == ["runtime/compilation.py"]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_train_step_gives_its_state_s_memory_back(platform):
    algorithm, pool = WITH_IMAGES["prototypical"], data.make_pool(IMAGES)
    episode = SPEC.sample(KEY, pool)
    state = metalstm.init_train_state(algorithm, OPTIMIZER, 0, episode)
    with traced_for(platform):
        train = metalstm.make_train_loop(algorithm, OPTIMIZER, SPEC, num_tasks=2)
        text = train.lower(state, pool).as_text()
    given = len(re.findall(r"tf.aliasing_output|jax.buffer_donor", text))
    assert given == len(jax.tree.leaves(state))
