"""The problem that the flags name, its data, and its variants."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from experiments.common.cli import replace
from experiments.common.saved_options import to_json
from experiments.learned_optimizer.options import Problem
from metalstm.data.sources.labelled import load_image_data
from metalstm.learned_optimizers import problems, with_random_scaling
from metalstm.learned_optimizers.problems import ProblemFamily
from metalstm.tasks import TaskMapping

NEED_NO_DATA = ("quadratics", "logistic", "plateau", "sinusoids")


class Source(NamedTuple):
    training: ProblemFamily  # with random scaling, when asked for
    test: ProblemFamily
    training_data: Any  # resized, when asked for
    data: Any  # arrays, () when the family needs none
    about: dict[str, Any]  # for config.json: name, sizes, checksum

    @property
    def task_mapping(self) -> TaskMapping | None:
        """Small problems all at the same time; networks one by one, to fit a cache."""
        return "vmap" if self.about["name"] in NEED_NO_DATA else None


def load_source(problem: Problem) -> Source:
    """Build the family and load its data.

    Raises:
      ValueError, FileNotFoundError: name the remedy.
    """
    about: dict[str, Any] = {"name": problem.name}
    data: Any = ()
    smaller: Any = ()
    if problem.name not in NEED_NO_DATA:
        images = load_image_data(problem.dataset, problem.data_dir)
        # losses are those of training, as in the paper
        data = smaller = images.train
        about |= {"dataset": images.name, "images": len(data.y)}
        about |= {"classes": images.num_classes, "checksum": images.checksum}
        if (size := problem.train_image_size) is not None:
            where = problem.dataset, problem.data_dir
            smaller = load_image_data(*where, image_size=size).train
    training = family = build_family(problem, data)
    if problem.scaling is not None:
        per = problem.scaling_per
        training = with_random_scaling(family, *problem.scaling, per=per)
    return Source(training, family, smaller, data, about)


def build_family(problem: Problem, data: Any) -> ProblemFamily:
    """The problems of the test; meta-training may scale them at random."""
    options = to_json(problem.family)
    make = getattr(problems, options.pop("family"))
    if problem.name not in NEED_NO_DATA:
        options["num_classes"] = int(data.y.max()) + 1
    return make(**options)


def describe(problem: Problem) -> str:
    """One line: what is optimized and from where it starts."""
    name, family = problem.name, cast(Any, problem.family)
    std = getattr(family, "init_std", None)
    start = "" if std is None else f", theta_0 std {std:g}"
    if name in ("quadratics", "logistic", "plateau"):
        entries = getattr(family, "distribution", None)
        entries = f", {entries} entries" if entries else ""
        return f"{name}, {family.dim} parameters{entries}{start}"
    shape = ""
    if name == "mlp":
        units = "-".join(map(str, family.hidden)) or "no hidden"
        shape = f", {units} {family.activation}"
    about = f"{name}{shape}, batches of {family.batch_size}{start}"
    return about if name == "sinusoids" else f"{problem.dataset}: {about}"


def variants(problem: Problem) -> dict[str, Problem]:
    """Other problems to apply a rule to, by what has changed."""
    family: Any = problem.family
    changes: dict[str, dict[str, Any]]
    if problem.name == "quadratics":
        changes = {
            f"{2 * family.dim} parameters": {"dim": 2 * family.dim},
            "uniform entries": {"distribution": "uniform"},
            "theta_0 std 0.01": {"init_std": 0.01},
        }
    elif problem.name == "mlp":
        units = family.hidden[0] if family.hidden else 20
        changes = {
            f"{2 * units} units": {"hidden": (2 * units,)},
            "2 layers": {"hidden": (units,) * 2},
            "ReLU": {"activation": "relu"},
            "tanh": {"activation": "tanh"},
            "theta_0 std 0.1": {"init_std": 0.1},
            "no hidden layer": {"hidden": ()},
        }
    else:
        return {}
    found = {
        name: replace(problem, family=replace(family, **change))
        for name, change in changes.items()
    }
    if problem.name == "mlp" and problem.dataset != "glyphs":
        found["letters"] = replace(
            problem, dataset="glyphs", data_dir=None, train_image_size=None
        )
    return {name: one for name, one in found.items() if one != problem}
