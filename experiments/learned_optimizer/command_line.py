"""Read the command line of learned_optimizer; refuse what cannot work at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from experiments.common import cli
from experiments.common.cli import replace, split_names
from experiments.common.devices import MAY_CHANGE, Devices
from experiments.common.devices import check as check_devices
from experiments.common.dotted import import_object
from experiments.common.saved_options import (
    from_json,
    read_config,
    to_json,
    value_of,
    values_of,
)
from experiments.learned_optimizer.options import (
    BASELINES,
    FAMILIES,
    RULES,
    Config,
    Run,
    Test,
    named_rules,
    read_presets,
)

MODULE = "experiments.learned_optimizer"
STUDIES = {
    "comparison": "the rules and the tuned baselines on the problem of the flags",
    "generalisation": "the same on variants of it: width, depth, activation, horizon",
    "panels": "the figure of six problems of Andrychowicz et al.",
    "plateau": "whether rules escape where the gradient vanishes, and their gates",
    "cost": "time and memory of one update, against Adam's",
}
_SHIPPED = Path(__file__).parents[2] / "metalstm" / "rules" / "shipped"
_WITHOUT_BATCHES = ("plateau", "quadratics", "logistic")
_DESCRIPTION = (
    "Learn an optimizer, compare it with tuned hand-made ones.\n\nRules: "
    + "; ".join(f"{name} ({what})" for name, (what, _) in RULES.items())
    + "\n\nStudies: "
    + "; ".join(f"{name} ({what})" for name, what in STUDIES.items())
)


def parse(arguments: list[str]) -> Config:
    """Read the command line; a preset or a run gives the defaults.

    Raises:
      ValueError: an unknown preset, or options that cannot work together.
      FileNotFoundError: --resume or --evaluate names no run folder.
    """
    default = _default(arguments)
    config = _read(arguments, default)
    check(config)
    if config.run.evaluate is not None:
        _check_evaluation(config, default)
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
        module=MODULE,
        description=_DESCRIPTION,
        topics=("rule", "around", "test", "devices"),
    )
    return replace(config, rule=default.rule | config.rule)


def _default(arguments: list[str]) -> Config:
    preset, presets = value_of("--preset", arguments), read_presets()
    if preset is not None:
        cli.check_names("--preset", [preset], presets)
    for flag in ("--resume", "--evaluate"):
        folder = value_of(flag, arguments)
        if folder is None:
            continue
        if preset is not None:
            raise ValueError(f"{flag} takes its options from the run; drop --preset")
        saved = from_json(Config, read_config(Path(folder))["config"])
        run = Run(preset=saved.run.preset, seed=saved.run.seed)
        rules = named_rules() | saved.rule
        # it may resume elsewhere
        return replace(saved, run=run, rule=rules, devices=Devices())
    if preset is None:
        return Config()
    return _read(presets[preset], Config(), all_rules=True)


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


def rule_files(config: Config) -> dict[str, Path | None]:
    """What ``--rules`` names, with the FILE of a NAME=FILE."""
    pairs = (name.partition("=") for name in config.rules)
    return {name: _rule_file(path) if equals else None for name, equals, path in pairs}


def _rule_file(path: str) -> Path:
    """A file, or that of a rule of the package."""
    shipped = _SHIPPED / f"{path}.npz"
    return shipped if shipped.exists() and not Path(path).exists() else Path(path)


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
        call = budget.steps_per_call
        cli.check_multiple("--stages", int(steps), "--steps-per-call", call)
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
    _check_multiples(config)
    run, problem, budget = config.run, config.problem, config.budget
    if type(problem.family) is not type(FAMILIES[problem.name]):
        raise ValueError(
            f"config.json: --problem {problem.name} has options of another problem: "
            "put a copy of the file back, or start again"
        )
    if problem.scaling is not None:
        cli.check_range("--scaling", *problem.scaling)
    first, horizon = budget.first_horizon, config.training.horizon
    if first is not None and first > horizon:
        raise ValueError(f"--first-horizon {first}: choose up to {horizon}")
    staged = first is not None or budget.stages or budget.schedule == "cosine"
    if budget.minutes is not None and staged:
        raise ValueError(
            "--minutes: a curriculum and a cosine need --meta-steps to know their end"
        )
    stages(config)
    if run.resume is not None and run.workdir is not None:
        raise ValueError("--resume RUN resumes in that folder; drop --workdir")
    if run.evaluate is not None and run.resume is not None:
        raise ValueError("--evaluate and --resume: choose one")
    check_devices(config.devices)
    if run.evaluate is not None and config.devices.distributed:
        raise ValueError("--evaluate runs in one process: drop --distributed")


def _check_evaluation(config: Config, saved: Config) -> None:
    """Refuse flags that would change the meta-training, which is over."""
    if config.run.workdir is not None:
        raise ValueError("--evaluate writes into the run's folder; drop --workdir")
    groups = "rule", "around", "training", "budget", "run"
    pairs = [tuple(to_json(getattr(c, g)) for c in (config, saved)) for g in groups]
    own = {"evaluate", "quadratics_run", "debug"}
    for now, then in pairs:
        for name in now.keys() - own:
            if now[name] != then.get(name):
                raise ValueError(
                    f"--{name.replace('_', '-')}: --evaluate tests rules as they were "
                    "meta-trained; drop it"
                )


def _check_multiples(config: Config) -> None:
    budget, training, test = config.budget, config.training, config.test
    unroll = "--unroll-steps", training.unroll_steps
    call = "--steps-per-call", budget.steps_per_call
    for flag, value, of in (
        ("--horizon", training.horizon, unroll),
        ("--first-horizon", budget.first_horizon or 0, unroll),
        ("--meta-steps", budget.meta_steps, call),
        ("--validate-every", budget.validate_every, call),
        ("--save-every", budget.save_every, call),
        ("--steps", test.steps, ("--record-every", test.record_every)),
    ):
        cli.check_multiple(flag, value, *of)


def _check_names(config: Config) -> None:
    files, test, kind = rule_files(config), config.test, config.problem.name
    if not files:
        raise ValueError(f"--rules is empty: choose from {', '.join(RULES)}")
    names = [name.partition("=")[0] for name in config.rules]
    trained = {name: path for name, path in files.items() if path is not None}
    shipped = sorted(path.stem for path in _SHIPPED.glob("[!.]*.npz"))
    users = [name for name in names if ":" in name]
    for name in users:
        import_object("--rules", name)
    cli.check_names("--rules", names, [*RULES, *trained, *users])
    cli.check_names("--baselines", test.baselines, BASELINES)
    cli.check_names("--few-baselines", test.few_baselines, BASELINES)
    cli.check_names("--study", test.study, STUDIES)
    for name, path in trained.items():
        if name in BASELINES:
            raise ValueError(f"--rules {name}=FILE: a baseline has that name")
        if not path.exists():
            raise FileNotFoundError(
                f"--rules {name}={path}: there is no such file; a run writes its rules "
                f"to RUN/rules/NAME.npz, and the package has {', '.join(shipped)}"
            )
    if "panels" in test.study and kind != "mlp":
        raise ValueError(
            f"--study panels: the six panels are of an mlp, not {kind}; take a run of "
            "--preset mnist-mlp, and with --quadratics-run one on quadratics"
        )
    if "plateau" in test.study and kind not in _WITHOUT_BATCHES:
        raise ValueError(
            f"--study plateau draws gates without minibatches: choose --problem "
            f"{', '.join(_WITHOUT_BATCHES)}"
        )
