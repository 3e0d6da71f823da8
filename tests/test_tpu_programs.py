"""Programs in the form that TPUs are given, and what is read of them when compiled.

No TPU and no compiler for it is needed here. `python -m benchmarks.tpu --check` looks
at what that compiler makes of them.
"""

from __future__ import annotations

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import metalstm
from benchmarks import hlo, tpu, tpu_limits, tpu_programs
from metalstm import algorithms, data, nn, second_order
from metalstm.nn.convolution import conv2d
from metalstm.nn.pooling import max_pool, scaled_max_pool
from metalstm.runtime.compilation import platform, traced_for
from metalstm.tasks import default_task_mapping

COMPILED = """\
HloModule jit_run

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %inner = (s32[], f32[8,4]{1,0}) while(%p), condition=%cond.2, body=%body.2
  ROOT %sum.1 = f32[8,4]{1,0} fusion(%p), calls=%fused, metadata={op_name="jit(run)/while/body/net/add"}, backend_config={"estimated_cycles":"10"}
}

%cond.1 (p.1: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%p.1, %limit), direction=LT
}

%body.2 (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  ROOT %copy.7 = s8[8,2,2,4,2,4]{5,4,3,2,1,0:T(8,128)} copy(%p.2), backend_config={"estimated_cycles":"3"}
}

%cond.2 (p.3: (s32[], f32[8,4])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(5)
  ROOT %less.2 = pred[] compare(%p.3, %limit.2), direction=LT
}

%fused (x: f32[8,4]) -> f32[8,4] {
  ROOT %tanh.1 = f32[8,4]{1,0} tanh(%x), backend_config={"estimated_cycles":"999"}
}

ENTRY %main.1 (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %mean = (f32[8,4]{1,0}, f32[3]{0}) all-reduce(%a, %b), to_apply=%add
  %loop = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond.1, body=%body.1
  ROOT %out = f32[8,4]{1,0} copy(%loop), backend_config={"estimated_cycles":"100"}
}
"""  # noqa: E501


def test_loops_are_multiplied_out_and_fusions_counted_once():
    found = {op.name: op for op in hlo.operations(COMPILED)}
    cycles = {name: (op.times, op.cycles) for name, op in found.items() if op.cycles}
    assert cycles == {"copy.7": (60, 180), "sum.1": (12, 120), "out": (1, 100)}
    assert found["sum.1"].source == "net/add"
    assert hlo.rank(found["copy.7"].shape) == 6
    assert hlo.array_bytes(found["copy.7"].shape) == 8 * 2 * 2 * 4 * 2 * 4
    assert hlo.collectives(list(found.values())) == {"all-reduce": (1, 4 * 35)}
    with pytest.raises(ValueError, match="it has no ENTRY"):
        hlo.operations("a page of something else")


def test_figures_and_broken_promises_of_a_program():
    found = tpu_programs.figures("prototypical-5shot", "v5e", COMPILED)
    assert found["cycles"] == 400
    assert found["ms"] == pytest.approx(400 / 1.5e6)
    assert [share for share, _ in found["costliest"][:3]] == [0.45, 0.3, 0.25]
    assert found["six_axes_cycles"] == 180
    assert found["unestimated_bytes"] == 0
    assert found["sampling_share"] == 0
    drawn = COMPILED.replace("while/body/net/add", "sample/vmap()/add")
    drawn = tpu_programs.figures("prototypical-5shot", "v5e", drawn)
    assert drawn["sampling_share"] == pytest.approx(0.3)
    of_sum = COMPILED.replace(', backend_config={"estimated_cycles":"10"}', "")
    unknown = tpu_programs.figures("prototypical-5shot", "v5e", of_sum)
    assert unknown["unestimated_bytes"] == 12 * 4 * 32
    assert tpu.broken_promises(found) == []
    gathered = COMPILED.replace("all-reduce(", "all-gather(")
    broken = tpu.broken_promises(
        tpu_programs.figures("prototypical-5shot", "v5e", gathered)
    )
    assert broken == ["1 of all-gather"]


def test_without_the_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'jax\[tpu\]==.*no TPU is"):
        tpu_programs.start_compiler()


def test_what_is_traced_for_one_platform_serves_no_other():
    here = platform()
    double = jax.jit(lambda x: 2 * x if platform() == "tpu" else x + x)
    for name in ("cpu", "tpu", "cpu"):
        with traced_for(name):
            assert platform() == name
            assert ("mul" in str(jax.make_jaxpr(double)(1.0))) == (name == "tpu")
            assert default_task_mapping() == ("vmap" if name == "tpu" else "scan")
    assert platform() == here
    with pytest.raises(ValueError, match="platform='cuda': choose one of cpu, gpu"):
        traced_for("cuda").__enter__()


def test_a_convolution_is_the_platform_s():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    for name, has_primitive in (("cpu", True), ("tpu", False), ("gpu", False)):
        with traced_for(name):
            text = str(jax.make_jaxpr(conv2d)(x, kernel))
        assert ("blocked_correlate" in text) == has_primitive


def for_tpu(fn, *args) -> str:
    """The program of ``fn`` as a TPU is given it."""
    with traced_for("tpu"):
        return export.export(jax.jit(fn), platforms=["tpu"])(*args).mlir_module()


def most_axes(text: str) -> int:
    """Of all arrays in a program but kernels, which may be stacked."""
    shapes = re.findall(r"tensor<((?:\d+x)+)", text)
    return max(shape.count("x") for shape in shapes if "3x3x" not in shape)


@pytest.mark.parametrize("size", [6, 7])
def test_no_pool_of_a_tpu_has_an_axis_for_the_rows_of_a_cell(size):
    """Its compiler writes such an array to memory, for each comparison of each use."""
    x, slope = jnp.ones((2, size, size, 3)), jnp.array([1.0, -1.0, 1.0])
    for pool in (max_pool, lambda x: scaled_max_pool(x, slope)):
        gradient = jax.grad(lambda x, pool=pool: (pool(x) ** 3).sum())
        curvature = lambda x, gradient=gradient: jax.jvp(gradient, (x,), (x,))[1]  # noqa: E731
        fourth = lambda x, c=curvature: jax.grad(lambda x: c(x).sum())(x)  # noqa: E731
        for fn in (pool, gradient, curvature, fourth):
            assert most_axes(for_tpu(fn, x)) == 4
            assert most_axes(for_tpu(jax.vmap(fn), x[None])) == 5


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 19, 12, 12, 7), np.uint8)
SPEC = data.EpisodeSpec(way=3, shot=2, queries=4)


def test_an_episode_is_drawn_from_the_pool_where_it_lies():
    pool = data.make_pool(IMAGES)  # of 133 examples, two of whose shapes are alike
    assert pool.stored.shape == (133, 8, 128)
    text = for_tpu(lambda seed, pool: SPEC.sample(jax.random.key(seed), pool), 0, pool)
    of_pool = [line for line in text.splitlines() if "tensor<133x" in line]
    reading = [line for line in of_pool if "func.func" not in line]
    assert reading
    for line in reading:  # a gather of whole examples, and nothing else
        assert "stablehlo.gather" in line or "call @" in line
        if "gather" in line:
            assert "slice_sizes = array<i64: 1, 8, 128>" in line


def test_a_pool_keeps_its_examples_in_tiles_where_that_costs_little():
    tiled = data.make_pool(IMAGES)
    np.testing.assert_array_equal(tiled.images, IMAGES.reshape(-1, 12, 12, 7))
    np.testing.assert_array_equal(tiled.of_class(3), IMAGES[3])
    np.testing.assert_array_equal(tiled.take(jnp.array([40])), IMAGES[2, 2:3])
    vectors = data.make_pool(np.ones((2, 3, 640), np.float32) * np.arange(3)[:, None])
    assert vectors.stored.shape == (6, 640)
    other = tiled.with_images(np.asarray(tiled.images[:, :2, :2, :1]))
    assert (other.stored.shape, other.shape) == ((133, 2, 2, 1), (2, 2, 1))
    with pytest.raises(ValueError, match="images has 4 examples: give one for each of"):
        tiled.with_images(IMAGES[0, :4])
    with pytest.raises(ValueError, match=r"must be uint8 of shape .* shape \[252\]"):
        tiled.with_images(np.asarray(tiled.images, np.uint8).reshape(133, -1)[:, :252])
    with pytest.raises(IndexError, match="there is no class 99: the pool has 0 to 6"):
        tiled.of_class(99)


def test_a_meta_step_for_tpus_has_their_convolutions_and_one_pool():
    algorithm = algorithms.maml(
        nn.conv4(3, 4, num_blocks=2), 0.1, num_steps=2, differentiation=second_order()
    )
    optimizer = metalstm.adam_clipped()
    pool = data.make_pool(IMAGES)

    def run(seed, pool):
        episode = SPEC.sample(jax.random.key(seed), pool)
        state = metalstm.init_train_state(algorithm, optimizer, seed, episode)
        train = metalstm.make_train_loop(algorithm, optimizer, SPEC, num_tasks=2)
        return train(state, pool)

    text = for_tpu(run, 0, pool)
    assert "stablehlo.convolution" in text
    assert most_axes(text) == 5
    shapes = set(re.findall(r"tensor<(133x[\dx]+)", text))
    assert shapes == {"133x8x128x"}  # in no other layout


def test_an_exchange_is_a_ring_along_each_axis_of_the_chips():
    assert tpu_programs.exchange_ms({}, "v5e", 1) == 0
    found = tpu_programs.exchange_ms({"all-reduce": (1, 4 * 50_000)}, "v5e", 256)
    each = 2 * 15 / 16 * 200_000 / 50e9 + 2 * 15 * 1e-6
    assert found == pytest.approx(2e3 * each)


def test_the_least_time_of_a_product_is_that_of_whole_tiles():
    limits = tpu_limits.ChipLimits(tpu_programs.CHIPS["v5e"])
    assert limits.probe == pytest.approx(196_608)  # GFLOP/s, the published peak
    assert limits.product(4096, 256, 128) == pytest.approx(limits.probe)
    assert limits.product(4096, 27, 32) == pytest.approx(
        limits.probe * 27 * 32 / 128**2
    )
    # either operand may stand still: the 80 rows do here
    assert limits.product(80, 128, 4096) == pytest.approx(limits.probe * 80 / 128)
    # four pixels of 32 filters in one product read six columns by three rows: of 640 x
    # 128 numbers in the unit they use 4 x 288 x 32
    assert limits.convolution(8, 48, 32, 32, 1) == pytest.approx(limits.probe * 0.45)
    assert limits.convolution(8, 48, 128, 128, 1) == pytest.approx(limits.probe)


@pytest.mark.parametrize("name", tpu_programs.PROGRAMS)
def test_no_program_can_be_faster_than_its_arithmetic_and_its_traffic(name):
    for chip, of_chip in tpu_programs.CHIPS.items():
        found = tpu_limits.bound(name, chip)
        assert found.at_least >= max(found.arithmetic, found.memory)
        assert found.at_least <= found.arithmetic + found.memory
        flops = 1e9 * tpu_programs.gflop(tpu_programs.PROGRAMS[name])
        peak_ms = 1e3 * flops / (of_chip.flops * of_chip.hertz)
        assert found.matrix_share == pytest.approx(peak_ms / found.at_least)
        assert 0 < found.matrix_share < 1
