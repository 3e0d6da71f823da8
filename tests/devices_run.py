"""Twenty meta-steps on several devices: tests/test_distributed.py runs it.

    python devices_run.py FOLDER 1,8 4-of-2
    python devices_run.py FOLDER 4 8-of-1 HOST:PORT PROCESSES PROCESS

FOLDER gets, for each number of devices, a file of gradients and states and checkpoints
of step 10. Then the last and the first take up the checkpoints of another run, which
is waited for, and go on.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import tiny

from metalstm import algorithms, learned_optimizers, rules
from metalstm.data import ClusterSpec
from metalstm.inner import coordinatewise
from metalstm.learned_optimizers import problems
from metalstm.meta import fitting
from metalstm.meta import step as meta_step
from metalstm.meta.evaluation import make_evaluate
from metalstm.runtime import checkpoints, processes, sharding

TASKS, STEPS, HALF = 8, 20, 10
CASES = ("maml", "l2l")
# and how many devices share one task: neither number divides the coordinates
SHARED = {"meta-lstm": 2, "l2l-vmap": 2, "l2l-stacked": 3, "pes": 3}
# one problem, whether its tasks are stacked or mapped over
ALONE = {"l2l-vmap": "l2l-stacked"}
# with its first part's state, which is the gradient: Adam would hide a factor
OPTIMIZER = optax.chain(optax.trace(0.0), meta_step.adam_clipped(0.01))


@functools.cache
def build(case: str):
    """An algorithm and its sampler: without a carry, or with each task's own."""
    if case == "maml":
        spec = ClusterSpec(way=tiny.WAY, shot=1, queries=2, dim=tiny.FEATURES)
        net = tiny.tanh_net()
        # as on an accelerator: every task's own weights, side by side
        return algorithms.maml(net, 0.3, num_steps=1, task_mapping="vmap"), spec
    family = problems.quadratics(3)
    rule = rules.l2l(hidden_size=3, num_layers=1)
    algorithm = learned_optimizers.learned_optimizer(
        family, rule, num_tasks=TASKS, unroll_steps=2, horizon=8, stagger=True
    )
    return algorithm, problems.ProblemSampler(family, 3)


def make_start(algorithm, sampler):
    """In one program: of each operation on its own there would be a hundred."""

    @jax.jit
    def start() -> meta_step.TrainState:
        episode = sampler.sample(jax.random.key(0))
        return meta_step.init_train_state(algorithm, OPTIMIZER, 0, episode)

    return start


@functools.cache
def compiled_start(case: str):
    return make_start(*build(case))


def start(case: str) -> meta_step.TrainState:
    return compiled_start(case)()


@functools.cache
def make_loop(case: str, mesh):
    algorithm, sampler = build(case)
    return meta_step.make_train_loop(
        algorithm, OPTIMIZER, sampler, num_tasks=TASKS, mesh=mesh
    )


def whole(tree) -> list[np.ndarray]:
    """Every leaf on this process, also one that is split over all."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [
        np.asarray(leaf)
        if leaf.is_fully_replicated
        else multihost_utils.process_allgather(leaf, tiled=True)
        for leaf in jax.tree.leaves(tree)
    ]


def steps(case: str, mesh, folder: Path, restored_from: str | None = None):
    """The first gradient, and the state at step 10 and at step 20.

    Saved at step 10 under the name of the devices, or restored from another.
    """
    algorithm, _ = build(case)
    state = start(case)
    if restored_from is not None:
        target = jax.eval_shape(lambda: state)
        state = checkpoints.restore(folder / restored_from / case, target).state
        assert state.step == HALF
    if mesh is None:  # what was restored is committed to its device: one program
        state = jax.device_put(state, jax.devices()[0])
    state = meta_step.place_state(algorithm, state, mesh)
    loop = make_loop(case, mesh)
    found = {}
    for step in range(int(state.step), STEPS):
        if step == 1:
            found["gradient"] = whole(state.opt_state[0].trace)
        if step == HALF:
            found["half"] = whole(state)
            if restored_from is None:
                checkpoints.save(folder / name_of(mesh) / case, state, step=step)
        state, metrics = loop(state, None)
        sharding.block_on_cpu_collectives((state, metrics))
        assert metrics["finite"].all()
    return found | {"end": whole(state.params), "carry": whole(state.carry)}


def name_of(mesh) -> str:
    devices = 1 if mesh is None else mesh.devices.size
    return f"{devices}-of-{jax.process_count()}"


def write(path: Path, **lists: list[np.ndarray]) -> None:
    arrays = {
        f"{n}{i:03d}": a for n, leaves in lists.items() for i, a in enumerate(leaves)
    }
    if processes.is_main():
        np.savez(path, **arrays)


def evaluated(mesh) -> np.ndarray:
    """Accuracies of 10 episodes in batches of 3, or of the next multiple of devices."""
    algorithm, spec = build("maml")
    run = make_evaluate(algorithm, spec, batch_size=3, mesh=mesh)
    params = sharding.place(start("maml").params, mesh)
    return run(params, None, num_episodes=10).accuracies


def go_on(folder: Path, mesh, other: str) -> None:
    for case in CASES:
        deadline = time.monotonic() + 300
        while processes.any_process(checkpoints.latest(folder / other / case) is None):
            assert time.monotonic() < deadline, f"{other} saved nothing"
            time.sleep(0.1)
        found = steps(case, mesh, folder, restored_from=other)
        write(folder / f"{name_of(mesh)}-after-{other}-{case}.npz", **found)


def many_at_once(mesh) -> None:
    """Steps that nobody waits for: too many under way, and a CPU's devices hang."""
    algorithm, _ = build("maml")
    state = meta_step.place_state(algorithm, start("maml"), mesh)
    state = fitting.init_fit_state(state)
    loop = make_loop("maml", mesh)
    end = fitting.fit(loop, state, None, num_steps=200, report_every=0)
    assert end.train.step == 200


def build_shared(case: str, axis_name: str | None):
    """An algorithm of two tasks, whose coordinates several devices may share."""
    if case == "meta-lstm":
        spec = ClusterSpec(way=tiny.WAY, shot=1, queries=2, dim=tiny.FEATURES)
        rule = rules.lstm_gates(hidden_size=3, init_scale=0.3)
        net = tiny.tanh_net()
        return algorithms.published_meta_lstm(
            net, rule, num_steps=3, axis_name=axis_name
        ), spec
    family = problems.quadratics(47)
    algorithm = learned_optimizers.learned_optimizer(
        family,
        rules.l2l(hidden_size=3, num_layers=1, features="moments"),
        num_tasks=2,
        unroll_steps=3,
        horizon=6,
        estimator="pes" if case == "pes" else "backprop",
        task_mapping="vmap" if case == "l2l-vmap" else None,
        axis_name=axis_name,
    )
    return algorithm, problems.ProblemSampler(family, 4)


def share(folder: Path) -> None:
    """Three meta-steps of two tasks on one device, and with groups of devices."""
    # several blocks of coordinates
    coordinatewise._BLOCK = dict.fromkeys(coordinatewise._BLOCK, 16)
    for case, several in SHARED.items():
        for each in (several,) if case in ALONE else (1, several):
            mesh = None
            if each > 1:
                mesh = sharding.task_mesh(
                    2, num_devices=2 * each, devices_per_task=each
                )
            algorithm, sampler = build_shared(case, sharding.shared_axis(mesh))
            state = make_start(algorithm, sampler)()
            state = meta_step.place_state(algorithm, state, mesh)
            loop = meta_step.make_train_loop(
                algorithm, OPTIMIZER, sampler, num_tasks=2, mesh=mesh
            )
            if (case, each) == ("l2l-vmap", 2):
                text = loop.lower(state, None).compile().as_text()
                (folder / "shared.hlo").write_text(text)
            for step in range(3):
                state, metrics = loop(state, None)
                sharding.block_on_cpu_collectives((state, metrics))
                if step == 0:
                    gradient = whole(state.opt_state[0].trace)
            ends = {"end": whole(state.params), "carry": whole(state.carry)}
            write(folder / f"shared-{case}-{each}.npz", gradient=gradient, **ends)


def programs(folder: Path, mesh) -> None:
    """Write the compiled steps."""
    for case in CASES:
        state = meta_step.place_state(build(case)[0], start(case), mesh)
        compiled = make_loop(case, mesh).lower(state, None).compile()
        (folder / f"{case}.hlo").write_text(compiled.as_text())


def main(folder: str, devices: str, other: str, *address: str) -> None:
    if address:
        coordinator, num_processes, process = address
        processes.initialize(coordinator, int(num_processes), int(process))
    counts = [int(count) for count in devices.split(",")]
    meshes = [sharding.task_mesh(TASKS, num_devices=count) for count in counts]
    for mesh in meshes:
        for case in CASES:
            path = Path(folder) / f"{name_of(mesh)}-{case}.npz"
            write(path, **steps(case, mesh, Path(folder)))
    for mesh in {meshes[0], meshes[-1]}:
        go_on(Path(folder), mesh, other)
        write(
            Path(folder) / f"{name_of(mesh)}-tested.npz", accuracies=[evaluated(mesh)]
        )
    if not address:
        many_at_once(meshes[-1])
        programs(Path(folder), meshes[-1])
        share(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
