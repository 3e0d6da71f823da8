"""What is compared on sinusoids: each method as a function of its inner rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from experiments.studies.sinusoids import Config
from metalstm import algorithms, nn, rules
from metalstm.algorithms.gradient.published import fixed_sgd
from metalstm.base import Learner, MetaAlgorithm, UpdateRule
from metalstm.inner import second_order

# 0.02 and 0.03 won trials of joint training and Reptile, and exploded on a few tasks
# when training went on
_INNER_RATES = (0.001, 0.003, 0.01)
_ADAM_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
_SCRATCH_RATES = tuple(1e-4 * 10 ** (k / 5) for k in range(12))  # to 0.016


class Method(NamedTuple):
    """One method. Rates may be traced, so that trials share one program."""

    build: Callable[[Any], MetaAlgorithm]  # inner rate -> how it is meta-trained
    rule: Callable[[Any], UpdateRule]  # inner rate -> what adapts at meta-test
    optimizer: Callable[[Any], optax.GradientTransformation]  # of an outer rate
    inner_rates: tuple[float, ...]
    outer_rates: tuple[float, ...]  # () when it is not meta-trained
    task_gradients: int  # gradient evaluations on a task in meta-training
    tuning_steps: int  # meta-steps of a trial of rates

    @property
    def trials(self) -> list[tuple[float, float]]:
        """(inner rate, outer rate), the same number for every method."""
        outer = self.outer_rates or (0.0,)
        return [(i, o) for i in self.inner_rates for o in outer]


def make_learner(config: Config) -> Learner:
    return nn.mlp(1, config.widths)


def make_methods(config: Config) -> dict[str, Method]:
    learner, steps, shot = make_learner(config), config.inner_steps, config.shot
    options: dict[str, Any] = {"num_steps": steps, "task_mapping": "vmap"}
    # joint training and Reptile have no query loss: they see a task's points as one set
    pooled: dict[str, Any] = {"train_shots": 2 * shot, "task_mapping": "vmap"}

    def gates(rate: Any) -> UpdateRule:
        logit: Any = jnp.log(rate / (1 - rate))
        return rules.lstm_gates(
            hidden_size=config.hidden,
            forget_bias=(7.0, 7.0),
            input_bias=(logit, logit),
        )

    def reptile(rate):
        return algorithms.reptile(
            learner,
            fixed_sgd(rate),
            num_steps=config.reptile_steps,
            batch_size=shot,
            **pooled,
        )

    def joint(rate):
        # the first gradient alone is that of the loss over all tasks at theta_0
        return algorithms.reptile(
            learner, fixed_sgd(rate), num_steps=1, gradient_weights=(1.0,), **pooled
        )

    def per_parameter(rate) -> UpdateRule:
        return rules.learned_sgd(rate, per="parameter")

    def of_rule(make: Callable[[Any], UpdateRule]):
        return lambda rate: algorithms.learned_init(
            learner, make(rate), differentiation=second_order(), **options
        )

    tuning = config.tuning_steps
    adam: dict[str, Any] = {"optimizer": optax.adam, "outer_rates": _ADAM_RATES}
    sgd: dict[str, Any] = {"rule": fixed_sgd, "inner_rates": _INNER_RATES}
    all_methods = {
        "maml": Method(
            build=lambda rate: algorithms.maml(learner, rate, **options),
            task_gradients=steps + 1,
            tuning_steps=tuning,
            **sgd,
            **adam,
        ),
        "fomaml": Method(
            build=lambda rate: algorithms.fomaml(learner, rate, **options),
            task_gradients=steps + 1,
            tuning_steps=tuning,
            **sgd,
            **adam,
        ),
        "reptile": Method(
            build=reptile,
            rule=fixed_sgd,
            optimizer=optax.sgd,
            inner_rates=(0.0025, 0.005, 0.01),
            outer_rates=(0.125, 0.25, 0.5, 1.0),  # 1: to where the tasks ended
            task_gradients=config.reptile_steps,
            tuning_steps=tuning,
        ),
        "meta-sgd": Method(
            build=of_rule(per_parameter),
            rule=per_parameter,
            inner_rates=_INNER_RATES,
            task_gradients=steps + 1,
            tuning_steps=tuning,
            **adam,
        ),
        "meta-lstm": Method(
            build=of_rule(gates),
            rule=gates,
            inner_rates=_INNER_RATES,
            task_gradients=steps + 1,
            tuning_steps=tuning,
            **adam,
        ),
        # with one gradient a task, its whole length is no dearer than others' trials
        "joint": Method(
            build=joint, task_gradients=1, tuning_steps=config.meta_steps, **sgd, **adam
        ),
    }
    chosen = {n: all_methods[n] for n in config.methods if n != "scratch"}
    scratch = Method(
        build=joint,
        rule=fixed_sgd,
        optimizer=optax.sgd,
        inner_rates=_SCRATCH_RATES,
        outer_rates=(),
        task_gradients=0,
        tuning_steps=0,
    )
    return chosen | {"scratch": scratch}
