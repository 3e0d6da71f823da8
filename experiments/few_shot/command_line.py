"""Read the command line of few_shot; refuse what cannot work before anything runs.

A flag without a prefix is the run's (``--way``), or holds for every chosen method that
has the option (``--num-steps``); ``--maml.num-steps`` is of one method. Each method's
flags are parsed by themselves, with its preset as the parser's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from experiments.common import cli, devices
from experiments.common.cli import replace
from experiments.common.saved_options import (
    did_you_mean,
    flag,
    flags_of,
    split_commas,
    with_settings,
)
from experiments.few_shot.checks import check
from experiments.few_shot.methods import (
    HAND_MADE,
    LEARNERS,
    METHODS,
    init_source,
    kind_of,
    of_one_method,
    options_of,
)
from experiments.few_shot.options import (
    Common,
    Data,
    Options,
    Retest,
    Run,
    Test,
    Training,
    with_methods,
)
from experiments.few_shot.presets import Preset, preset

MODULE = "experiments.few_shot"
Parsed = TypeVar("Parsed", bound=msgspec.Struct)


class Flag(NamedTuple):
    """One flag of the command line with its values, as they were typed."""

    method: str | None  # the prefix
    name: str
    words: tuple[str, ...]  # for the parser, the prefix dropped

    @property
    def dashed(self) -> str:
        return self.name.replace("_", "-")

    def __str__(self) -> str:
        prefix = "" if self.method is None else f"{self.method}."
        return f"--{prefix}{self.dashed}"


def parse(line: Sequence[str]) -> Options:
    """Read the command line; a preset or a saved run gives the defaults.

    With --evaluate the methods are those of all the runs, or those of --algorithms.

    Raises:
      ValueError: an unknown flag or preset, a value of another type, or options that
        cannot work together.
      FileNotFoundError: --resume or --evaluate names no run folder.
      SystemExit: after --help.
    """
    _help(line)
    flags = _flags(line)
    if any(f.method is None and f.name == "evaluate" for f in flags):
        return _parse_evaluation(flags)
    if _value("query_norm", flags) == "all":
        raise ValueError("--query-norm all goes with --evaluate RUN; choose one mode")
    named, resumed = _value("preset", flags), _value("resume", flags)
    recipe = Preset() if named is None else preset(named)
    default: Common = with_settings(Common(), recipe.shared)
    saved: dict[str, Any] = {}
    if resumed is not None:
        if named is not None:
            raise ValueError("--resume takes its options from the run; drop --preset")
        before = options_of(Path(resumed))
        saved = before.methods
        # it may be resumed elsewhere
        run = replace(before.run, resume=None, workdir=None)
        default = Common(before.data, before.test, run)
    common, of_methods = _common(default, flags)
    names = common.run.algorithms
    methods = {n: _method(n, names, of_methods, recipe, saved.get(n)) for n in names}
    _refuse_unknown(of_methods, methods)
    options = with_methods(common, methods)
    check(options)
    return options


def _parse_evaluation(flags: Sequence[Flag]) -> Options:
    """The first run's options, and what is new; the methods of all runs."""
    for other in ("preset", "resume"):
        if _value(other, flags) is not None:
            raise ValueError(
                f"--evaluate takes its options from the run; drop --{other}"
            )
    folders = next(f for f in flags if f.name == "evaluate").words[1:]
    if not folders:
        raise ValueError("--evaluate is empty: give a run folder")
    runs = [options_of(Path(folder)) for folder in folders]
    methods = {n: own for run in reversed(runs) for n, own in run.methods.items()}
    in_runs = tuple(dict.fromkeys(n for run in runs for n in run.methods))
    first = Run(algorithms=in_runs, seed=runs[0].run.seed)
    common, rest = _common(Common(runs[0].data, runs[0].test, first), flags)
    for given in flags:
        if given.name in ("seed", "seeds", "tensorboard"):
            remedy = "--test-seed draws other episodes" if given.name == "seed" else ""
            raise ValueError(
                f"{given}: --evaluate tests runs that are finished; drop it"
                + f" ({remedy})" * bool(remedy)
            )
    if common.run.algorithms != tuple(METHODS):  # not all
        cli.check_names("--algorithms", common.run.algorithms, in_runs)
    retest = flags_of(Retest)
    for given in rest:
        if given.method is not None or given.name not in retest:
            raise ValueError(
                f"{given}: --evaluate tests methods as they were trained; drop it, or "
                f"choose of {', '.join(sorted(map(flag, retest)))}"
            )
    chosen = {n: methods[n] for n in common.run.algorithms if n in methods}
    devices.check(common.devices)
    return with_methods(common, chosen, _parsed(Retest(), rest))


# -- flags -----------------------------------------------------------------------------


def _flags(line: Sequence[str]) -> list[Flag]:
    found: list[Flag] = []
    for word in line:
        if not word.startswith("--"):
            if not found:
                raise ValueError(f"{word}: options begin with --, such as --way 5")
            found[-1] = found[-1]._replace(words=(*found[-1].words, word))
            continue
        name, equals, value = word[2:].partition("=")
        method, dot, own = name.partition(".")
        if dot and method not in METHODS:
            raise ValueError(f"--{name}: {did_you_mean(method, METHODS)}")
        name = (own if dot else name).replace("_", "-")
        words = (f"--{name}", *([value] if equals else []))
        plain = name.removeprefix("no-").replace("-", "_")
        found.append(Flag(method if dot else None, plain, words))
    return found


def _value(name: str, flags: Sequence[Flag]) -> str | None:
    """The value of a flag of the run that is not parsed yet."""
    said = [f.words[1:] for f in flags if f.method is None and f.name == name]
    return said[-1][0] if said and said[-1] else None


def _common(default: Common, flags: Sequence[Flag]) -> tuple[Common, list[Flag]]:
    """The options that all methods share, and the flags that are left."""
    known = flags_of(Common)
    mine = [f for f in flags if f.method is None and f.name in known]
    common = _parsed(default, mine)
    names = split_commas(common.run.algorithms)
    if not names:
        raise ValueError(f"--algorithms is empty: choose from {', '.join(METHODS)}")
    names = tuple(METHODS) if "all" in names else names
    cli.check_names("--algorithms", names, METHODS)
    run = replace(common.run, algorithms=names)
    return replace(common, run=run), [f for f in flags if f not in mine]


def _method(
    name: str,
    names: Sequence[str],
    flags: Sequence[Flag],
    recipe: Preset,
    saved: Any,
) -> Any:
    """The options of a method: preset, then flags for all, then its own.

    A hand-made rule adapts the learner of the method whose theta_0 it starts from, in
    the same inner loop.
    """
    family, sources = METHODS[name].family, [name]
    source = init_source(names)
    if family == HAND_MADE and source is not None:
        sources = [source, name]
    given = [f for f in flags if f.method is None]
    given += [f for one in sources for f in flags if f.method == one]
    of_each = recipe.of(sources[0], METHODS[sources[0]].family)
    if len(sources) == 2:
        of_learner = set().union(*map(flags_of, LEARNERS.values()))
        for f in given:
            if f.method == name and f.name in of_learner | {"learner"}:
                raise ValueError(f"{f}: {name} adapts the network of {source}; drop it")
        own = recipe.of(name, family).items()
        of_each |= {n: value for n, value in own if n not in of_learner}
    networks = [f.words[-1] for f in given if f.name == "learner"]
    kept = saved and saved.learner.learner
    preset = of_each.get("learner", recipe.shared.get("learner", "conv4"))
    learner = networks[-1] if networks else kept or preset
    if ":" not in learner and learner not in LEARNERS:
        raise ValueError(
            f"--learner {learner}: choose {', '.join(LEARNERS)}, or MODULE:NAME of "
            "your own network"
        )
    options = saved
    if kept != learner:
        options = kind_of(name, learner)()
        of_one = of_one_method(options.method)
        options = with_settings(options, recipe.shared, of_one)
        options = with_settings(options, of_each | {"learner": learner})
    known = flags_of(type(options))
    shared = known - of_one_method(options.method)
    options = _parsed(options, [f for f in given if not f.method and f.name in shared])
    mine = [f for f in given if f.method and f.name in known]
    return _parsed(options, mine, f"--{name}.")


def _parsed(default: Parsed, flags: Sequence[Flag], prefix: str = "--") -> Parsed:
    if not flags:
        return default
    words = [word for f in flags for word in f.words]
    return cli.parse(default, words, module=MODULE, description=None, prefix=prefix)


def _refuse_unknown(flags: Sequence[Flag], methods: Mapping[str, Any]) -> None:
    known = {name: flags_of(type(own)) for name, own in methods.items()}
    chosen = ", ".join(methods)
    for given in flags:
        if given.method is not None:
            if given.method not in methods:
                raise ValueError(
                    f"{given}: --algorithms has {chosen}; add {given.method}"
                )
            if given.name not in known[given.method]:
                hint = did_you_mean(given.dashed, _dashed(known[given.method]))
                raise ValueError(f"{given}: {hint}")
            continue
        having = [name for name in methods if given.name in known[name]]
        if any(given.name not in of_one_method(methods[n].method) for n in having):
            continue
        if having:
            one = given._replace(method=having[0])
            raise ValueError(f"{given}: say of which method, such as {one}")
        kinds = [kind_of(name, learner) for name in METHODS for learner in LEARNERS]
        exist = _dashed(set().union(*map(flags_of, (Common, Retest, *kinds))))
        if given.dashed not in exist:
            close = did_you_mean(given.dashed, exist).split("Choose")[0]
            raise ValueError(f"{given}: {close}See --help, or --help METHOD")
        raise ValueError(
            f"{given}: none of the chosen methods ({chosen}) has it; drop it"
        )


def _dashed(names: set[str]) -> list[str]:
    return sorted(name.replace("_", "-") for name in names)


# -- help ------------------------------------------------------------------------------


class _Help(cli.Options, frozen=True):
    run: cli.Flat[Run] = Run()
    data: cli.Flat[Data] = Data()
    training: cli.Flat[Training] = Training()
    test: cli.Flat[Test] = Test()


def _help(line: Sequence[str]) -> None:
    """Print and exit, when --help is asked for.

    Raises:
      ValueError: help about something that is not there.
    """
    asked = [i for i, word in enumerate(line) if word in ("--help", "-h")]
    if not asked:
        return
    topic = next(iter(line[asked[0] + 1 :]), "")
    shown: Any = {"": _Help(), "devices": devices.Devices()}
    shown |= {name: network() for name, network in LEARNERS.items()}
    about = _ABOUT
    if topic in METHODS:
        named = _value("preset", _flags(line[: asked[0]]))
        recipe = Preset() if named is None else preset(named)
        own = _method(topic, [topic], (), recipe, None)
        fields = [
            (name, cli.Flat[type(part)], part)  # type: ignore[misc]
            for name, part in (("method", own.method), ("learner", own.learner))
        ]
        shown[topic] = msgspec.defstruct("Flags", fields, frozen=True)()
        about = (
            f"{topic}: {METHODS[topic].about}.\n\nWritten so, a flag holds for every "
            f"method that has it; --{topic}.FLAG is for this one alone."
        )
    elif topic.startswith("-"):
        topic = ""
    elif topic not in shown:
        raise ValueError(f"--help {topic}: {did_you_mean(topic, [*METHODS, *shown])}")
    elif topic:
        about = type(shown[topic]).__doc__ or ""
    cli.parse(shown[topic], ["--help"], module=MODULE, description=about)


_ABOUT = (
    "Learn to learn from few examples: meta-train, meta-test, compare.\n\n"
    "--help METHOD has a method's own flags, --help conv4 (mlp, resnet12) a\n"
    "network's, --help devices those of several devices or hosts.\n\nMethods:\n"
    + "\n".join(f"  {name:20} {method.about}" for name, method in METHODS.items())
)
