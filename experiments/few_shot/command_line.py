"""Read the command line of few_shot; refuse what cannot work before anything runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import tyro

from experiments.common.devices import Devices
from experiments.common.devices import check as check_devices
from experiments.few_shot.methods import HAND_MADE, LEARNS_INIT, METHODS, config_for
from experiments.few_shot.options import (
    GROUPS,
    Config,
    did_you_mean,
    from_json,
    read_config,
    value_of,
    values_of,
    with_flags,
)
from experiments.few_shot.presets import preset


def parse(arguments: list[str]) -> Config:
    """Read the command line; a preset or a resumed run gives the defaults.

    Raises:
      ValueError: an unknown preset, or options that cannot work together.
      FileNotFoundError: --resume or --evaluate names no run folder.
    """
    default = Config()
    named = value_of("--preset", arguments)
    if named is not None:
        default = preset(named)
    resumed = value_of("--resume", arguments)
    evaluated = [Path(name) for name in values_of("--evaluate", arguments)]
    if resumed is not None or evaluated:
        default = _of_runs([Path(resumed)] if resumed is not None else evaluated)
        if named is not None:
            flag = "--evaluate" if evaluated else "--resume"
            raise ValueError(f"{flag} takes its options from the run; drop --preset")
    config = tyro.cli(
        Config,
        args=arguments,
        default=default,
        description=_DESCRIPTION,
        prog="python -m experiments.few_shot",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    # what is said here holds for every method
    config = with_flags(config, **{n: _get(config, n) for n in given(arguments)})
    names = [part for item in config.methods.algorithms for part in item.split(",")]
    chosen = tuple(METHODS) if "all" in names else tuple(n for n in names if n)
    own = {name: flags for name, flags in config.own.items() if name in chosen}
    config = dataclasses.replace(with_flags(config, algorithms=chosen), own=own)
    check(config)
    return config


def _of_runs(folders: list[Path]) -> Config:
    """The first run's options, with the methods of all."""
    saved = [read_config(folder) for folder in folders]
    config = from_json(saved[0]["config"])
    names = list(config.methods.algorithms)
    names += [n for other in saved[1:] for n in other["methods"] if n not in names]
    config = with_flags(config, resume=None, evaluate=(), workdir=None)
    config = dataclasses.replace(config, devices=Devices())  # it may go on elsewhere
    return with_flags(config, algorithms=tuple(names))


def given(arguments: list[str]) -> set[str]:
    """The options that a command line sets, by their flat names."""
    flags = (a[2:].split("=", 1)[0] for a in arguments if a.startswith("--"))
    names = {flag.replace("-", "_") for flag in flags}
    names |= {name.removeprefix("no_") for name in names}
    return names & _all_names()


def _get(config: Config, name: str) -> Any:
    parts = (vars(getattr(config, group)) for group in GROUPS)
    return next(options[name] for options in parts if name in options)


def check(config: Config) -> None:
    """Refuse what cannot work, whatever the data are.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    chosen = config.methods.algorithms
    if not chosen:
        raise ValueError(f"--algorithms is empty: choose from {', '.join(METHODS)}")
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"--algorithms {name}: {did_you_mean(name, METHODS)}")
    repeated = [name for name in chosen if chosen.count(name) > 1]
    if repeated:
        raise ValueError(f"--algorithms names {repeated[0]} twice: drop one")
    _check_ranges(config)
    evaluated = bool(config.run.evaluate)
    if evaluated and config.run.resume is not None:
        raise ValueError("--evaluate and --resume: choose one")
    if config.run.resume is not None and config.run.workdir is not None:
        raise ValueError("--resume RUN goes on in that folder; drop --workdir")
    check_devices(config.devices)
    if not evaluated:
        _check_training(config)


def _check_training(config: Config) -> None:
    chosen = config.methods.algorithms
    tuned = [name for name in chosen if METHODS[name].family == HAND_MADE]
    if tuned and not any(name in LEARNS_INIT for name in chosen):
        raise ValueError(
            f"--algorithms {tuned[0]} starts from a learned theta_0: add one of "
            f"{', '.join(LEARNS_INIT)}"
        )
    if config.methods.draw_init and tuned and "meta-lstm" in chosen:
        raise ValueError(
            "--draw-init learns no theta_0 for the hand-made rules: drop "
            f"{', '.join(tuned)}, or choose scratch"
        )
    for name in chosen:
        _check_options(config_for(config, name), name)


def _check_options(config: Config, method: str) -> None:
    """Refuse options of one method, of `experiments.few_shot.methods.config_for`."""
    _check_ranges(config)
    schedule = config.budget.schedule
    if schedule != "constant" and config.budget.minutes is not None:
        raise ValueError(f"--schedule {schedule} needs --episodes, not --minutes")
    if config.methods.query_norm == "all":
        raise ValueError(
            "--query-norm all goes with --evaluate RUN; train with one mode"
        )
    norms = config.methods.query_norm, config.methods.train_query_norm
    if norms[0] == "frozen" and norms[1] != "frozen":
        raise ValueError(
            "--query-norm frozen falls to chance unless meta-training uses the same "
            "averages: add --train-query-norm frozen"
        )
    train_way, tied = config.methods.train_way, config.learner.tied_head
    if train_way is not None and not tied and method in LEARNS_INIT:
        raise ValueError(
            f"--train-way {train_way}: the head of {method} has --way classes; add "
            "--tied-head"
        )


def _check_ranges(config: Config) -> None:
    at_least = {
        "way": 2, "shot": 1, "queries": 1, "train_queries": 1, "image_size": 8,
        "filters": 1, "blocks": 1, "steps": 1, "test_steps": 1, "support_batch": 1,
        "scratch_steps": 1, "finetune_steps": 1, "imagined": 1, "train_way": 2,
        "train_shots": 1, "pretrain_batch": 1, "train_batch": 1, "memory_slots": 4,
        "memory_hidden": 1, "hidden": 0, "meta_batch": 1, "clip": 0,
        "accumulate_tasks": 1, "steps_per_call": 1, "validate_every": 1,
        "validation_episodes": 2, "save_every": 1, "test_episodes": 2, "test_batch": 1,
        "episodes": 1, "seeds": 1, "seed": 0, "test_seed": 0,
    }  # fmt: skip
    above_zero = (
        "learning_rate", "inner_rate", "minutes", "adam_rate", "outer_step", "proximal",
    )  # fmt: skip
    for group in GROUPS:
        for name, value in vars(getattr(config, group)).items():
            flag = f"--{name.replace('_', '-')}"
            low = at_least.get(name)
            parts = value if isinstance(value, tuple) else (value,)
            if any(part != part for part in parts):  # NaN, below and above nothing
                raise ValueError(f"{flag} {value}: give a number")
            if low is not None and value is not None and value < low:
                raise ValueError(f"{flag} {value}: choose {low} or more")
            if name in above_zero and value is not None and not value > 0:
                raise ValueError(f"{flag} {value}: choose a number above 0")
    budget = config.budget
    chunk = budget.accumulate_tasks
    if chunk is not None and budget.meta_batch % chunk:
        raise ValueError(
            f"--accumulate-tasks {chunk} does not divide --meta-batch "
            f"{budget.meta_batch}: choose a divisor"
        )
    support, batch = config.data.way * config.data.shot, config.methods.support_batch
    if batch is not None and support % batch:
        raise ValueError(
            f"--support-batch {batch} does not divide the {support} images of a "
            "support set: choose a divisor"
        )


def as_flags(message: str) -> str:
    """Say the library's advice in flags: 'choose way <= 5' as 'choose --way <= 5'."""
    names = "|".join(sorted(_all_names(), key=len, reverse=True))
    message = re.sub(
        rf"\bwith ({names})=True\b",
        lambda m: f"with --{m[1].replace('_', '-')}",
        message,
    )
    return re.sub(
        rf"\b(choose|or) ({names})\b(?= *[<>=+])",
        lambda m: f"{m[1]} --{m[2].replace('_', '-')}",
        message,
    )


def _all_names() -> set[str]:
    config = Config()
    return {f.name for g in GROUPS for f in dataclasses.fields(getattr(config, g))}


_DESCRIPTION = (
    "Learn to learn from few examples: meta-train, meta-test, compare.\n\n"
    "Algorithms: all, or of "
    + "; ".join(f"{name} ({method.help})" for name, method in METHODS.items())
)
