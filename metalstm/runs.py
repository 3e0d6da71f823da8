"""Trained runs: build a method from its JSON spec, and predict with a saved one.

A run folder, as ``experiments`` writes it, holds ``config.json`` with one spec for each
method, and ``checkpoints/<method>/best`` with its meta-parameters. A spec is
``{"algorithm": {"name", "options"}, "learner": {...}, "rule": {...}, "way"}``: names of
constructors and their keyword arguments, nothing that must be unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metalstm import algorithms, nn, rules
from metalstm.base import (
    Batch,
    Episode,
    Learner,
    MetaAlgorithm,
    PyTree,
    UpdateRule,
)
from metalstm.inner import first_order, second_order
from metalstm.runtime import checkpoints

__all__ = [
    "Predictor",
    "any_way",
    "build_algorithm",
    "build_learner",
    "build_rule",
    "example_episode",
    "load_params",
    "load_run",
]

LEARNERS: dict[str, Callable[..., Learner]] = {
    "conv4": nn.conv4,
    "mlp": nn.mlp,
    "resnet12": nn.resnet12,
}
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adadelta": optax.adadelta,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "momentum": optax.sgd,
    "sgd": optax.sgd,
}
# methods on top of a learner's features: any way will do
COMPARING: dict[str, Callable[..., MetaAlgorithm]] = {
    "fine_tuning": algorithms.fine_tuning,
    "hallucination": algorithms.hallucination,
    "margin_classifier": algorithms.margin_classifier,
    "matching": algorithms.matching,
    "pretrained_features": algorithms.pretrained_features,
    "prototypical": algorithms.prototypical,
    "relation": algorithms.relation,
    "siamese": algorithms.siamese,
}
# methods that adapt a learner, with a rule of their own
ADAPTING: dict[str, Callable[..., MetaAlgorithm]] = {
    "anil": algorithms.anil,
    "fomaml": algorithms.fomaml,
    "implicit_maml": algorithms.implicit_maml,
    "maml": algorithms.maml,
    "meta_sgd": algorithms.meta_sgd,
    "reptile": algorithms.reptile,
}
RULES: dict[str, Callable[..., UpdateRule]] = {
    "learned_sgd": rules.learned_sgd,
    "lstm_gates": rules.lstm_gates,
}


def build_learner(spec: Mapping[str, Any], way: int | None) -> Learner:
    """Build the learner of a spec; ``way`` outputs, or features for None."""
    factory = _choose("learner", spec["name"], LEARNERS)
    options = _tuples(spec.get("options", {}))
    if spec.get("tied_head") and way is not None:
        return nn.tied_head(factory(None, **options))
    return factory(way, **options)


def build_rule(spec: Mapping[str, Any]) -> UpdateRule:
    """Build the rule of a spec.

    An optimizer's learning rate is a parameter of the rule, so that a grid of them
    needs one program.
    """
    options = _tuples(spec.get("options", {}))
    if spec["name"] not in OPTIMIZERS:
        return _choose("rule", spec["name"], RULES | OPTIMIZERS)(**options)
    rate = options.pop("learning_rate")
    factory = OPTIMIZERS[spec["name"]]
    return rules.tunable(
        lambda learning_rate: factory(learning_rate, **options), learning_rate=rate
    )


def build_algorithm(
    spec: Mapping[str, Any], *, axis_name: str | None = None
) -> MetaAlgorithm:
    """Build a method of a run; raises ValueError for a name that does not exist.

    ``axis_name`` is the mesh axis whose devices share each task, for the methods that
    can do that; others compute the same on all of them.
    """
    name = spec["algorithm"]["name"]
    options = _with_differentiation(_tuples(spec["algorithm"].get("options", {})))
    if name == "nearest_neighbour":
        return algorithms.nearest_neighbour()
    if "relation_net" in spec:
        net = _tuples(spec["relation_net"])
        options["relation_net"] = nn.relation_net(**net)
    if name in COMPARING:
        return COMPARING[name](build_learner(spec["learner"], None), **options)
    if name == "mann":
        features = build_learner(spec["learner"], None)
        return algorithms.mann(features, spec["way"], **options)
    learner = build_learner(spec["learner"], spec["way"])
    if name == "gradient_agreement":
        own = {"name": options.pop("of"), "options": options}
        weighed = build_algorithm({**spec, "algorithm": own}, axis_name=axis_name)
        how = options.get("task_mapping")
        return algorithms.gradient_agreement(weighed, task_mapping=how)
    options["axis_name"] = axis_name
    if name in ADAPTING:
        return ADAPTING[name](learner, **options)
    with_rule: dict[str, Callable[..., MetaAlgorithm]] = {
        "from_scratch": algorithms.from_scratch,
        "learned_init": algorithms.learned_init,
        "meta_lstm": algorithms.meta_lstm,
    }
    factory = _choose("algorithm", name, with_rule)
    return factory(learner, build_rule(spec["rule"]), **options)


def _with_differentiation(options: dict[str, Any]) -> dict[str, Any]:
    """A spec says ``second_order``, and may say ``keep``: one value of the two."""
    options = dict(options)
    is_second, keep = options.pop("second_order", None), options.pop("keep", None)
    if is_second is None:
        return options
    how = second_order if is_second else first_order
    return options | {"differentiation": how() if keep is None else how(keep)}


def any_way(spec: Mapping[str, Any]) -> bool:
    """Whether the method serves tasks with another number of classes than ``way``."""
    if spec["algorithm"]["name"] in ("nearest_neighbour", *COMPARING):
        return True
    return bool(spec["learner"].get("tied_head"))


def example_episode(image_shape: Sequence[int], way: int, shot: int = 1) -> Episode:
    """An episode of zeros, for the shapes that initialisation reads."""

    def batch() -> Batch:
        x = jnp.zeros((way * shot, *image_shape), jnp.float32)
        return Batch(x, jnp.arange(way * shot, dtype=jnp.int32) % way)

    return Episode(batch(), batch())


def load_params(
    run: str | Path, method: str, spec: Mapping[str, Any], image_shape: Sequence[int]
) -> tuple[PyTree, str | None]:
    """Read a method's best meta-parameters, and what had to be skipped to get them."""
    algorithm = build_algorithm(spec)
    episode = example_episode(image_shape, spec["way"])
    target = jax.eval_shape(algorithm.init, jax.random.key(0), episode)
    if not jax.tree.leaves(target):
        return target, None
    folder = Path(run) / "checkpoints" / method / "best"
    restored = checkpoints.restore(folder, target)
    return restored.state, restored.message


@dataclass(frozen=True)
class Predictor:
    """A trained method, ready for a user's own images.

    >>> predict = metalstm.load_run("runs/few_shot/glyphs-5w1s-0")
    >>> labels = predict(support_images, ["cat", "dog", ...], query_images)
    """

    method: str
    algorithm: MetaAlgorithm
    params: PyTree
    way: int
    any_way: bool
    image_shape: tuple[int, ...]
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None
    message: str | None = None  # which checkpoints could not be read

    def __call__(
        self, images: Any, labels: Sequence[Any], query_images: Any
    ) -> np.ndarray:
        """Return the predicted label of each query; labels may be any values."""
        scores, classes = self.scores(images, labels, query_images)
        return classes[scores.argmax(-1)]

    def scores(
        self, images: Any, labels: Sequence[Any], query_images: Any, *, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores [M, way], higher is better, and the class of each column.

        Args:
          images: the support set, [N, H, W, ch]: uint8, or floats in [0, 1].
          labels: N values.
          query_images: [M, H, W, ch].
          seed: of what is random in a method, such as a fresh initialisation.

        Raises:
          ValueError: images of another shape or range than in training, as many labels
            as images are not given, or a number of classes the learner's head lacks.
        """
        x, query = (self._prepare(a) for a in (images, query_images))
        if len(labels) != len(x):
            raise ValueError(f"{len(labels)} labels for {len(x)} images: give one each")
        classes, y = np.unique(np.asarray(labels), return_inverse=True)
        if len(classes) != self.way and not self.any_way:
            raise ValueError(
                f"labels name {len(classes)} classes, but this {self.method} was "
                f"trained with way={self.way}: give {self.way} classes, or train with "
                f"--way {len(classes)}"
            )
        support = Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32))
        out = _predict(self.algorithm, len(classes))(
            self.params, jax.random.key(seed), support, jnp.asarray(query)
        )
        return np.asarray(out), classes

    def _prepare(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images have the shape {images.shape}, but this run was trained on "
                f"[N, {', '.join(map(str, self.image_shape))}]: resize them"
            )
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        images = images.astype(np.float32)
        # said so that NaN, which no comparison is true of, is refused too
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images span {images.min():.3g} to {images.max():.3g}: give uint8, or "
                "floats in [0, 1]; normalisation is done here"
            )
        if self.normalise is not None:
            mean, std = (np.asarray(a, np.float32) for a in self.normalise)
            images = (images - mean) / std
        return images


def load_run(path: str | Path, method: str | None = None) -> Predictor:
    """Load a run folder as a predictor for a user's own images.

    Args:
      path: the folder that ``python -m experiments.few_shot`` wrote.
      method: one of the run's methods; default its first.

    Raises:
      FileNotFoundError: the folder, or the method's checkpoint, is not there.
      ValueError: the run has no such method, or its config.json is damaged.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is not a run folder: it has no config.json; give the folder that "
            "experiments.few_shot printed"
        )
    seeds = sorted(p.name for p in path.glob("seed-*"))
    if seeds:
        raise FileNotFoundError(
            f"{path} holds a run for each of several seeds: give one of "
            f"{', '.join(seeds)} in it"
        )
    specs, source = _read_config(path / "config.json")
    method = next(iter(specs)) if method is None else method
    if method not in specs:
        raise ValueError(
            f"method={method!r} is not in {path}: choose one of {', '.join(specs)}"
        )
    spec = specs[method]
    try:
        params, message = load_params(path, method, spec, source["image_shape"])
        algorithm, serves_any_way = build_algorithm(spec), any_way(spec)
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever an option of a wrong kind leads to
        raise ValueError(
            f"{path / 'config.json'} makes no {method} ({type(error).__name__}: "
            f"{error}): put a copy of it back, or train with this metalstm"
        ) from error
    return Predictor(
        method=method,
        algorithm=algorithm,
        params=params,
        way=spec["way"],
        any_way=serves_any_way,
        image_shape=tuple(source["image_shape"]),
        normalise=source.get("normalise"),
        message=message,
    )


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The methods and the data of a run; raises ValueError when it is damaged."""
    try:
        document = json.loads(path.read_bytes())
        specs, source = document["methods"], document["data"]
        shape, normalise = source["image_shape"], source.get("normalise")
        sound = all(isinstance(s["way"], int) and s["way"] > 0 for s in specs.values())
        sound &= len(shape) > 0 and all(isinstance(n, int) and n > 0 for n in shape)
        if normalise is not None:
            mean, std = (np.array(part, np.float32) for part in normalise)
            sound &= mean.ndim == std.ndim == 1 and bool((std > 0).all())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): put a copy of it "
            "back, or train again"
        ) from error
    if not sound or not specs:
        raise ValueError(
            f"{path} is damaged (no methods, or sizes that cannot be): put a copy of "
            "it back, or train again"
        )
    return specs, source


def _predict(algorithm: MetaAlgorithm, num_classes: int) -> Callable[..., jax.Array]:
    # jitted afresh for each call: a user predicts with few shapes, and keeping programs
    # would tie their life to the predictor's
    return jax.jit(
        lambda params, key, support, query: algorithm.predict(
            params, key, support, query, num_classes=num_classes
        )
    )


def _choose(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{kind}={name!r}: choose one of {', '.join(sorted(table))}")
    return table[name]


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no tuples, and flax modules must be hashable
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
