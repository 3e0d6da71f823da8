"""A trained method, ready for a user's own examples: adapt once, predict often.

Programs are compiled once for each power of two of support examples and of queries,
where a method can leave out the rows that fill them up.

Shapes: N support examples, M queries, way classes, d target dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from metalstm import inputs
from metalstm.base import Batch, Episode, MetaAlgorithm, PyTree
from metalstm.batches import (
    fill_batch,
    fill_rows,
    index_labels,
    num_examples,
    power_of_two,
    support_targets,
)
from metalstm.data.pools import Normalisation
from metalstm.runtime.exporting import export_program
from metalstm.runtime.splitting import split_function

__all__ = ["Classifier", "Predictor", "example_episode"]


def example_episode(
    image_shape: Sequence[int], way: int, shot: int = 1, dtype: Any = jnp.float32
) -> Episode:
    """An episode of zeros, for the shapes that initialisation reads."""

    def batch() -> Batch:
        x = jnp.zeros((way * shot, *image_shape), dtype)
        return Batch(x, jnp.arange(way * shot, dtype=jnp.int32) % way)

    return Episode(batch(), batch())


class _Program(NamedTuple):
    """`Split` of a method, compiled."""

    earlier: Callable[..., list[jax.Array]]
    later: Callable[[list[jax.Array], PyTree], jax.Array]


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained method, ready for a user's own examples.

    ::

        predict = metalstm.load("letters.npz")
        labels = predict(support_images, ["cat", "dog", ...], query_images)
        classifier = predict.adapt(support_images, ["cat", "dog", ...])
        labels = classifier(query_images)  # as often as needed

    `metalstm.load` and `metalstm.load_run` make one. It can be pickled, copied and sent
    to another process, which loads the file itself: the file must be there.

    Attributes:
      method: its name, for messages.
      way: the number of classes it takes; None: any.
      example: the `metalstm.inputs.ExampleArray` of one, or a dict or tuple of them.
      normalise: as in training.
      regression: it predicts float targets.
      message: which checkpoints could not be read.
      spec: the names of the constructors that made the method, with their arguments.
      source: a function and its arguments, which load this again.
    """

    method: str
    algorithm: MetaAlgorithm = field(repr=False)
    params: PyTree = field(repr=False)
    way: int | None
    example: PyTree
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    regression: bool = False
    message: str | None = None
    spec: Mapping[str, Any] | None = field(default=None, repr=False)
    source: tuple[Callable[..., Predictor], tuple] | None = field(
        default=None, repr=False
    )
    _programs: dict[Any, _Program] = field(default_factory=dict, init=False, repr=False)
    _earlier: dict[Any, Callable] = field(default_factory=dict, init=False, repr=False)
    _mixing: set[Any] = field(default_factory=set, init=False, repr=False)
    _probed: set[Any] = field(default_factory=set, init=False, repr=False)

    def __reduce__(self):
        # programs and closures cannot be pickled: another process loads the file itself
        if self.source is None:
            raise TypeError(
                "a Predictor without a file cannot be pickled: metalstm.save its "
                "method, and load it by metalstm.load; a network of your own is given "
                "to metalstm.load in each process"
            )
        return self.source

    def __copy__(self) -> Predictor:
        return self

    def __deepcopy__(self, memo) -> Predictor:
        return self

    def __call__(
        self, images: Any, labels: Sequence[Any], query_images: Any
    ) -> np.ndarray:
        """Return the label of each query, or its target; labels may be any values."""
        return self.adapt(images, labels)(query_images)

    def scores(
        self, images: Any, labels: Sequence[Any], query_images: Any, *, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return scores [M, way], higher is better, and the class of each column.

        Args:
          images: the support set, [N, H, W, ch]: uint8, or floats in [0, 1]; or [N,
            ...] as in training, in the same dicts or tuples.
          labels: N values.
          query_images: [M, H, W, ch].
          seed: of what is random in a method, such as a fresh initialisation.

        Raises:
          ValueError: images of another shape or range than in training, labels that are
            not N numbers or strings, or a number of classes the learner's head lacks.
        """
        classifier = self.adapt(images, labels, seed=seed)
        return classifier.scores(query_images), classifier.classes

    def adapt(self, images: Any, labels: Sequence[Any], *, seed: int = 0) -> Classifier:
        """Adapt to a support set once, for any number of predictions.

        Arguments and errors are those of `scores`. For a regression, ``labels`` are
        targets [N] or [N, d].
        """
        x = self._check(images)
        if len(labels) != (num := num_examples(x)):
            raise ValueError(f"{len(labels)} labels for {num} images: give one each")
        if self.regression:
            support = Batch(x, support_targets(labels))
            return Classifier(self, support, None, seed)
        classes, y = index_labels(labels)
        if self.way is not None and len(classes) != self.way:
            raise ValueError(
                f"labels name {len(classes)} classes, but this {self.method} was "
                f"trained with way={self.way}: give {self.way} classes, or train with "
                f"--way {len(classes)}"
            )
        support = Batch(x, cast(Any, y.astype(np.int32)))
        return Classifier(self, support, classes, seed)

    def prepare(self, images: Any) -> PyTree:
        """Return examples as training saw them: checked, scaled and normalised.

        Raises:
          ValueError: another structure, shape, type or range than in training.
        """
        return self._scale(self._check(images))

    @property
    def _statistics(self) -> Normalisation | None:
        return None if self.normalise is None else Normalisation(*self.normalise)

    def export(
        self,
        path: str | Path,
        *,
        num_support: int,
        num_classes: int | None = None,
        num_queries: int | None = None,
        platforms: Sequence[str] = ("cpu",),
    ) -> Path:
        """Write a program that adapts and predicts without this library.

        Any process with JAX runs it, meta-parameters and preparation inside::

            program = jax.export.deserialize(bytearray(open(path, "rb").read()))
            scores = program.call(images, labels, query_images)

        Images are uint8 where training had pixels, labels int32 [N] in [0, way) (for a
        regression float32 [N, d]), and scores are those of `scores` with ``seed=0``.

        Args:
          num_support: N.
          num_classes: way; default: the learner's own. For a regression: d.
          num_queries: M; None: any, where the method can be exported so.
          platforms: what it runs on, such as ``("cpu", "cuda")``.

        Raises:
          ValueError: the number of classes is missing, or M must be fixed.
        """
        way = self.way if num_classes is None else num_classes
        if way is None:
            raise ValueError("the method takes any way: give num_classes=")
        labels = jax.ShapeDtypeStruct((num_support, way), jnp.float32)
        if not self.regression:
            labels = jax.ShapeDtypeStruct((num_support,), jnp.int32)

        def program(images, y, query_images):
            support, key = Batch(images, y), jax.random.key(0)
            return self._predict(way)(self.params, key, support, query_images)

        return export_program(
            path,
            lambda _: program,
            self._input(num_support),
            labels,
            last=self._input(),
            num_last=num_queries,
            platforms=platforms,
        )

    def _scale(self, x: PyTree) -> PyTree:
        return inputs.scale(x, self._statistics)

    def _check(self, x: Any) -> PyTree:
        return inputs.check(self.example, x, self.method)

    def _input(self, *num: int) -> PyTree:
        return jax.tree.map(lambda array: array.struct(*num), self.example)

    def _predict(self, num_classes: int) -> Callable[..., jax.Array]:
        """The method as a function of examples that are not scaled yet."""
        way = None if self.regression else num_classes

        def predict(params, key, support, query):
            support, query = (
                support._replace(x=self._scale(support.x)),
                self._scale(query),
            )
            return self.algorithm.predict(params, key, support, query, num_classes=way)

        return predict

    def _program(self, support: Any, query: PyTree, num_classes: int) -> _Program:
        """The method split before its queries, compiled once for these shapes."""
        leaves, treedef = jax.tree.flatten((support, query))
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        key = num_classes, tuple(shapes), treedef
        if key not in self._programs:
            fixed = self.params, jax.random.key(0), support
            split = split_function(self._predict(num_classes), *fixed, query)
            # the same for every number of queries, unless the method mixes them
            closed = jax.make_jaxpr(split.earlier)(*fixed)
            same = str(closed), *map(_contents, closed.consts)
            earlier = self._earlier.setdefault(same, jax.jit(split.earlier))
            self._programs[key] = _Program(earlier, jax.jit(split.later))
        return self._programs[key]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A `Predictor` that has seen its support set; `Predictor.adapt` makes one."""

    predictor: Predictor
    support: Batch = field(repr=False)  # numpy arrays, as they were given
    classes: np.ndarray | None  # [way], the labels of the scores' columns; or targets
    seed: int
    _adapted: dict[Any, list[jax.Array]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __reduce__(self):
        return Classifier, (self.predictor, self.support, self.classes, self.seed)

    def __call__(self, query_images: Any) -> np.ndarray:
        """Return the label [M] of each query, or its targets [M, d].

        Raises:
          ValueError: as `scores`, or scores are NaN, so that no class is highest.
        """
        scores = self.scores(query_images)
        if self.classes is None:
            return scores
        unclear = np.isnan(scores).any(-1)
        if unclear.any():
            raise ValueError(
                f"{unclear.sum()} of {len(scores)} queries have scores that are NaN, "
                f"the first is query {unclear.argmax()}: look for NaN or other numbers "
                "than in training (token ids outside the vocabulary) in the queries "
                "and in the support set"
            )
        return self.classes[scores.argmax(-1)]

    def scores(self, query_images: Any) -> np.ndarray:
        """Return scores [M, way], higher is better.

        Queries and, where the method leaves out rows that are no examples, the support
        set are filled up to a power of two, so that few programs serve any number of
        them. The first time, each is tried with two fillings: where an answer changes
        (statistics of all queries together, say), every number gets a program of its
        own, and a warning says so.
        """
        query, predictor = self.predictor._check(query_images), self.predictor
        if not num_examples(query):
            return np.zeros((0, self._way), np.float32)
        try:
            scores = self._run(query)
        except ValueError:  # what learns by batch statistics refuses empty rows
            if not self._fills("support", self.support.x):
                raise
            self._stop_filling("support")
            scores = self._run(query)
        for part, x in (("support", self.support.x), ("queries", query)):
            known = part, self._way
            if self._fills(part, x) and known not in predictor._probed:
                predictor._probed.add(known)
                again = self._run(query, refilled=part)
                if not np.array_equal(scores, again, equal_nan=True):
                    self._stop_filling(part)
                    scores = self._run(query)
        return scores

    def _fills(self, part: str, x: PyTree) -> bool:
        """Whether rows are added to the support set, or to the queries."""
        never = part == "support" and not self.predictor.algorithm.masked
        return (
            not never
            and part not in self.predictor._mixing
            and power_of_two(x) > num_examples(x)
        )

    def _stop_filling(self, part: str) -> None:
        self.predictor._mixing.add(part)
        what = "support examples" if part == "support" else "queries"
        warnings.warn(
            f"an answer of this {self.predictor.method} depends on how many {what} "
            "there are, so every number of them compiles a program",
            RuntimeWarning,
            stacklevel=3,
        )

    def _run(self, query: PyTree, refilled: str | None = None) -> np.ndarray:
        """Scores [M, way], with another filling of the part ``refilled``."""
        predictor, num = self.predictor, num_examples(query)
        support: Any = self.support
        if self._fills("support", support.x):
            support = fill_batch(support, refilled == "support")
        if self._fills("queries", query):
            query = fill_rows(query, refilled == "queries")
        program = predictor._program(support, query, self._way)
        adapted = self._adapted.get(program.earlier)
        if adapted is None or refilled == "support":
            adapted = program.earlier(predictor.params, self.key, support)
        if refilled != "support":
            self._adapted[program.earlier] = adapted
        return np.asarray(program.later(adapted, query))[:num]

    def export(
        self,
        path: str | Path,
        *,
        num_queries: int | None = None,
        platforms: Sequence[str] = ("cpu",),
    ) -> Path:
        """Write a program that predicts for this support set: ``call(query_images)``.

        Arguments, errors and use are those of `Predictor.export`.
        """
        predictor = self.predictor

        program = predictor._predict(self._way)
        fixed = predictor.params, self.key, self.support

        def adapted(query: PyTree) -> Callable[..., jax.Array]:
            split = split_function(program, *fixed, query)
            kept = jax.jit(split.earlier)(*fixed)
            return lambda query_images: split.later(kept, query_images)

        return export_program(
            path,
            adapted,
            last=predictor._input(),
            num_last=num_queries,
            platforms=platforms,
        )

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    @property
    def _way(self) -> int:
        """Classes, or target dimensions."""
        return self.support.y.shape[-1] if self.classes is None else len(self.classes)


def _contents(constant: Any) -> Any:
    is_key = jnp.issubdtype(jnp.result_type(constant), jax.dtypes.prng_key)
    return id(constant) if is_key else np.asarray(constant).tobytes()
