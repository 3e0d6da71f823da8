"""One device = two = eight = two processes of two; what travels; who dies and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny
from devices_run import ALONE, CASES, SHARED
from faults.scripts import draw_images
from test_training import EPISODE, SPEC, toy

from benchmarks import scaling
from experiments.common import devices, launch
from metalstm.meta import fitting
from metalstm.meta import step as meta_step
from metalstm.runtime import checkpoint_format, checkpoints, processes, sharding

TESTS = Path(__file__).parent
# compiling is most of it
QUICK_XLA = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def environment(num_devices: int) -> dict[str, str]:
    count = f"--xla_force_host_platform_device_count={num_devices}"
    return os.environ | {
        "XLA_FLAGS": f"{count} {QUICK_XLA}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A process of 1 and of 8 devices, and next to it two processes of two each."""
    folder = tmp_path_factory.mktemp("devices")
    script = [sys.executable, str(TESTS / "devices_run.py"), str(folder)]
    place = [f"localhost:{launch._free_port()}", "2"]
    started, logs = [], []
    for arguments, num_devices in (
        (["1,8", "4-of-2"], 8),
        (["4", "8-of-1", *place, "0"], 2),
        (["4", "8-of-1", *place, "1"], 2),
    ):
        logs.append(folder / f"log-{len(logs)}")
        with logs[-1].open("w") as log:
            process = subprocess.Popen(
                [*script, *arguments],
                env=environment(num_devices),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
    try:
        deadline = time.monotonic() + 580
        while any(process.poll() is None for process in started):
            failed = any(process.poll() for process in started)
            if failed or time.monotonic() > deadline:
                break  # the others would wait for the one
            time.sleep(0.1)
        said = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)
        assert [process.poll() for process in started] == [0, 0, 0], said
    finally:
        for process in started:
            process.kill()
            process.wait()
    return folder


def load(folder: Path, name: str, kind: str) -> list[np.ndarray]:
    with np.load(folder / f"{name}.npz") as saved:
        return [saved[key] for key in sorted(saved.files) if key.startswith(kind)]


def assert_same(folder: Path, name: str, other: str, kind: str) -> None:
    mine, theirs = load(folder, name, kind), load(folder, other, kind)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        # an estimate of PES near 0 is a sum of terms as large as the largest estimate:
        # what rounding leaves is float32's epsilon of that
        rounding = 1e-7 * max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("where", ["8-of-1", "4-of-2"])
@pytest.mark.parametrize("case", CASES)
def test_any_devices_take_the_steps_of_one(ran, case, where):
    """The gradient itself, and the meta-parameters after 20 steps of Adam."""
    for kind in ("gradient", "end", "carry"):
        assert_same(ran, f"{where}-{case}", f"1-of-1-{case}", kind)
    flat = np.concatenate([x.ravel() for x in load(ran, f"1-of-1-{case}", "gradient")])
    assert np.linalg.norm(flat) > 0.1
    half, end = (load(ran, f"1-of-1-{case}", kind) for kind in ("half", "end"))
    assert any(not np.array_equal(a, b) for a, b in zip(half[2:], end, strict=False))
    assert (case == "l2l") == bool(load(ran, f"{where}-{case}", "carry"))


@pytest.mark.parametrize(
    ("where", "other"),
    [("1-of-1", "4-of-2"), ("8-of-1", "4-of-2"), ("4-of-2", "8-of-1")],
)
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_with_other_devices_and_processes(ran, case, where, other):
    """What is restored is what was saved, to the bit; then the same steps."""
    resumed = f"{where}-after-{other}-{case}"
    saved = load(ran, f"{other}-{case}", "half")
    for a, b in zip(load(ran, resumed, "half"), saved, strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same(ran, resumed, f"{other}-{case}", "end")


@pytest.mark.parametrize("where", ["8-of-1", "4-of-2"])
def test_evaluations_are_those_of_one_device(ran, where):
    one, many = (load(ran, f"{w}-tested", "accuracies")[0] for w in ("1-of-1", where))
    np.testing.assert_array_equal(many, one)
    assert one.shape == (10,)
    assert np.ptp(one) > 0


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and number of elements of every collective in compiled HLO."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
            found.append((match[2], int(sum(sizes))))
    return found


@pytest.mark.parametrize("case", CASES)
def test_only_the_meta_gradient_travels(ran, case):
    """No all-gather: neither of tasks' own kernels nor of their carry."""
    found = collectives((ran / f"{case}.hlo").read_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    learned = sum(x.size for x in load(ran, f"8-of-1-{case}", "end"))
    travels = sum(size for _, size in found)
    assert learned < travels <= learned + 4  # and the metrics' means


@pytest.mark.parametrize(("case", "each"), SHARED.items())
def test_devices_that_share_a_task_take_the_steps_of_one(ran, case, each):
    """Also where shares and blocks do not divide the coordinates."""
    alone = f"shared-{ALONE.get(case, case)}-1"
    for kind in ("gradient", "end", "carry"):
        assert_same(ran, f"shared-{case}-{each}", alone, kind)
    gradient = load(ran, alone, "gradient")
    assert np.linalg.norm(np.concatenate([x.ravel() for x in gradient])) > 1e-3
    assert ("l2l" in case or case == "pes") == bool(load(ran, alone, "carry"))


def test_of_a_shared_task_theta_and_the_end_are_gathered(ran):
    """Within each update one copy of theta, and no more; the state once, at the end."""
    program = (ran / "shared.hlo").read_text()
    sizes = [n for kind, n in collectives(program) if kind == "all-gather"]
    padded = 2 * 2 * 16  # 47 coordinates over two devices in blocks of at most 16
    state = sum(
        x.size // 2 for x in load(ran, "shared-l2l-stacked-1", "carry") if x.ndim > 1
    )
    assert sizes
    assert min(sizes) <= padded
    assert sum(sizes) <= 3 * padded + 2 * state


def test_the_search_for_collectives_finds_them():
    line = "  %x = (f32[5,3]{1,0}, /*index=1*/f32[]) all-gather(%a, %b), dims={0}"
    assert collectives(line) == [("all-gather", 16)]
    assert collectives("  %y = f32[8]{0} all-reduce-start(%a)") == [("all-reduce", 8)]
    assert collectives("  %z = f32[8]{0} fusion(%all-reduce)") == []


def test_an_array_that_no_process_has_whole_is_saved_whole_with_its_digest(
    ran, tmp_path
):
    path = tmp_path / "l2l"
    shutil.copytree(ran / "4-of-2" / "l2l", path)
    found = {a.tobytes() for a in checkpoints.restore(path, None, which=10).state}
    assert {a.tobytes() for a in load(ran, "4-of-2-l2l", "half")} <= found
    metadata = path / "10" / "_CHECKPOINT_METADATA"
    stored = json.loads(metadata.read_text())
    document = stored["custom_metadata"]
    digest = document["arrays"]
    document["arrays"] = digest[1:] + digest[0]
    del document["digest"]
    document["digest"] = checkpoint_format.digest_of_json(document)
    metadata.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="do not agree with their digest"):
        checkpoints.restore(path, None, which=10)


# the launcher, with scripts that need no jax

LISTENER = """
import signal, sys, time
place = dict(zip(sys.argv[1::2], sys.argv[2::2]))
me = sys.argv[sys.argv.index("--process-id") + 1]
print("process", me, "of", sys.argv[sys.argv.index("--num-processes") + 1], flush=True)
print("to resume: python -m experiments.few_shot --resume some folder", flush=True)
"""
WAITS = "time.sleep(60)\n"
SAVES = "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n" + WAITS


def script(folder: Path, monkeypatch, **by_process: str) -> str:
    """A module to launch; what each process does is told by ``p0=``, ``p1=``."""
    lines = "".join(f"if me == '{k[1:]}':\n  {v}\n" for k, v in by_process.items())
    (folder / "script_of_test.py").write_text(LISTENER + lines)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "script_of_test"


def launched(folder: Path, name: str, *options: str) -> int:
    own = ["--processes", "2", "--log-dir", str(folder / "logs"), *options]
    return launch.main([*own, "--", name])


def test_the_launcher_says_who_died_of_what_and_stops_the_rest(
    tmp_path, monkeypatch, capfdbinary
):
    begun = time.monotonic()
    name = script(
        tmp_path,
        monkeypatch,
        p0="time.sleep(60)",
        p1="import os; print('out of luck', flush=True); os.kill(os.getpid(), 9)",
    )
    assert launched(tmp_path, name) == 128 + 9
    assert time.monotonic() - begun < 30
    out = capfdbinary.readouterr().out.decode()
    assert re.search(r"process 1 \(pid \d+\) was killed by SIGKILL", out)
    assert "| out of luck" in out
    assert "stopped the others, which waited for it: 0" in out
    assert "--processes 2 -- script_of_test --resume some folder" in out
    assert "process 0 of 2" in out
    assert "process 1 of 2" not in out.replace("| process 1 of 2", "")
    assert "process 1 of 2" in (tmp_path / "logs" / "process-1.log").read_text()


def test_the_launcher_names_a_process_that_was_not_heard_of(
    tmp_path, monkeypatch, capsys
):
    """In the words of jax 0.10.2, when process 1 had been stopped with SIGSTOP."""
    said = (
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):"
        "\\n1\\nThe tasks have crashed. Check the task logs"
    )
    aborts = f"import os; print('{said}', flush=True); os.abort()"
    name = script(tmp_path, monkeypatch, p0=aborts, p1="time.sleep(60)")
    assert launched(tmp_path, name, "--heartbeat-timeout", "7") == 128 + 6
    out = capsys.readouterr().out
    assert "was killed by SIGABRT" in out
    assert "| UNAVAILABLE: The following tasks are unhealthy (stopped sending" in out
    assert "another was not heard of for 7 seconds: it hung" in out
    assert (
        f"running: process 1, whose log is {tmp_path / 'logs' / 'process-1.log'}" in out
    )


def test_the_launcher_blames_the_first_to_die(tmp_path, monkeypatch, capsys):
    """A broken connection ends the others in no time: here before anybody looks."""
    name = script(
        tmp_path,
        monkeypatch,
        p0="time.sleep(0.6); sys.exit(1)",
        p1="time.sleep(0.3); import os; os.kill(os.getpid(), 9)",
    )
    monkeypatch.setattr(launch, "_POLL", 3.0)
    assert launched(tmp_path, name) == 128 + 9
    assert "process 1 (pid" in capsys.readouterr().out


def test_the_launcher_returns_the_status_of_a_mistake(tmp_path, monkeypatch, capsys):
    name = script(tmp_path, monkeypatch, p0="sys.exit(2)", p1="sys.exit(2)")
    assert launched(tmp_path, name) == 2
    assert "ended with exit status 2" in capsys.readouterr().out


def test_the_launcher_passes_ctrl_c_on_and_waits(tmp_path, monkeypatch, capsys):
    saves = SAVES.replace("\n", "\n  ")
    name = script(tmp_path, monkeypatch, p0=saves, p1=saves)
    real = launch._watch

    def interrupted(workers, *rest):
        logs = [worker.log for worker in workers]
        deadline = time.monotonic() + 30
        while not all(p.exists() and b"to resume" in p.read_bytes() for p in logs):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # for the handlers
        os.kill(os.getpid(), signal.SIGINT)
        return real(workers, *rest)

    monkeypatch.setattr(launch, "_watch", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert launched(tmp_path, name) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "killed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--processes 2", "no script"),
        ("--processes 0 -- x", "--processes 0: choose 1 or more"),
        ("--heartbeat-timeout 0 -- x", "--heartbeat-timeout 0: choose 1 or more"),
    ],
)
def test_the_launcher_refuses(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.main(line.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_or_preempted_host_stops_the_run_and_it_goes_on(number, tmp_path):
    """One of two processes hears the signal; the same command resumes on one."""
    folder, logs = tmp_path / "run", tmp_path / "logs"
    draw_images(tmp_path / "images")
    line = (
        "--dataset folders --image-size 8 --learner mlp --widths 4 --num-steps 1 "
        "--way 3 --queries 2 --meta-batch 4 --algorithms fomaml "
        "--validation-episodes 4 "
        "--test-episodes 4 --test-batch 4 --episodes 100000 --validate-every 100000 "
        f"--save-every 40 --workdir {folder} --data-dir {tmp_path / 'images'}"
    ).split()
    parent = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "experiments.common.launch",
                "--log-dir",
                str(logs),
            ),
            *("--heartbeat-timeout", "30", "--", "experiments.few_shot", *line),
        ],
        cwd=TESTS.parent,
        env=environment(1) | {"METALSTM_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        state = folder / "checkpoints" / "fomaml" / "state"
        deadline = time.monotonic() + 400
        while len(list(state.glob("[0-9]*"))) < 2 and parent.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text()
        os.kill(int(children.split()[1]), number)
        killed = time.monotonic()
        out, _ = parent.communicate(timeout=60)
    finally:
        parent.kill()
    if number == signal.SIGKILL:
        assert time.monotonic() - killed < 45
        assert parent.returncode == 128 + 9, out
        assert re.search(r"process 1 \(pid \d+\) was killed by SIGKILL", out)
        assert f"-- experiments.few_shot --resume {folder}" in out
    else:  # both save what both have, within the time that clusters give
        assert time.monotonic() - killed < 30
        assert parent.returncode == 130, out
        assert "stopped and saved; to resume: python -m experiments.few_shot" in out
    from metalstm.runtime.checkpoints import latest

    saved = latest(state)
    assert saved is not None
    resumed = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.few_shot", "--resume", str(folder)),
            *("--episodes", str(4 * saved + 40)),
        ],
        cwd=TESTS.parent,
        env=environment(4) | {"METALSTM_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "cpu, 4 devices," in resumed.stdout
    assert f"resuming at episode {4 * saved:,}" in resumed.stdout
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").open()]
    seen = [row["episode"] for row in rows if row["kind"] == "train"]
    assert seen == sorted(set(seen))
    assert seen[-1] == 4 * saved + 40


def test_the_model_of_step_times():
    link, parts = scaling.Link(1e9, 1e-5), scaling.Parts(1e-3, 250_000)
    assert scaling.ring_seconds(250_000, 1, link) == 0
    # one megabyte there and back in two messages, by hand
    assert scaling.ring_seconds(250_000, 2, link) == pytest.approx(1e-3 + 2e-5)
    assert scaling.ring_seconds(250_000, 64, link) == pytest.approx(1.96875e-3 + 126e-5)
    assert scaling.step_seconds(parts, 2, 3, link) == pytest.approx(4.02e-3)
    for hosts in (2, 64):
        tasks = scaling.tasks_for(parts, hosts, link)
        travels = scaling.ring_seconds(250_000, hosts, link)
        assert travels <= 0.1 * scaling.step_seconds(parts, hosts, tasks, link)
        assert travels > 0.1 * scaling.step_seconds(parts, hosts, tasks - 1, link)
    assert scaling.tasks_for(parts, 1, link) == 1


# what is refused, on the one device of these tests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "num_processes, process_id missing"),
        ({"num_processes": 2, "process_id": 0}, "coordinator missing"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout=0: choose 1 or more"),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            "coordinator='a': give host:port",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "process_id=2 of num_processes=2",
        ),
        ({}, "no cluster's environment .*: give coordinator=host:port"),
    ],
)
def test_joining_names_what_is_missing(options, message, monkeypatch):
    # what initialize does where it finds no cluster, without its search of the network
    def found_nothing(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", found_nothing)
    with pytest.raises(ValueError, match=message):
        processes.initialize(**options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"coordinator": "a:1"},
            "--coordinator needs --num-processes and --process-id",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 0},
            "--coordinator goes with --distributed",
        ),
        ({"devices": 0}, "--devices 0: choose 1 or more"),
        ({"cpu_devices": 0}, "--cpu-devices 0: choose 1 or more"),
        ({"devices_per_task": 0}, "--devices-per-task 0: choose 1 or more"),
        ({"heartbeat_timeout": 0}, "--heartbeat-timeout 0: choose 1 or more"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        devices.check(devices.Devices(**flags))


IN_TURN = """
import json, sys
from experiments.learned_optimizer import __main__ as learned_optimizer
for line in json.loads(sys.argv[1]):
    assert learned_optimizer.main(line) == 0
"""


def test_a_cpu_counts_as_several_devices(tmp_path):
    """The same meta-steps over two devices that split tasks, or each task; refused once
    JAX has started."""
    from experiments.learned_optimizer import __main__ as learned_optimizer

    jax.devices()
    with pytest.raises(ValueError, match="--cpu-devices 2: JAX has started"):
        devices.join(devices.Devices(cpu_devices=2))
    line = (
        "--dim 2 --l2l.hidden-size 3 --l2l.num-layers 1 --num-tasks 2 "
        "--unroll-steps 2 --horizon 4 --meta-steps 6 --validate-every 6 --steps 4 "
        "--study none"
    ).split()
    assert learned_optimizer.main([*line, "--workdir", str(tmp_path / "one")]) == 0
    folders = [tmp_path / name for name in ("one", "tasks", "coordinates")]
    lines = [
        [*line, "--workdir", str(folders[1]), "--cpu-devices", "2"],
        # in the same process, which has two devices by now
        [*line, "--workdir", str(folders[2]), "--devices-per-task", "2"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(lines)],
        env=os.environ | {"XLA_FLAGS": QUICK_XLA, "JAX_PLATFORMS": "cpu"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cpu, 2 devices,") == 2
    losses = [losses_of(folder) for folder in folders]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def losses_of(folder: Path) -> list[float]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").open()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_run_is_resumed_where_its_command_line_says(tmp_path):
    """Not in as many processes as before, of which there may be none."""
    from experiments.common.saved_options import to_json
    from experiments.few_shot import command_line as few_shot
    from experiments.learned_optimizer import command_line as optimizers

    elsewhere = "--distributed --coordinator a:1 --num-processes 2 --process-id 1"
    for parse in (few_shot.parse, optimizers.parse):
        before = parse(elsewhere.split())
        assert before.devices.process_id == 1
        document = {"config": to_json(before), "methods": {}}
        (tmp_path / "config.json").write_text(json.dumps(document))
        config = parse(["--resume", str(tmp_path)])
        assert config.devices == devices.Devices()
        again = parse(["--resume", str(tmp_path), "--devices", "2"])
        assert again.devices == devices.Devices(devices=2)
    assert {name.split(".")[1] for name in devices.MAY_CHANGE} == {
        *devices.Devices.__struct_fields__
    }


def eight_devices(monkeypatch, processes: int = 1) -> None:
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * 8)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "process_count", lambda: processes)


def test_a_mesh_takes_as_many_devices_as_divide_the_tasks(monkeypatch):
    assert sharding.task_mesh(4) is None
    assert devices.describe(None) == "1 device"
    eight_devices(monkeypatch)
    sizes = {n: sharding.task_mesh(n) for n in (16, 8, 6, 4, 1)}
    used = {n: 1 if mesh is None else mesh.size for n, mesh in sizes.items()}
    assert used == {16: 8, 8: 8, 6: 6, 4: 4, 1: 1}
    assert devices.describe(sizes[4]) == "4 of 8 devices"
    assert devices.describe(sizes[8]) == "8 devices"
    groups = {n: sharding.task_mesh(n, devices_per_task=2) for n in (4, 3, 1)}
    shapes = {n: dict(mesh.shape) for n, mesh in groups.items()}
    assert shapes == {n: {"task": n, "coordinate": 2} for n in (4, 3, 1)}
    assert devices.describe(groups[1]) == "2 of 8 devices"


def test_devices_that_do_not_divide_the_tasks_are_refused(monkeypatch):
    eight_devices(monkeypatch)
    with pytest.raises(ValueError, match="num_devices=9: choose 1 to 8"):
        sharding.task_mesh(num_devices=9)
    with pytest.raises(ValueError, match="num_tasks=6 is not a multiple of the 4 d"):
        sharding.task_mesh(6, num_devices=4)
    with pytest.raises(ValueError, match=r"--tasks 6, --devices 4: num.* of 4, 8"):
        devices.mesh_for(devices.Devices(devices=4), 6, "--tasks")
    with pytest.raises(ValueError, match="devices_per_task=3: choose a divisor of the"):
        sharding.task_mesh(8, devices_per_task=3)
    with pytest.raises(ValueError, match="of the 2 groups of 2 devices: choose"):
        sharding.task_mesh(3, num_devices=4, devices_per_task=2)
    with pytest.raises(ValueError, match=r"--devices-per-task 3: .*choose a divisor"):
        devices.mesh_for(devices.Devices(devices_per_task=3), 8, "--tasks")
    with pytest.raises(ValueError, match=r"--tasks 3, .*of the 2 groups of 2 devices"):
        devices.mesh_for(devices.Devices(devices=4, devices_per_task=2), 3, "--tasks")
    with pytest.raises(ValueError, match="--devices 9: num_devices=9"):
        devices.mesh_for(devices.Devices(devices=9), 9, "--tasks")
    eight_devices(monkeypatch, processes=2)
    assert devices.describe(sharding.task_mesh(8)) == "8 devices in 2 processes"
    with pytest.raises(ValueError, match="8 devices of 2 processes: choose num_tasks"):
        sharding.task_mesh(4)
    with pytest.raises(ValueError, match="num_devices=4: choose 8, all of them"):
        sharding.task_mesh(8, num_devices=4)
    with pytest.raises(ValueError, match=r"--meta-batch 4: .*multiple of the 8 d"):
        devices.mesh_for(devices.Devices(), 4, "--meta-batch")


def test_a_step_says_that_its_tasks_do_not_divide(monkeypatch):
    class Three:
        axis_names, shape = ("task",), {"task": 3}
        devices = np.array(jax.devices())

    # the mesh of three devices that this machine lacks
    monkeypatch.setattr(jax, "shard_map", lambda fn, **_: fn)
    step = meta_step.make_train_step(toy(), optax.sgd(1.0), mesh=Three())
    state = meta_step.init_train_state(toy(), optax.sgd(1.0), 0, tiny.episode())
    with pytest.raises(
        ValueError, match=r"the 4 tasks .* mesh's 3 devices: choose 3, 6"
    ):
        step(state, tiny.episodes(4))


def two_processes(monkeypatch) -> list[bool]:
    """What this process asks the other, which agrees to everything."""
    asked: list[bool] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes, "any_process", lambda flag: asked.append(flag) or flag
    )
    return asked


def test_processes_agree_on_the_time_when_they_report(monkeypatch):
    loop = meta_step.make_train_loop(toy(), optax.sgd(1.0), SPEC, num_tasks=2)
    state = meta_step.init_train_state(toy(), optax.sgd(1.0), 0, EPISODE)
    asked = two_processes(monkeypatch)
    options = {"num_steps": 9, "report_every": 3, "max_seconds": 0}
    end = fitting.fit(loop, fitting.init_fit_state(state), None, **options)
    assert int(end.train.step) == 3
    assert asked == [True]


def test_processes_agree_on_ctrl_c_when_they_report(monkeypatch):
    loop = meta_step.make_train_loop(toy(), optax.sgd(1.0), SPEC, num_tasks=2)
    state = meta_step.init_train_state(toy(), optax.sgd(1.0), 0, EPISODE)
    asked, saved = two_processes(monkeypatch), []
    wanted = iter([False, True, True, True])
    options = {"num_steps": 9, "report_every": 3, "save": saved.append}
    end = fitting.fit(
        loop,
        fitting.init_fit_state(state),
        None,
        stop=lambda: next(wanted),
        **options,
    )
    assert int(end.train.step) == 3
    assert asked == [False, True]
    assert saved == [end]


def test_one_process_agrees_with_itself():
    assert processes.any_process(True)
    assert not processes.any_process(False)
    assert processes.from_main("näher") == "näher"

    def fails():
        raise KeyError("x")

    with pytest.raises(KeyError):
        processes.on_main(fails)
    tree = {"a": np.arange(3.0)}
    assert sharding.place(tree, None) is not None
    np.testing.assert_array_equal(sharding.local(tree)["a"], tree["a"])
