"""The methods: names, families, defaults, and the specs that options make.

A method is added by its factory in `metalstm.algorithms`, its name in
`metalstm.specs`, a class of options in `experiments.few_shot.adapting` or `embedding`,
and one row of methods.toml. No jax here: the command line reads the table for its
--help.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.cli import Flat
from experiments.common.saved_options import from_json, read_config
from experiments.few_shot import adapting, embedding
from experiments.few_shot.arguments import Arguments, Given, Spec, head_of
from experiments.few_shot.options import (
    LEARNERS,
    Common,
    Conv4,
    Data,
    Options,
    Training,
)

GRADIENT, HAND_MADE, METRIC = "gradient-based", "hand-made rule", "metric-based"


class Method(NamedTuple):
    family: str
    about: str
    default: Arguments
    rates: tuple[float, ...]

    @property
    def learns_init(self) -> bool:
        """Whether hand-made rules can start from its theta_0."""
        return self.family == GRADIENT


def _read_methods() -> dict[str, Method]:
    families = tomllib.loads(Path(__file__).with_name("methods.toml").read_text())
    methods, classes = {}, vars(adapting) | vars(embedding)
    for family, rows in families.items():
        for name, row in rows.items():
            default = classes[row["options"]](**row.get("with", {}))
            rates = tuple(row.get("rates", ()))
            methods[name] = Method(family, row["about"], default, rates)
    return methods


METHODS = _read_methods()
LEARNS_INIT = tuple(name for name, method in METHODS.items() if method.learns_init)


def init_source(methods: Sequence[str]) -> str | None:
    """The method whose learned theta_0 the hand-made rules start from."""
    return next((name for name in methods if METHODS[name].learns_init), None)


@functools.cache
def kind_of(method: str, learner: str) -> type:
    """The dataclass of all options of a method, for a network by name."""
    parts: dict[str, Any] = {
        "method": METHODS[method].default,
        "learner": LEARNERS[learner](),
        "training": Training(),
    }
    name = "".join(type(parts[part]).__name__ for part in ("method", "learner"))
    fields = [
        (part, Flat[type(default)], field(default=default))  # type: ignore[misc]
        for part, default in parts.items()
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True)


def options_of(folder: Path) -> Options:
    """The options of a run folder.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: its config.json is damaged.
    """
    saved, path = read_config(folder)["config"], str(folder / "config.json")
    common = from_json(Common, saved, path)
    methods: dict[str, Any] = {}
    try:
        for name, own in saved["methods"].items():
            methods[name] = from_json(
                kind_of(name, own["learner"]["learner"]), own, path
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no methods that exist ({type(error).__name__}: {error}): "
            "put a copy of the file back, or start again"
        ) from None
    return Options(common.data, common.test, common.run, common.devices, methods)


# -- specs -----------------------------------------------------------------------------


def spec_of(options: Any, data: Data, num_classes: int = 2) -> Spec:
    """What `metalstm.specs.build_algorithm` builds a method from.

    Args:
      options: of `kind_of`.
      num_classes: of the meta-train split, which transfer methods pre-train on.
    """
    own, learner = options.method, options.learner
    turns = 4 if options.training.rotations else 1  # turned characters are classes
    shots = options.training.train_shots
    given = Given(data.way, learner, turns * num_classes, shots)
    spec: Spec = {"algorithm": own.constructor}
    if isinstance(own, embedding.NearestNeighbour):
        return spec
    if not isinstance(own, adapting.GradientAgreement):
        spec |= head_of(given, features=own.features)
    if isinstance(own, embedding.Relation) and isinstance(learner, Conv4):
        # feature maps, halved twice as published
        maps = {"feature_maps": True, "num_halvings": min(2, learner.num_blocks)}
        spec["learner"] |= maps
    return spec | own.arguments(given)


def specs_of(options: Options, num_classes: int = 2) -> dict[str, Spec]:
    methods = options.methods.items()
    return {name: spec_of(own, options.data, num_classes) for name, own in methods}


class Pretraining(NamedTuple):
    """What several transfer methods share."""

    spec: Spec
    options: Any


def pretrainings(
    options: Options, specs: Mapping[str, Spec]
) -> tuple[dict[str, Pretraining], dict[str, str]]:
    """The classifiers to pre-train, by name, and which of them each method uses.

    Methods share one if they agree on the classifier, its data and its budget. It is
    validated by the comparison that costs least.
    """
    wanted: dict[str, Pretraining] = {}
    used: dict[str, str] = {}
    for name, spec in specs.items():
        if spec["algorithm"] not in ("fine_tuning", "pretrained_features"):
            continue
        own, kind = options.methods[name], spec["classifier"]
        shared = embedding.PretrainedFeatures(
            own.method.batch_size, "cosine" if kind == "cosine" else "centroid", kind
        )
        own = kind_of("feature-centroid", own.learner.learner)(
            shared, own.learner, own.training
        )
        spec = {n: spec[n] for n in ("learner", "num_classes")}
        spec |= {"algorithm": "pretrained_features", **vars(shared)}
        mine = Pretraining(spec, own)
        number, called = 1, f"pretrained-{kind}"
        while called in wanted and wanted[called] != mine:
            number += 1
            called = f"pretrained-{kind}-{number}"
        wanted.setdefault(called, mine)
        used[name] = called
    return wanted, used
