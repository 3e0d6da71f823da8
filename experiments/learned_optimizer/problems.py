"""The problem that the flags name, its data, and its variants."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from experiments.learned_optimizer.options import Problem
from metalstm.data.sources.labelled import load_image_data
from metalstm.learned_optimizers import problems
from metalstm.learned_optimizers.problems import ProblemFamily

NEED_NO_DATA = ("quadratics", "logistic", "plateau", "sinusoids")


class Source(NamedTuple):
    training: ProblemFamily  # with random scaling, when asked for
    test: ProblemFamily
    training_data: Any  # resized, when asked for
    data: Any  # arrays, () when the family needs none
    about: dict[str, Any]  # for config.json: name, sizes, checksum


def load_source(problem: Problem) -> Source:
    """Build the family and load its data.

    Raises:
      ValueError, FileNotFoundError: name the remedy.
    """
    data, about = _load_data(problem)
    family = build_family(problem, data)
    training = family
    if problem.scaling is not None:
        low, high = problem.scaling
        training = problems.with_random_scaling(
            family, low, high, per=problem.scaling_per
        )
    smaller = data
    if problem.train_image_size is not None and problem.problem not in NEED_NO_DATA:
        size = problem.train_image_size
        smaller = load_image_data(
            problem.dataset, problem.data_dir, image_size=size
        ).train
    return Source(training, family, smaller, data, about)


def build_family(problem: Problem, data: Any) -> ProblemFamily:
    """The problems of the test; meta-training may scale them at random.

    Raises:
      ValueError: ``--init-std`` for a family that takes none.
    """
    name = problem.problem
    given: dict[str, Any] = {}
    if problem.init_std is not None:
        if name in ("plateau", "conv"):
            raise ValueError(
                f"--init-std {problem.init_std}: {name} has a start of its own; drop it"
            )
        given["init_std"] = problem.init_std
    if name == "quadratics":
        return problems.quadratics(
            problem.dim, distribution=problem.distribution, **given
        )
    if name == "logistic":
        return problems.logistic_regression(problem.dim, **given)
    if name == "plateau":
        return problems.plateau(problem.dim)
    given["batch_size"] = problem.batch_size
    if name == "sinusoids":
        return problems.sinusoids(hidden=problem.widths, **given)
    classes = int(data.y.max()) + 1
    if name == "conv":
        return problems.conv_classifier(num_classes=classes, **given)
    return problems.mlp_classifier(
        problem.widths, num_classes=classes, activation=problem.activation, **given
    )


def _load_data(problem: Problem) -> tuple[Any, dict[str, Any]]:
    name = problem.problem
    if name in NEED_NO_DATA:
        return (), {"name": name}
    images = load_image_data(problem.dataset, problem.data_dir)
    # losses are those of training, as in the paper
    return images.train, {
        "name": name,
        "dataset": images.name,
        "images": len(images.train.y),
        "classes": images.num_classes,
        "checksum": images.checksum,
    }


def describe(problem: Problem) -> str:
    """One line: what is optimized and from where it starts."""
    name = problem.problem
    start = "" if problem.init_std is None else f", theta_0 std {problem.init_std:g}"
    if name in ("quadratics", "logistic", "plateau"):
        entries = f", {problem.distribution} entries" if name == "quadratics" else ""
        return f"{name}, {problem.dim} parameters{entries}{start}"
    about = f"{name}, batches of {problem.batch_size}{start}"
    if name == "sinusoids":
        return about
    if name == "mlp":
        units = "-".join(map(str, problem.widths)) or "no hidden"
        about = f"mlp, {units} {problem.activation}, batches of {problem.batch_size}"
        about += start
    return f"{problem.dataset}: {about}"


def variants(problem: Problem) -> dict[str, Problem]:
    """Other problems to apply a rule to, by what has changed."""
    change = lambda **options: dataclasses.replace(problem, **options)  # noqa: E731
    if problem.problem == "quadratics":
        return {
            f"{2 * problem.dim} parameters": change(dim=2 * problem.dim),
            "uniform entries": change(distribution="uniform"),
            "theta_0 std 0.01": change(init_std=0.01),
        }
    if problem.problem != "mlp":
        return {}
    found = {
        f"{2 * problem.widths[0]} units": change(widths=(2 * problem.widths[0],)),
        "2 layers": change(widths=(problem.widths[0],) * 2),
        "ReLU": change(activation="relu"),
        "tanh": change(activation="tanh"),
        "theta_0 std 0.1": change(init_std=0.1),
        "no hidden layer": change(widths=()),
    }
    if problem.dataset != "glyphs":
        found["letters"] = change(
            dataset="glyphs", data_dir=None, train_image_size=None
        )
    return {k: v for k, v in found.items() if v != problem}
