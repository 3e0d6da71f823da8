"""Several seeds at once: each as alone, on one device and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import algorithms, tasks
from metalstm.algorithms.common import make_algorithm
from metalstm.base import Aux
from metalstm.data import ClusterSpec
from metalstm.meta import step as meta_step
from metalstm.meta.seeds import init_seeds, map_seeds
from metalstm.runtime.sharding import place

SPEC = ClusterSpec(way=tiny.WAY, shot=tiny.SHOT, queries=2, dim=tiny.FEATURES)
EPISODE = SPEC.sample(jax.random.key(0))
SEEDS = np.array([3, 0, 8, 5], np.uint32)
CALLS, STEPS = 2, 3
# the gradient is in the state: Adam would hide a factor
OPTIMIZER = optax.chain(optax.trace(0.0), meta_step.adam_clipped(0.05))


def meta_sgd():
    """A learned initialisation and a learned rule."""
    return algorithms.meta_sgd(tiny.tanh_net(), num_steps=1)


def toy(**slots):
    return make_algorithm(
        init=lambda key, episode: {"w": jax.random.normal(key, (2,))},
        **{"loss": lambda params, key, episode: (0.0, Aux({})), "predict": None}
        | slots,
    )


def breaking(seed: int):
    """Its loss is NaN from the second step on, for that seed alone."""
    start_of_bad = meta_step.init_train_state(toy(), OPTIMIZER, seed, EPISODE).params

    def init_carry(key, params, episode):
        return (jnp.int32(0), jnp.all(params["w"] == start_of_bad["w"]))

    def meta_gradient(params, carry, keys, episodes):
        step, bad = carry
        loss = jnp.where(bad & (step >= 1), jnp.nan, 1.0)
        return jax.tree.map(jnp.ones_like, params), (step + 1, bad), {"loss": loss}

    return toy(init_carry=init_carry, meta_gradient=meta_gradient)


def make_loop(algorithm):
    return meta_step.make_train_loop(
        algorithm, OPTIMIZER, SPEC, num_tasks=2, steps_per_call=STEPS
    )


def calls(loop, state):
    """The state and the metrics after `CALLS` calls of the loop."""
    metrics = []
    for _ in range(CALLS):
        state, last = loop(state, ())
        metrics.append(jax.device_get(last))
    return jax.device_get(state), metrics


def together(algorithm, loop, mesh=None):
    states = init_seeds(algorithm, OPTIMIZER, SEEDS, EPISODE)
    return calls(map_seeds(loop, mesh=mesh), place(states, mesh, per_task=True))


def check(algorithm, mesh=None):
    loop = make_loop(algorithm)
    states, metrics = together(algorithm, loop, mesh)
    assert states.step.tolist() == [CALLS * STEPS] * len(SEEDS)
    for i, seed in enumerate(SEEDS):
        alone = meta_step.init_train_state(algorithm, OPTIMIZER, seed, EPISODE)
        own = jax.tree.map(lambda leaf, i=i: leaf[i], (states, metrics))
        tiny.assert_close(own, calls(loop, alone), rtol=1e-4, atol=1e-6)
    first = jax.tree.leaves(states.params)[0]
    assert np.abs(first[0] - first[1]).max() > 1e-3


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_each_seed_goes_where_it_goes_alone(how, monkeypatch):
    """Also as on an accelerator, where the seeds are an axis of every operation."""
    monkeypatch.setattr(tasks, "default_task_mapping", lambda: how)
    check(meta_sgd())


def test_a_seed_whose_loss_is_not_finite_stays_and_the_others_go_on():
    algorithm = breaking(8)
    states, metrics = together(algorithm, make_loop(algorithm))
    assert states.step.tolist() == [6, 6, 1, 6]
    finite = np.concatenate([m["finite"] for m in metrics], axis=1)
    assert finite.all(1).tolist() == [True, True, False, True]
    assert finite[2].tolist() == [True] + [False] * 5


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds is empty: give at least one"):
        init_seeds(toy(), OPTIMIZER, [], EPISODE)


MESH_SCRIPT = """
import test_seeds as t
from metalstm.meta.seeds import init_seeds, map_seeds
from metalstm.runtime.sharding import place, task_mesh

mesh = task_mesh(len(t.SEEDS))
assert mesh.size == 2
algorithm = t.meta_sgd()
t.check(algorithm, mesh)
loop = map_seeds(t.make_loop(algorithm), mesh=mesh)
states = init_seeds(algorithm, t.OPTIMIZER, t.SEEDS, t.EPISODE)
states = place(states, mesh, per_task=True)
program = loop.lower(states, ()).compile().as_text()
assert "while" in program
for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all"):
    assert collective not in program, collective
three = init_seeds(algorithm, t.OPTIMIZER, t.SEEDS[:3], t.EPISODE)
with t.pytest.raises(ValueError, match="3 seeds are not a multiple of the mesh's 2"):
    loop(three, ())
with t.pytest.raises(ValueError, match=r"axes \\('task', 'coordinate'\\)"):
    map_seeds(loop, mesh=task_mesh(1, devices_per_task=2))
"""


def test_seeds_on_two_devices_are_those_of_one_and_nothing_travels():
    tests = Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", MESH_SCRIPT], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
