"""Read the command line of few_shot; refuse what cannot work before anything runs.

A flag without a prefix is the run's (``--way``), or holds for every chosen method that
has the option (``--num-steps``); ``--maml.num-steps`` is of one method. Each method's
flags are parsed by themselves, with its preset as the parser's defaults.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments.common import cli, devices
from experiments.common.saved_options import (
    did_you_mean,
    flag,
    flags_of,
    split_commas,
    with_settings,
)
from experiments.few_shot.methods import (
    HAND_MADE,
    LEARNS_INIT,
    METHODS,
    init_source,
    kind_of,
    options_of,
)
from experiments.few_shot.options import (
    LEARNERS,
    Common,
    Data,
    Options,
    Retest,
    Run,
    Test,
    Training,
)
from experiments.few_shot.presets import Preset, preset

MODULE = "experiments.few_shot"
Parsed = TypeVar("Parsed")


class Flag(NamedTuple):
    """One flag of the command line with its values, as they were typed."""

    method: str | None  # the prefix
    name: str
    words: tuple[str, ...]  # for the parser, the prefix dropped


def parse(line: Sequence[str]) -> Options:
    """Read the command line of a run; a preset or a saved run gives the defaults.

    Raises:
      ValueError: an unknown flag or preset, or options that cannot work together.
      FileNotFoundError: --resume names no run folder.
      SystemExit: after --help, or for a value of another type.
    """
    _help(line)
    flags = _flags(line)
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
        run = dataclasses.replace(before.run, resume=None, workdir=None)
        default = Common(before.data, before.test, run)
    common, of_methods = _common(default, flags)
    names = _chosen(common.run.algorithms)
    methods = {n: _method(n, names, of_methods, recipe, saved.get(n)) for n in names}
    _refuse_unknown(of_methods, methods)
    run = dataclasses.replace(common.run, algorithms=names)
    options = Options(common.data, common.test, run, common.devices, methods)
    check(options)
    return options


def parse_evaluation(line: Sequence[str]) -> tuple[Options, Retest]:
    """Read a command line with --evaluate: the first run's options, and what is new.

    The options have the methods of all runs, or those of --algorithms.

    Raises:
      ValueError, FileNotFoundError, SystemExit: as `parse`.
    """
    flags = _flags(line)
    for other in ("preset", "resume"):
        if _value(other, flags) is not None:
            said = flag(other)
            raise ValueError(f"--evaluate takes its options from the run; drop {said}")
    folders = next(f for f in flags if f.name == "evaluate").words[1:]
    if not folders:
        raise ValueError("--evaluate is empty: give a run folder")
    runs = [options_of(Path(folder)) for folder in folders]
    methods = {n: own for run in reversed(runs) for n, own in run.methods.items()}
    in_runs = tuple(dict.fromkeys(n for run in runs for n in run.methods))
    first = dataclasses.replace(Run(), algorithms=in_runs, seed=runs[0].run.seed)
    common, rest = _common(Common(runs[0].data, runs[0].test, first), flags)
    retest = flags_of(Retest)
    for given in rest:
        if given.method is not None or given.name not in retest:
            raise ValueError(
                f"{flag(given.name)}: --evaluate tests methods as they were trained; "
                f"drop it, or choose of {', '.join(sorted(map(flag, retest)))}"
            )
    names = _chosen(common.run.algorithms)
    run = dataclasses.replace(common.run, algorithms=names)
    chosen = {name: methods[name] for name in names if name in methods}
    options = Options(common.data, common.test, run, common.devices, chosen)
    devices.check(options.devices)
    return options, _parsed(Retest(), rest)


# -- flags -----------------------------------------------------------------------------


def _flags(line: Sequence[str]) -> list[Flag]:
    found: list[Flag] = []
    for word in line:
        if not word.startswith("--"):
            if not found:
                raise ValueError(f"{word}: options begin with --, such as --way 5")
            last = found[-1]
            found[-1] = last._replace(words=(*last.words, word))
            continue
        name, equals, value = word[2:].partition("=")
        method, dot, own = name.partition(".")
        if dot and method not in METHODS:
            raise ValueError(f"--{name}: {did_you_mean(method, METHODS)}")
        name = (own if dot else name).replace("_", "-")
        words = (f"--{name}", *([value] if equals else []))
        plain = name.removeprefix("no-") if name not in _dashed() else name
        found.append(Flag(method if dot else None, plain.replace("-", "_"), words))
    return found


@functools.cache
def _dashed() -> frozenset[str]:
    """All flags, without their dashes in front."""
    kinds = [kind_of(name, learner) for name in METHODS for learner in LEARNERS]
    names = set().union(*map(flags_of, [Common, Retest, *kinds]))
    return frozenset(name.replace("_", "-") for name in names)


def _value(name: str, flags: Sequence[Flag]) -> str | None:
    """The value of a flag of the run that is not parsed yet."""
    said = [f.words[1:] for f in flags if f.method is None and f.name == name]
    return said[-1][0] if said and said[-1] else None


def _common(default: Common, flags: Sequence[Flag]) -> tuple[Common, list[Flag]]:
    """The options that all methods share, and the flags that are left."""
    known = flags_of(Common)
    mine = [f for f in flags if f.method is None and f.name in known]
    return _parsed(default, mine), [f for f in flags if f not in mine]


def _method(
    name: str,
    names: Sequence[str],
    flags: Sequence[Flag],
    recipe: Preset,
    default: Any,
) -> Any:
    """The options of a method: preset, then flags for all, then its own.

    A hand-made rule adapts the learner of the method whose theta_0 it starts from, in
    the same inner loop.
    """
    source, settings = init_source(names), [recipe.shared, recipe.of(name)]
    sources = [name]
    if METHODS[name].family == HAND_MADE and source is not None:
        of_learner = flags_of(LEARNERS["conv4"]) | flags_of(LEARNERS["mlp"])
        rest = {n: v for n, v in recipe.of(name).items() if n not in of_learner}
        settings = [recipe.shared, recipe.of(source), rest]
        sources = [source, name]
    given = [f for f in flags if f.method is None]
    given += [f for one in sources for f in flags if f.method == one]
    learner = _learner(settings, given, default)
    if learner not in LEARNERS:
        raise ValueError(f"--learner {learner}: choose {', '.join(LEARNERS)}")
    if default is None or default.learner.learner != learner:
        default = kind_of(name, learner)()
        for layer in settings:
            skip = default.method.own_only if layer is recipe.shared else ()
            default = with_settings(default, layer, skip)
        default = with_settings(default, {"learner": learner})
    known = flags_of(type(default))
    shared = known - set(default.method.own_only)
    mine = [f for f in given if f.name in (shared if f.method is None else known)]
    return _parsed(default, mine, of=name)


def _learner(
    settings: Sequence[Mapping[str, Any]], flags: Sequence[Flag], default: Any
) -> str:
    """The network that the last to speak names."""
    said = [f.words[-1] for f in flags if f.name == "learner"]
    kept = [default.learner.learner] if default is not None else []
    preset = [layer["learner"] for layer in settings if "learner" in layer]
    return next(iter([*said[::-1], *kept, *preset[::-1]]), "conv4")


def _parsed(default: Parsed, flags: Sequence[Flag], of: str | None = None) -> Parsed:
    module = MODULE if of is None else f"{MODULE} ({of})"
    words = [word for f in flags for word in f.words]
    return cli.parse(default, words, module=module, description=None)


def _chosen(names: Sequence[str]) -> tuple[str, ...]:
    names = split_commas(names)
    if "all" in names:
        return tuple(METHODS)
    if not names:
        raise ValueError(f"--algorithms is empty: choose from {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--algorithms {name}: {did_you_mean(name, METHODS)}")
        if names.count(name) > 1:
            raise ValueError(f"--algorithms names {name} twice: drop one")
    return names


def _refuse_unknown(flags: Sequence[Flag], methods: Mapping[str, Any]) -> None:
    known = {name: flags_of(type(own)) for name, own in methods.items()}
    chosen = ", ".join(methods)
    for given in flags:
        said = flag(given.name)
        if given.method is not None:
            if given.method not in methods:
                where = f"--{given.method}.{said[2:]}"
                raise ValueError(
                    f"{where}: --algorithms has {chosen}; add {given.method}"
                )
            if given.name not in known[given.method]:
                hint = did_you_mean(said[2:], _names(known[given.method]))
                raise ValueError(f"--{given.method}.{said[2:]}: {hint}")
            continue
        having = [name for name in methods if given.name in known[name]]
        if any(given.name not in methods[n].method.own_only for n in having):
            continue
        if having:
            each = f"--{having[0]}.{said[2:]}"
            raise ValueError(f"{said}: say of which method, such as {each}")
        if said[2:] not in _dashed():
            close = did_you_mean(said[2:], sorted(_dashed())).split("Choose")[0]
            raise ValueError(f"{said}: {close}See --help, or --help METHOD")
        raise ValueError(
            f"{said}: none of the chosen methods ({chosen}) has it; drop it"
        )


def _names(names: set[str]) -> list[str]:
    return sorted(name.replace("_", "-") for name in names)


# -- what cannot work ------------------------------------------------------------------


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
    for own in options.methods.values():
        _check_method(own, options.data)


def _check_method(options: Any, data: Data) -> None:
    training, own = options.training, options.method
    if training.schedule != "constant" and training.minutes is not None:
        raise ValueError(
            f"--schedule {training.schedule} needs --episodes, not --minutes"
        )
    chunk = training.accumulate_tasks
    if chunk is not None and training.meta_batch % chunk:
        raise ValueError(
            f"--accumulate-tasks {chunk} does not divide --meta-batch "
            f"{training.meta_batch}: choose a divisor"
        )
    norms = getattr(own, "query_norm", None), getattr(own, "train_query_norm", None)
    if norms[0] == "frozen" and norms[1] not in ("frozen", None):
        raise ValueError(
            "--query-norm frozen falls to chance unless meta-training uses the same "
            "averages: add --train-query-norm frozen"
        )
    last = getattr(own, "last", None)
    if last is not None and getattr(own, "order", "second") == "first":
        raise ValueError(f"--last {last} needs --order second: add it")
    batch, support = getattr(own, "batch_size", None), data.way * data.shot
    if batch is not None and hasattr(own, "num_test_steps") and support % batch:
        raise ValueError(
            f"--batch-size {batch} does not divide the {support} images of a support "
            "set: choose a divisor"
        )


# -- help ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Help:
    run: cli.Flat[Run]
    data: cli.Flat[Data]
    training: cli.Flat[Training]
    test: cli.Flat[Test]


def _help(line: Sequence[str]) -> None:
    """Print and exit, when --help is asked for.

    Raises:
      ValueError: help about something that is not there.
    """
    asked = [i for i, word in enumerate(line) if word in ("--help", "-h")]
    if not asked:
        return
    topic = next(iter(line[asked[0] + 1 :]), "")
    shown: Any
    if topic in METHODS:
        named = _value("preset", _flags(line[: asked[0]]))
        recipe = Preset() if named is None else preset(named)
        all_of_it = _method(topic, [topic], (), recipe, None)
        fields = [(n, cli.Flat[type(getattr(all_of_it, n))]) for n in _OWN]  # type: ignore[misc]
        kind = dataclasses.make_dataclass("Flags", fields, frozen=True)
        shown = kind(*(getattr(all_of_it, name) for name in _OWN))
        about = (
            f"{topic}: {METHODS[topic].about}.\n\nWritten so, a flag holds for every "
            f"method that has it; --{topic}.FLAG is for this one alone."
        )
    elif topic in LEARNERS:
        shown, about = LEARNERS[topic](), "The network that is adapted."
    elif topic == "devices":
        shown, about = devices.Devices(), "Where to compute."
    elif not topic or topic.startswith("-"):
        shown, about = _Help(Run(), Data(), Training(), Test()), _ABOUT
    else:
        known = [*METHODS, *LEARNERS, "devices"]
        raise ValueError(f"--help {topic}: {did_you_mean(topic, known)}")
    cli.parse(shown, ["--help"], module=MODULE, description=about)


_OWN = ("method", "learner")  # what the help of a method shows
_ABOUT = (
    "Learn to learn from few examples: meta-train, meta-test, compare.\n\n"
    "--help METHOD has a method's own flags, --help conv4 (mlp, resnet12) a\n"
    "network's, --help devices those of several devices or hosts.\n\nMethods:\n"
    + "\n".join(f"  {name:20} {method.about}" for name, method in METHODS.items())
)
