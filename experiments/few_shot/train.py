"""Meta-train the methods of a run, tune what has a rate, and keep what is found."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import metalstm
from experiments.common.devices import MAY_CHANGE, mesh_for
from experiments.common.loop import Loop, Setup
from experiments.common.run_folder import Metrics
from experiments.common.saved_options import to_json
from experiments.common.together import gains_from_seeds, seeds_mesh
from experiments.common.tuning import each_point, tune
from experiments.few_shot.data import Source
from experiments.few_shot.methods import (
    HAND_MADE,
    METHODS,
    Spec,
    init_source,
    is_inner_loop,
    pretrainings,
)
from experiments.few_shot.optimizer import in_steps, make_optimizer, num_steps
from experiments.few_shot.options import Common, Options, Training
from experiments.few_shot.starting import New, start_from
from metalstm.base import LearnerState, MetaParams, PyTree
from metalstm.data import episode_key
from metalstm.meta.fitting import Call, Stepped
from metalstm.runtime import checkpoints, sharding
from metalstm.specs import build_algorithm

_STEP_SHARES = (0.05, 0.2, 0.5)  # of a method's num_steps, tried next to all of them


class Programs(NamedTuple):
    """What is compiled once for each method and serves every seed."""

    algorithm: metalstm.MetaAlgorithm
    optimizer: optax.GradientTransformation
    train_loop: Callable[..., Any]
    evaluate: Callable[..., metalstm.Evaluation]
    mesh: Mesh | None  # of a meta-step, or of seeds at once


class Found(NamedTuple):
    """What a method is tested with, and how it was found."""

    params: PyTree
    meta_training: dict[str, Any]  # for results.json
    is_trained: bool = False


def make_all_programs(
    options: Options, specs: Mapping[str, Spec], source: Source
) -> dict[str, Programs]:
    """The compile-once parts of every method, and of pre-training that several share.

    Raises:
      ValueError: arguments that a constructor refuses.
    """
    programs = {}
    for name, spec in specs.items():
        try:
            programs[name] = make_programs(spec, options, options.methods[name], source)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, shared in pretrainings(options, specs)[0].items():
        programs[name] = make_programs(shared.spec, options, shared.options, source)
    return programs


def make_programs(spec: Spec, common: Common, own: Any, source: Source) -> Programs:
    """The compile-once parts of a method; ``own`` are its options."""
    algorithm = build_algorithm(spec)
    training: Training = own.training
    if seeds_at_once(common):
        of_step, mesh = None, seeds_mesh(common.run.seeds, common.devices.devices)
    else:
        mesh = mesh_for(common.devices, training.meta_batch, "--meta-batch")
        of_step = mesh
    trained = algorithm  # evaluation shares no task between devices
    if (axis := sharding.shared_axis(of_step)) and is_inner_loop(own.method):
        trained = build_algorithm(sharing(spec, axis))
    optimizer = make_optimizer(own.method, training)
    train_loop = metalstm.make_train_loop(
        trained,
        optimizer,
        source.train(training),
        num_tasks=training.meta_batch,
        steps_per_call=training.steps_per_call,
        mesh=of_step,
        accumulate_tasks=training.accumulate_tasks,
    )
    evaluate = metalstm.make_evaluate(
        algorithm,
        source.test,
        batch_size=common.test.test_batch,
        mesh=sharding.task_mesh(num_devices=common.devices.devices),
    )
    return Programs(algorithm, optimizer, train_loop, evaluate, mesh)


def seeds_at_once(common: Common) -> bool:
    """Whether the seeds of a run are meta-trained at the same time."""
    several = common.run.seeds > 1 and common.devices.devices_per_task == 1
    return several and gains_from_seeds()


def sharing(spec: Spec, axis_name: str) -> Spec:
    """The spec of a method that adapts, each task shared by the devices of an axis."""
    if "of" in spec:
        return spec | {"of": sharing(spec["of"], axis_name)}
    return spec | {"axis_name": axis_name}


# -- meta-training ---------------------------------------------------------------------


def may_change(options: Options) -> tuple[str, ...]:
    """What may differ when a run is resumed. A schedule's end is part of the recipe."""
    names: tuple[str, ...] = (
        "run.preset", "run.workdir", "run.resume", "run.evaluate", "run.tensorboard",
        "run.debug", "data.data_dir", "retest.query_norm", "retest.num_test_steps",
        *MAY_CHANGE,
    )  # fmt: skip
    for method, own in options.methods.items():
        prefix = f"methods.{method}.training"
        names += tuple(f"{prefix}.{name}" for name in _movable(own.training))
    return names


def _movable(training: Training) -> tuple[str, ...]:
    return ("minutes", "episodes") if training.schedule == "constant" else ("minutes",)


def _describe(means: dict[str, float]) -> str:
    text = f"loss {means['loss']:.3f}"
    if "accuracy" in means:
        text += f"  acc {means['accuracy']:.1%}"
    return text


class Trainer(NamedTuple):
    """A seed of a run, and where it goes."""

    options: Options
    specs: Mapping[str, Spec]
    programs: Mapping[str, Programs]
    source: Source
    folder: Path

    def learn(self, metrics: Metrics) -> Generator[Call, Stepped, dict[str, Found]]:
        """Train, or resume training, every method until its budget is spent.

        A generator, as `metalstm.meta.fitting.fit_steps` is.

        Raises:
          Interrupted: after Ctrl-C; the state is saved.
          NonFiniteLossError: the state before the bad step is saved.
        """
        found: dict[str, Found] = {}
        classifiers, uses = pretrainings(self.options, self.specs)
        shared: dict[str, Found] = {}
        names = list(self.options.methods)
        for name in (n for n in names if self.programs[n].algorithm.trainable):
            own, classifier = self.options.methods[name], uses.get(name)
            if classifier is None:
                found[name] = yield from self._train(name, own, metrics)
                continue
            if classifier not in shared:
                options = classifiers[classifier].options
                shared[classifier] = yield from self._train(
                    classifier, options, metrics
                )
            # a method's own rule next to the shared features
            trained = shared[classifier]
            init = self._untrained(name)._replace(learner=trained.params.learner)
            most = getattr(own.method, "num_steps", 0)
            params, tuned = self._tune(name, init, most)
            found[name] = Found(params, {**tuned, **trained.meta_training}, True)
        for name in (n for n in names if not self.programs[n].algorithm.trainable):
            params = self._untrained(name)
            if METHODS[name].family == HAND_MADE:
                source = init_source(names)
                assert source is not None, "refused by checks.check"
                params = MetaParams(found[source].params.learner, params.rule)
            found[name] = Found(*self._tune(name, params))
        return found

    def _train(
        self, name: str, own: Any, metrics: Metrics
    ) -> Generator[Call, Stepped, Found]:
        programs, data, seed = (
            self.programs[name],
            self.options.data,
            self.options.run.seed,
        )
        training: Training = own.training

        def score(params: PyTree) -> tuple[float, dict[str, float]]:
            result = self._validate(name, params, training.validation_episodes)
            return result.mean, {"accuracy": result.mean, "ci95": result.ci95}

        setup = Setup(
            name=name,
            config={"data": to_json(data), "seed": seed, **to_json(own)},
            may_change=(
                "data.data_dir",
                *(f"training.{option}" for option in _movable(training)),
            ),
            num_steps=num_steps(training),
            minutes=training.minutes,
            steps_per_call=training.steps_per_call,
            validate_every=in_steps(training.validate_every, training),
            report_every=in_steps(max(20, training.episodes // 2_000), training),
            save_every=in_steps(training.save_every, training),
            score=score,
            describe=_describe,
            unit="episode",
            per_step=training.meta_batch,
            mesh=programs.mesh,
        )
        make_state = functools.partial(
            metalstm.init_train_state,
            programs.algorithm,
            programs.optimizer,
            seed,
            self._example(),
            start=self._start(name, own),
        )
        loop = Loop(setup, self.folder, metrics, programs.algorithm, make_state)
        with loop.running():
            yield from loop.steps(programs.train_loop, self.source.dataset.train)
        best, mean = (
            int(loop.state.best_step) * training.meta_batch,
            float(loop.state.best_score),
        )
        ci95 = {row["episode"]: row["ci95"] for row in loop.history}
        print(
            f"{name}, best on validation: episode {best:,} "
            f"({100 * mean:.1f} ± {100 * ci95.get(best, math.nan):.1f}%)",
            flush=True,
        )
        speed = loop.stopwatch.speed()
        meta_training: dict[str, Any] = {
            "episodes": int(loop.state.train.step) * training.meta_batch,
            "wall_seconds": round(loop.saved.seconds(), 3),
            "episodes_per_second": round(speed, 3) if math.isfinite(speed) else None,
            "best_episode": best,
            "validation_accuracy": mean,
        }
        if training.init_from is not None:
            meta_training["init_from"] = training.init_from
        return Found(loop.state.best_params, meta_training, True)

    def _validate(
        self, name: str, params: PyTree, num_episodes: int
    ) -> metalstm.Evaluation:
        return self.programs[name].evaluate(
            params,
            self.source.dataset.validation,
            num_episodes=num_episodes,
            split="validation",
        )

    def _example(self) -> metalstm.Episode:
        """A training episode: a calibrated step size is found on its images."""
        key = episode_key(self.options.run.seed, "train", 0)
        return jax.jit(self.source.test.sample)(key, self.source.dataset.train)

    def _untrained(self, name: str) -> PyTree:
        """What a method starts from, its rate not yet tuned."""
        key = jax.random.key(self.options.run.seed)
        return self.programs[name].algorithm.init(key, self._example())

    def _start(self, name: str, own: Any) -> LearnerState | None:
        """What theta_0 starts from, if from a trained method."""
        training: Training = own.training
        resumes = checkpoints.latest(self.folder / "checkpoints" / name / "state")
        if training.init_from is None or resumes is not None:
            return None
        spec = self.specs.get(name)
        if spec is None:  # of a classifier that several methods share
            spec = pretrainings(self.options, self.specs)[0][name].spec
        gathers = (
            training.episodes > 0
            and getattr(own.method, "frozen_stats", None) != "kept"
            and getattr(own.method, "train_learner", True)
        )
        new = New(
            name=name,
            spec=spec,
            params=self._untrained(name),
            reads_averages=(
                self.programs[name].algorithm.query_norm == "frozen" and not gathers
            ),
            is_trained=training.episodes > 0,
            data=self.source.describe(),
        )
        return start_from(training.init_from, new)

    def _tune(
        self, name: str, params: PyTree, most_steps: int = 0
    ) -> tuple[PyTree, dict[str, Any]]:
        """Choose the learning rate on meta-validation, from a grid that brackets it.

        Where the rule knows a number of steps, that is chosen next, at the best rate.
        Returns the parameters, which are kept, and what was tried; a method without a
        rate is as it was.
        """
        chosen: dict[str, Any] = {}
        tuned: dict[str, Any] = {}
        if METHODS[name].rates:
            episodes = self.options.methods[name].training.validation_episodes

            def score(rate: float, steps: int | None = None) -> float:
                candidate = with_rate(params, rate, steps)
                return self._validate(name, candidate, episodes).mean

            grid = {"rate": METHODS[name].rates}
            best = tune(each_point(lambda rate: -score(rate)), grid, grow="rate")
            rate = best.best["rate"]
            tried = dict(zip(best.grid["rate"].tolist(), -best.scores, strict=True))
            chosen, text = {"rate": rate}, f"rate {rate:.3g}"
            tuned = {"rate": rate, "tried": _keys(tried)}
            if "num_steps" in params.rule:
                fewer = {max(1, round(share * most_steps)) for share in _STEP_SHARES}
                of_steps = {n: score(rate, n) for n in sorted(fewer - {most_steps})}
                of_steps[most_steps] = tried[rate]
                chosen["steps"] = max(of_steps, key=lambda steps: of_steps[steps])
                tuned |= {"steps": chosen["steps"], "tried_steps": _keys(of_steps)}
                text += f", {chosen['steps']} steps"
            params = with_rate(params, **chosen)
            print(f"{name}, best on validation: {text}", flush=True)
        if jax.tree.leaves(params):  # every method can be loaded again
            path = self.folder / checkpoint_of(name)
            checkpoints.save(path, params, step=0, metadata=chosen, keep=1)
        return params, tuned


def _keys(tried: Mapping[Any, float]) -> dict[str, float]:
    return {str(value): float(score) for value, score in tried.items()}


def checkpoint_of(method: str) -> str:
    """Where the best parameters of a method are in its run folder."""
    return f"checkpoints/{method}/best"


def with_rate(params: MetaParams, rate: float, steps: int | None = None) -> MetaParams:
    rule = params.rule | {"learning_rate": jnp.float32(rate)}
    if steps is not None:
        rule["num_steps"] = jnp.float32(steps)
    return params._replace(rule=rule)
