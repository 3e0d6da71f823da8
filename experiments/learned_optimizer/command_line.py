"""Read the command line of learned_optimizer; refuse what cannot work at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from experiments.common import cli
from experiments.common.cli import replace, split_names
from experiments.common.devices import MAY_CHANGE, Devices
from experiments.common.devices import check as check_devices
from experiments.common.saved_options import (
    from_json,
    read_config,
    value_of,
    values_of,
)
from experiments.learned_optimizer.options import (
    BASELINES,
    FAMILIES,
    MORE_BASELINES,
    Config,
    Run,
    Test,
)
from experiments.learned_optimizer.presets import PRESETS
from experiments.learned_optimizer.rule_options import RULES, named_rules

_WITHOUT_BATCHES = ("plateau", "quadratics", "logistic")
STUDIES = {
    "comparison": "the rules and the tuned baselines on the problem of the flags",
    "generalisation": "the same on variants of it: width, depth, activation, horizon",
    "panels": "the figure of six problems of Andrychowicz et al.",
    "plateau": "whether rules escape where the gradient vanishes, and their gates",
    "cost": "time and memory of one update, against Adam's",
}


def parse(arguments: list[str]) -> Config:
    """Read the command line; a preset or a run gives the defaults.

    Raises:
      ValueError: an unknown preset, or options that cannot work together.
      FileNotFoundError: --resume or --evaluate names no run folder.
    """
    config = _read(arguments, _default(arguments))
    check(config)
    return config


def _read(arguments: list[str], default: Config, all_rules: bool = False) -> Config:
    """``--problem`` and ``--rules`` come first: they decide which flags there are."""
    name = value_of("--problem", arguments)
    if name in FAMILIES and name != default.problem.name:
        problem = replace(default.problem, name=name, family=FAMILIES[name])
        default = replace(default, problem=problem)
    given = values_of("--rules", arguments)
    names = split_names(given) if given else default.rules
    shown = {n: r for n, r in default.rule.items() if all_rules or n in names}
    config = cli.parse(
        replace(default, rule=shown),
        arguments,
        module="experiments.learned_optimizer",
        description=_DESCRIPTION,
    )
    return replace(config, rule=default.rule | config.rule)


def _default(arguments: list[str]) -> Config:
    preset = value_of("--preset", arguments)
    if preset is not None:
        cli.check_names("--preset", [preset], PRESETS)
    for flag in ("--resume", "--evaluate"):
        folder = value_of(flag, arguments)
        if folder is None:
            continue
        if preset is not None:
            raise ValueError(f"{flag} takes its options from the run; drop --preset")
        saved = from_json(Config, read_config(Path(folder))["config"])
        run = Run(preset=saved.run.preset, seed=saved.run.seed)
        # it may resume elsewhere
        rules = named_rules() | saved.rule
        return replace(saved, run=run, rule=rules, devices=Devices())
    if preset is None:
        return Config()
    return _read(PRESETS[preset].split(), Config(), all_rules=True)


def other_flags(arguments: list[str]) -> list[str]:
    """Those of an evaluation that are neither the run nor the studies."""
    kept, skipped = [], False
    for word in arguments:
        if word.startswith("--"):
            skipped = word.split("=")[0] in ("--evaluate", "--study")
        kept += [] if skipped else [word]
    return kept


def may_change(config: Config) -> tuple[str, ...]:
    """What may differ when a run resumes: neither problem, nor rule, nor recipe."""
    names = [
        *(f"run.{name}" for name in Run.__struct_fields__ if name != "seed"),
        *(f"test.{name}" for name in Test.__struct_fields__ if name != "steps"),
        *MAY_CHANGE, "problem.data_dir", "budget.keep", "budget.minutes", "rules",
    ]  # fmt: skip
    fixed = config.budget.schedule == "cosine" or config.budget.first_horizon
    return (*names,) if fixed else (*names, "budget.meta_steps")


def trained_rules(config: Config) -> dict[str, Path]:
    """The NAME=FILE among ``--rules``."""
    pairs = (name.split("=", 1) for name in config.rules if "=" in name)
    return {name: Path(path) for name, path in pairs}


def rule_names(config: Config) -> list[str]:
    return [name.split("=", 1)[0] for name in config.rules]


class Stage(NamedTuple):
    """A part of meta-training with one program."""

    unroll_steps: int
    horizon: int
    start: int  # meta-steps done when it begins
    end: int  # and when it ends


def stages(config: Config) -> list[Stage]:
    """Read ``--stages``; the last one is what the other flags say.

    Raises:
      ValueError: a stage is not UNROLL:META_STEPS, or they fill --meta-steps.
    """
    budget, training = config.budget, config.training
    found: list[Stage] = []
    end = 0
    for text in budget.stages:
        unroll, _, steps = text.partition(":")
        if not (unroll.isdecimal() and steps.isdecimal() and int(unroll) > 0):
            raise ValueError(f"--stages {text}: give UNROLL:META_STEPS, such as 20:500")
        if int(steps) % budget.steps_per_call:
            raise ValueError(
                f"--stages {text}: the meta-steps are not a multiple of "
                f"--steps-per-call {budget.steps_per_call}"
            )
        start, end = end, end + int(steps)
        found.append(Stage(int(unroll), int(unroll), start, end))
    if found and end >= budget.meta_steps:
        raise ValueError(
            f"--stages take {end} meta-steps and leave none of --meta-steps "
            f"{budget.meta_steps}: choose more than {end}"
        )
    last = training.unroll_steps, training.horizon, end, budget.meta_steps
    return [*found, Stage(*last)]


def check(config: Config) -> None:
    """Refuse what cannot work, whatever the data are.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    cli.check(config)
    _check_names(config)
    _check_training(config)
    if type(config.problem.family) is not type(FAMILIES[config.problem.name]):
        raise ValueError(
            f"config.json: --problem {config.problem.name} has options of another "
            "problem: put a copy of the file back, or start again"
        )
    run, test = config.run, config.test
    if test.steps % test.record_every:
        raise ValueError(
            f"--record-every {test.record_every} does not divide --steps "
            f"{test.steps}: choose a divisor"
        )
    if run.resume is not None and run.workdir is not None:
        raise ValueError("--resume RUN resumes in that folder; drop --workdir")
    if run.evaluate is not None and run.resume is not None:
        raise ValueError("--evaluate and --resume: choose one")
    check_devices(config.devices)
    if run.evaluate is not None and config.devices.distributed:
        raise ValueError("--evaluate runs in one process: drop --distributed")


def _check_training(config: Config) -> None:
    budget, unroll = config.budget, config.training.unroll_steps
    horizon, first = config.training.horizon, budget.first_horizon
    if horizon % unroll:
        raise ValueError(
            f"--horizon {horizon} is not a multiple of --unroll-steps {unroll}: choose "
            f"{horizon // unroll + 1} x {unroll}, say"
        )
    if first is not None and (first % unroll or first > horizon):
        raise ValueError(
            f"--first-horizon {first}: choose a multiple of --unroll-steps {unroll} up "
            f"to --horizon {horizon}"
        )
    stages(config)
    staged = first is not None or budget.stages or budget.schedule == "cosine"
    if budget.minutes is not None and staged:
        raise ValueError(
            "--minutes: a curriculum and a cosine need --meta-steps to know their end"
        )
    for name in ("meta_steps", "validate_every", "save_every"):
        value = getattr(budget, name)
        if value % budget.steps_per_call:
            raise ValueError(
                f"--{name.replace('_', '-')} {value} is not a multiple of "
                f"--steps-per-call {budget.steps_per_call}"
            )
    low_high = config.problem.scaling
    if low_high is not None and low_high[0] > low_high[1]:
        raise ValueError(
            f"--scaling {low_high[0]} {low_high[1]}: choose 0 < low <= high"
        )


def _check_names(config: Config) -> None:
    names, files = rule_names(config), trained_rules(config)
    baselines = BASELINES + MORE_BASELINES
    if not names:
        raise ValueError(f"--rules is empty: choose from {', '.join(RULES)}")
    cli.check_names("--rules", names, [*RULES, *files])
    cli.check_names("--baselines", config.test.baselines, baselines)
    cli.check_names("--few-baselines", config.test.few_baselines, baselines)
    cli.check_names("--study", config.test.study, STUDIES)
    for name, path in files.items():
        if name in baselines:
            raise ValueError(f"--rules {name}=FILE: a baseline has that name")
        if not path.exists():
            raise FileNotFoundError(
                f"--rules {name}={path}: there is no such file; a run writes its rules "
                "to RUN/rules/NAME.npz"
            )
    kind, study = config.problem.name, config.test.study
    if "panels" in study and kind != "mlp":
        raise ValueError(
            f"--study panels: the six panels are of an mlp, not {kind}; take a run of "
            "--preset mnist-mlp, and with --quadratics-run one on quadratics"
        )
    if "plateau" in study and kind not in _WITHOUT_BATCHES:
        raise ValueError(
            f"--study plateau draws gates without minibatches: choose --problem "
            f"{', '.join(_WITHOUT_BATCHES)}"
        )


_DESCRIPTION = (
    "Learn an optimizer, compare it with tuned hand-made ones.\n\nRules: "
    + "; ".join(f"{name} ({what})" for name, what in RULES.items())
    + "\n\nStudies: "
    + "; ".join(f"{name} ({what})" for name, what in STUDIES.items())
)
