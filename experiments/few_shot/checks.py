"""What no run can do, whatever its data are."""

from __future__ import annotations

from typing import Any

from experiments.common import cli, devices
from experiments.few_shot.methods import (
    BASELINE,
    HAND_MADE,
    LEARNS_INIT,
    METHODS,
    init_source,
    is_inner_loop,
    moves_theta,
)
from experiments.few_shot.options import Data, Options, Training


def check(options: Options) -> None:
    """Refuse what cannot work, whatever the data are.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    run, names = options.run, tuple(options.methods)
    if run.resume is not None and run.workdir is not None:
        raise ValueError("--resume RUN continues in that folder; drop --workdir")
    devices.check(options.devices)
    tuned = [name for name in names if METHODS[name].family == HAND_MADE]
    source = init_source(names) or ""
    if tuned and not source:
        raise ValueError(
            f"--algorithms {tuned[0]} starts from a learned theta_0: add one of "
            f"{', '.join(LEARNS_INIT)}"
        )
    if tuned and not getattr(options.methods[source].method, "learn_init", True):
        raise ValueError(
            "--no-learn-init learns no theta_0 for the hand-made rules: drop "
            f"{', '.join(tuned)}, or choose scratch"
        )
    starts = {name: own.training.init_from for name, own in options.methods.items()}
    baselines = [name for name in names if METHODS[name].family == BASELINE]
    of_others = [starts[name] for name in names if name not in baselines]
    for name in baselines:
        if starts[name] not in (None, *of_others):
            raise ValueError(
                f"--init-from {starts[name]}: {name} starts from nothing that was "
                "trained; drop it, or add a method that does"
            )
    for own in options.methods.values():
        _check_no_episodes(own.training, run.seeds)
        _check_method(own, options.data)


def _check_no_episodes(training: Training, seeds: int) -> None:
    if training.episodes:
        return
    if training.init_from is None:
        raise ValueError(
            "--episodes 0 tests a trained network as it is: add --init-from"
        )
    if training.minutes is not None or seeds > 1:
        raise ValueError(
            "--episodes 0 trains nothing, and all seeds are one: drop "
            + ("--minutes" if training.minutes is not None else "--seeds")
        )


def _check_method(options: Any, data: Data) -> None:
    training, own = options.training, options.method
    if training.schedule != "constant" and training.minutes is not None:
        raise ValueError(
            f"--schedule {training.schedule} needs --episodes, not --minutes"
        )
    chunk = training.accumulate_tasks or 1
    cli.check_multiple("--meta-batch", training.meta_batch, "--accumulate-tasks", chunk)
    if training.theta_learning_rate is not None and moves_theta(own):
        raise ValueError(
            f"--theta-learning-rate {training.theta_learning_rate:g}: reptile moves "
            "theta_0 by --outer-step; drop it"
        )
    for name, kept in (("frozen_stats", "kept"), ("train_learner", False)):
        if getattr(own, name, None) == kept and training.init_from is None:
            flag = "--frozen-stats kept" if kept else "--no-train-learner"
            raise ValueError(f"{flag} keeps what --init-from brings: add it")
    norms = getattr(own, "query_norm", None), getattr(own, "train_query_norm", None)
    if norms[0] == "frozen" and norms[1] not in ("frozen", None):
        raise ValueError(
            "--query-norm frozen falls to chance unless meta-training uses the same "
            "averages: add --train-query-norm frozen"
        )
    last = getattr(own, "last", None)
    if last is not None and getattr(own, "order", "second") == "first":
        raise ValueError(f"--last {last} needs --order second: add it")
    if is_inner_loop(own):
        _check_minibatches(own, training, data)


def _check_minibatches(own: Any, training: Training, data: Data) -> None:
    """Refuse minibatches that do not divide the support sets they are drawn from."""
    in_test = data.way * data.shot
    way, shots = getattr(own, "train_way", None), training.train_shots
    if hasattr(own, "test_batch_size"):  # of reptile, which alone has other shots
        in_training = (way or data.way) * (shots or data.shot)
        drawn = [("batch_size", in_training), ("test_batch_size", in_test)]
    else:
        in_training = (way or data.way) * data.shot
        drawn = [("batch_size", in_training), ("batch_size", in_test)]
    for name, support in drawn:
        batch = getattr(own, name, None)
        if batch is not None and support % batch:
            raise ValueError(
                f"--{name.replace('_', '-')} {batch} does not divide the {support} "
                "images of a support set: choose a divisor"
            )
