"""optax transforms in second-order inner loops, against numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalstm import second_order, unroll

STEPS, RATE, MAX_NORM, DECAY = 4, 0.3, 0.7, 0.2
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(5, 3)), RNG.normal(size=5)  # the support set's squares
C, D = RNG.normal(size=(4, 3)), RNG.normal(size=4)  # the query set's
START = RNG.normal(size=3)


def clipped(gradient, theta, step):
    del theta, step
    norm = np.linalg.norm(gradient)
    return -RATE * gradient * min(1, MAX_NORM / norm)


def clipped_by_value(gradient, theta, step):
    del theta, step
    return -RATE * np.clip(gradient, -MAX_NORM, MAX_NORM)


def decayed(gradient, theta, step):
    del step
    return -RATE * (gradient + DECAY * theta)


def scheduled(gradient, theta, step):
    del theta
    return -RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS)) * gradient


def warmed_clipped_decayed(gradient, theta, step):
    gradient = gradient * min(1, MAX_NORM / np.linalg.norm(gradient))
    return -RATE * (step + 1) / STEPS * (gradient + DECAY * theta)


CASES = {
    "norm clipping": (
        clipped,
        optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.sgd(RATE)),
    ),
    "clipping by value": (
        clipped_by_value,
        optax.chain(optax.clip(MAX_NORM), optax.sgd(RATE)),
    ),
    "weight decay": (
        decayed,
        optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE)),
    ),
    "schedule": (scheduled, optax.sgd(optax.cosine_decay_schedule(RATE, STEPS))),
    "all of them": (
        warmed_clipped_decayed,
        optax.chain(
            optax.clip_by_global_norm(MAX_NORM),
            optax.add_decayed_weights(DECAY),
            optax.sgd(lambda step: RATE * (step + 1) / STEPS),
        ),
    ),
}


def query_loss(update, theta):
    for step in range(STEPS):
        gradient = A.T @ (A @ theta - B) / len(B)
        theta = theta + update(gradient, theta, step)
    return np.square(C @ theta - D).mean()


@pytest.mark.parametrize("keep", ["all", "mixed", "segments"])
@pytest.mark.parametrize("name", CASES)
def test_the_meta_gradient_is_that_of_numpy(name, keep):
    update, tx = CASES[name]
    eps = 1e-6
    expected = [
        (query_loss(update, START + e) - query_loss(update, START - e)) / (2 * eps)
        for e in eps * np.eye(3)
    ]

    with jax.enable_x64(True):

        def support_loss(theta, stats, batch, key):
            del batch, key
            return jnp.square(A @ theta - B).mean() / 2, stats

        @jax.value_and_grad
        def loss(theta):
            end, _ = unroll(
                support_loss,
                tx,
                (),
                theta,
                num_steps=STEPS,
                differentiation=second_order(keep=keep),
            )
            return jnp.square(C @ end.params - D).mean()

        value, gradient = loss(jnp.asarray(START))
    np.testing.assert_allclose(value, query_loss(update, START), rtol=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
