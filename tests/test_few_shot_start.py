"""A run whose theta_0 starts from another run's, and theta_0's own learning rate."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import tiny
from few_shot_runs import META_LSTM, command, read, tiny_dataset

import metalstm
from experiments.common.run_folder import write_json
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot.command_line import parse
from experiments.few_shot.methods import kind_of
from experiments.few_shot.optimizer import make_optimizer
from experiments.few_shot.options import Training
from metalstm import algorithms, data
from metalstm.base import MetaParams

pytestmark = pytest.mark.usefixtures("tiny_instead_of_glyphs")


def test_theta_0_comes_from_the_named_run_and_stays(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    line = command(
        "--algorithms", "meta-lstm", *META_LSTM, "--init-from", f"{finished}:meta-lstm",
        "--theta-learning-rate", 0, "--seed", 3, "--episodes", 4, "--validate-every", 2,
        workdir=folder,
    )  # fmt: skip
    assert few_shot.main(line) == 0
    said = capsys.readouterr().out
    took = f"meta-lstm starts from meta-lstm of {finished}: 4 arrays"
    assert f"{took}; as drawn: its rule\n" in said
    spent = read(folder / "results.json")["methods"]["meta-lstm"]["meta_training"]
    assert spent["init_from"] == f"{finished}:meta-lstm"
    before, after = (
        metalstm.load_run(f, "meta-lstm").params for f in (finished, folder)
    )
    tiny.assert_equal(before.learner, after.learner)
    for old, new in zip(*map(jax.tree.leaves, (before.rule, after.rule)), strict=True):
        assert not np.array_equal(old, new)


def test_a_run_resumes_without_what_it_started_from(finished, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished, source)
    line = command(
        "--algorithms", "meta-lstm", *META_LSTM, "--init-from", source,
        "--episodes", 4, workdir=folder,
    )  # fmt: skip
    assert few_shot.main(line) == 0
    before = metalstm.load_run(folder).params
    shutil.rmtree(source)
    assert few_shot.main(["--resume", str(folder)]) == 0
    tiny.assert_equal(before, metalstm.load_run(folder).params)


def test_no_episodes_leave_the_trained_network_as_it_is(finished, tmp_path):
    line = command(
        "--algorithms", "maml", "--rate", 0.1, "--init-from", f"{finished}:meta-lstm",
        "--episodes", 0, "--schedule", "cosine", workdir=tmp_path / "run",
    )  # fmt: skip
    assert few_shot.main(line) == 0
    before = metalstm.load_run(finished, "meta-lstm").params
    tiny.assert_equal(
        before.learner, metalstm.load_run(tmp_path / "run").params.learner
    )


def test_no_episodes_test_no_rule_that_is_not_trained(finished, tmp_path, capsys):
    line = command(
        "--algorithms", "meta-lstm", *META_LSTM, "--init-from", f"{finished}:meta-lstm",
        "--episodes", 0, workdir=tmp_path / "run",
    )  # fmt: skip
    assert few_shot.main(line) == 2
    assert (
        f"a rule that is not trained: --evaluate {finished}" in capsys.readouterr().err
    )


CONV = (
    "--learner conv4 --filters 2 --num-blocks 1 --norm batch --downsample stride"
).split()
TIED = ["--tied-head", "--rate", "0.1"]


def of_convolutions(method: str, *extra: object) -> list[str]:
    small = command()[command().index("--way") :]  # its network is another
    tied = TIED if method == "maml" else []
    return [*small, *CONV, *tied, "--algorithms", method, *map(str, extra)]


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    """A run with batch norm, which uses the support set's statistics."""
    folder = tmp_path_factory.mktemp("convolutions") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_glyphs", tiny_dataset)
        line = of_convolutions("maml", "--episodes", 4, "--workdir", folder)
        assert few_shot.main(line) == 0
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("maml --downsample max_pool", "--downsample stride"),
        ("maml --no-final-relu", "give --final-relu"),
        ("prototypical --episodes 0", "has no averages, which prototypical reads"),
        ("mann --no-train-learner --num-slots 4", "averages, which mann reads"),
    ],
)
def test_a_network_that_would_be_another_function_is_refused(
    line, message, convolutions, tmp_path, capsys
):
    line = of_convolutions(
        *line.split(), "--workdir", tmp_path / "run", "--init-from", convolutions
    )
    assert few_shot.main(line) == 2
    error = capsys.readouterr().err
    assert "error: --init-from" in error
    assert message in error


def test_images_normalised_in_another_way_are_refused(convolutions, capsys):
    shutil.copytree(convolutions, "copy")
    file = Path("copy") / "predictors.json"
    write_json(file, read(file) | {"normalise": [[0.5], [0.2]]})
    line = of_convolutions("maml", "--workdir", "run", "--init-from", "copy")
    assert few_shot.main(line) == 2
    assert "normalise=[[0.5], [0.2]], and these have None" in capsys.readouterr().err


def test_averages_that_nobody_gathered_are_not_tested(convolutions, capsys):
    again = ["--evaluate", str(convolutions), "--query-norm", "frozen"]
    assert few_shot.main(again) == 2
    assert "maml was meta-trained with the support" in capsys.readouterr().err


def test_the_calibrated_step_is_of_the_training_images(tmp_path):
    line = command(
        "--algorithms", "meta-lstm", "--hidden-size", 2, "--num-steps", 2,
        "--episodes", 4, "--learning-rate", 1e-9, workdir=tmp_path / "run",
    )  # fmt: skip
    assert few_shot.main(line) == 0
    predict = metalstm.load_run(tmp_path / "run")
    key = data.episode_key(0, "train", 0)
    episode = data.EpisodeSpec(3, 1, 2).sample(key, tiny_dataset().train)
    tx = optax.sgd(0.1)
    expected = metalstm.init_train_state(predict.algorithm, tx, 0, episode).params
    np.testing.assert_allclose(predict.params.rule[0], expected.rule[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "add --init-from"),
        (("--init-from", "RUN", "--seeds", 2), "drop --seeds"),
        (("--init-from", "RUN", "--minutes", 1), "drop --minutes"),
    ],
)
def test_no_episodes_of_nothing_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        parse(command("--algorithms", "meta-lstm", "--episodes", 0, *extra))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("scratch --init-from RUN", "RUN: scratch starts from nothing"),
        ("mann --no-train-learner", "--no-train-learner keeps what --init-from brings"),
        (
            "maml --frozen-stats kept --query-norm frozen --train-query-norm frozen",
            "--frozen-stats kept keeps what --init-from brings",
        ),
    ],
)
def test_a_start_goes_with_what_starts(line, message):
    with pytest.raises(ValueError, match=message):
        parse(command("--algorithms", *line.split()))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--widths", "5"), r"is \[5\] in the new learner and \[6\] in the trained"),
        (("--init-from", "nowhere"), "nowhere is not a run folder"),
        (("--init-from", "{run}:maml"), "method='maml': choose one of"),
        (("--init-from", "{run}:nearest-neighbour"), "no network to start from"),
        (
            ("--init-from", "omniglot-prototypical-0:maml"),
            "a file holds one method: drop :maml",
        ),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_is_refused(
    extra, message, finished, tmp_path, capsys
):
    given = [word.format(run=finished) for word in extra]
    line = command(
        "--algorithms", "meta-lstm", *META_LSTM, "--init-from", finished, *given,
        workdir=tmp_path / "run",
    )  # fmt: skip
    assert few_shot.main(line) == 2
    error = capsys.readouterr().err
    assert "error: --init-from" in error
    assert message.replace("\\", "") in error


def test_theta_0_has_a_learning_rate_of_its_own():
    """Adam's first step is the rate, whatever the gradient."""
    method = kind_of("meta-lstm", "mlp")().method
    training = Training(learning_rate=0.1, theta_learning_rate=0.01, clip=0.0)
    algorithm = algorithms.meta_lstm(tiny.tanh_net(), num_steps=1)
    params = algorithm.init(jax.random.key(0), tiny.episode())
    optimizer = make_optimizer(method, training)
    ones = jax.tree.map(np.ones_like, params)
    step, _ = optimizer.update(ones, optimizer.init(params), params)
    for part, rate in (("learner", 0.01), ("rule", 0.1)):
        for leaf in jax.tree.leaves(getattr(step, part)):
            np.testing.assert_allclose(leaf, -rate, rtol=1e-5)
    with pytest.raises(ValueError, match="methods that learn theta_0 for a rule"):
        optimizer.init(params.learner)


def test_without_it_the_optimizer_is_adam_with_clipping():
    method = kind_of("meta-lstm", "mlp")().method
    params = MetaParams({"a": np.ones(3, np.float32)}, {"b": np.ones(2, np.float32)})
    grads = jax.tree.map(lambda leaf: 3 * leaf, params)
    ours = make_optimizer(method, Training(learning_rate=0.1, clip=0.5))
    usual = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
    mine, theirs = (o.update(grads, o.init(params), params)[0] for o in (ours, usual))
    tiny.assert_equal(mine, theirs)
