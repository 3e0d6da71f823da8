"""Train a learned optimizer, then train a flax model of one's own with it.

Claim: an LSTM that was trained by gradient descent to minimise logistic regressions is
an optimizer like others, and a bound rule *is* an optax transform (Andrychowicz et al.,
2016): it chains with clipping, and trains a model that it has never seen.

    python -m experiments.examples.learned_optimizer

Writes rule.npz. A minute on two CPU cores. Expected: after 100 updates of a small
network on two moons a loss of 0.001, where Adam has 0.004 at the best of four rates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import metalstm
from metalstm import learned_optimizers, rules
from metalstm.learned_optimizers import ProblemSampler, problems

SPEC = {"rule": "l2l", "features": "moments", "num_layers": 1, "shortcut": 0.2}
NUM_TASKS = 32  # problems in training at the same time
ADAM_RATES = (0.003, 0.01, 0.03, 0.1)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.out = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def train_model(tx: optax.GradientTransformation, steps: int) -> float:
    """The loss of a fresh network on two moons after ``steps`` updates."""
    angle = jnp.linspace(0, 2 * jnp.pi, 400)
    y = (angle > jnp.pi).astype(jnp.int32)
    x = jnp.stack([jnp.cos(angle) + y, jnp.sin(angle) + 0.5 * y], 1)
    x += 0.1 * jax.random.normal(jax.random.key(0), x.shape)
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss_fn(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return losses.mean()

    @nnx.jit
    def update(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, value=loss)  # some rules read the loss

    for _ in range(steps):
        update(model, optimizer)
    return float(loss_fn(model))


def main(meta_steps: int = 300, unroll: int = 20, steps: int = 100) -> dict[str, float]:
    """Meta-train a rule, use it on a network of one's own, compare with Adam.

    Args:
      meta_steps: updates of the rule's parameters.
      unroll: updates of the problems in one meta-step.
      steps: updates of the network.
    """
    family, rule = problems.logistic_regression(10), rules.build_rule(SPEC)
    algorithm = learned_optimizers.learned_optimizer(
        family, rule, num_tasks=NUM_TASKS, unroll_steps=unroll, horizon=5 * unroll,
        loss_transform="log", differentiation=metalstm.second_order(),
    )  # fmt: skip
    sampler = ProblemSampler(family, num_batches=unroll + 1)
    optimizer = metalstm.adam_clipped(3e-3, 1.0)
    draw = sampler.sample(jax.random.key(0), ())
    state = metalstm.init_train_state(algorithm, optimizer, 0, draw)
    train = metalstm.make_train_loop(algorithm, optimizer, sampler, num_tasks=NUM_TASKS)
    for step in range(meta_steps):
        state, metrics = train(state, ())
        if (step + 1) % max(meta_steps // 6, 1) == 0:
            loss = float(metrics["inner_loss"].mean())
            print(f"meta-step {step + 1:5d}  loss of the problems {loss:.3f}")
    metalstm.save_rule("rule.npz", SPEC, state.params)  # metalstm.load_rule reads it

    learned = optax.chain(optax.clip_by_global_norm(1.0), rule.bind(state.params))
    losses = {"learned": train_model(learned, steps)}
    for rate in ADAM_RATES:
        tx = optax.with_extra_args_support(optax.adam(rate))
        losses[f"adam {rate:g}"] = train_model(tx, steps)
    for name, loss in losses.items():
        print(f"{name:12} loss after {steps} updates {loss:.4f}")
    return losses


if __name__ == "__main__":
    tyro.cli(main)
