"""Verification of a run: the same numbers as the library's, a table, a figure, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.saved_options import to_json
from experiments.few_shot import data as sources
from experiments.few_shot.command_line import parse
from experiments.few_shot.methods import options_of, specs_of
from experiments.few_shot.options import Data
from experiments.few_shot.train import checkpoint_of
from experiments.studies import verification
from metalstm import algorithms, data
from metalstm import verification as library
from metalstm.predictor import example_episode
from metalstm.run_file import load_params
from metalstm.runtime import checkpoints
from metalstm.specs import build_algorithm, build_learner

METHODS = ("prototypical", "hallucination", "am-softmax", "nearest-neighbour")


def people(seed: int, number: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Eight noisy 6x6 pictures of each of some people."""
    rng = np.random.default_rng(seed)
    faces = rng.uniform(60, 200, (number, 1, 6, 6))
    x = faces + rng.normal(0, 30, (number, 8, 6, 6))
    y = np.repeat([f"{name}{k}" for k in range(number)], 8)
    return np.clip(x, 0, 255).astype(np.uint8).reshape(-1, 6, 6), y


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a run leaves, but that nothing has been trained."""
    folder = tmp_path_factory.mktemp("run")
    x, y = people(0, 40, "a")
    np.savez(folder / "people.npz", x=x, y=y)
    line = f"--dataset arrays --data-dir {folder / 'people.npz'} --queries 2 "
    line += f"--learner mlp --widths 8 --algorithms {','.join(METHODS)}"
    options = parse(line.split())
    source = sources.load_source(options.data, options.methods)
    specs = specs_of(options, source.dataset.train.num_classes)
    for name in METHODS[:-1]:
        algorithm = build_algorithm(specs[name])
        episode = example_episode(source.dataset.image_shape, 5)
        params = jax.jit(algorithm.init)(jax.random.key(1), episode)
        checkpoints.save(
            folder / checkpoint_of(name), params, step=0, metadata={}, keep=1
        )
    about = {"config": to_json(options), "data": source.describe()}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def command(run: Path, *more: object, to: str = "out") -> int:
    line = ["--pairs", "600", "--bootstrap", "20", *map(str, more)]
    return verification.main([str(run), *line, "--workdir", to])


def read(folder: str = "out") -> dict:
    assert Path(folder, "verification.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads(Path(folder, "results.json").read_text())


def test_a_run_is_verified_on_the_classes_it_tests_on(run, capsys):
    assert command(run) == 0
    printed = capsys.readouterr().out
    found = read()
    tested = data.load_arrays(run / "people.npz")
    assert found["identities"] == len(tested.class_names["test"]) == 8
    assert (found["examples"], found["split"]) == (64, "test")
    assert found["data"]["checksum"] == tested.checksum
    assert found["pairs"] == {"same": 300, "different": 300}
    compared = {name: row["similarity"] for name, row in found["methods"].items()}
    assert compared == {
        "prototypical": "euclidean",
        "hallucination": "euclidean",
        "am-softmax": "cosine",
        "pixels": "euclidean",
    }
    x, labels = library.pool_examples(tested.test)
    specs = specs_of(options_of(run), tested.train.num_classes)
    learner = build_learner(specs["am-softmax"]["learner"])
    for name in ("prototypical", "am-softmax"):
        params, _ = load_params(run / checkpoint_of(name), specs[name], (6, 6, 1))
        state = algorithms.embedding_state(params)
        named = np.array(tested.class_names["test"])[labels]
        options = {"num_pairs": 600, "similarity": compared[name]}
        expected = library.verify(learner, state, x, named, **options).summary(0.01)
        row = found["methods"][name]
        for key, value in expected._asdict().items():
            assert row[key] == pytest.approx(value)
            low, high = row["ci95"][key]
            assert low <= high
        assert f"{100 * expected.equal_error_rate:.1f} (" in printed
    for words in ("8 identities, 64 examples, 600 pairs", "true at 1% false", "pixels"):
        assert words in printed
    assert "table.md, results.json, verification.png in out" in printed


def test_other_identities_from_a_file_and_from_folders(run, tmp_path, capsys):
    from PIL import Image

    x, y = people(7, 5, "b")
    np.savez(tmp_path / "others.npz", x=x, y=y)
    for index, (image, name) in enumerate(zip(x, y, strict=True)):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / name / f"{index}.png")
    chosen = ("--methods", "prototypical", "--similarity", "cosine")
    for kind, where in (("arrays", "others.npz"), ("folders", "images")):
        flags = ("--dataset", kind, "--data-dir", tmp_path / where, *chosen)
        assert command(run, *flags, to=kind) == 0
        found = read(kind)
        assert (found["identities"], found["examples"]) == (5, 40)
        assert found["split"] == "all that is given"
        assert list(found["methods"]) == ["prototypical", "pixels"]
        assert {m["similarity"] for m in found["methods"].values()} == {"cosine"}
        assert found["methods"]["pixels"]["equal_error_rate"] < 0.2
    trained = "note: the run was trained on some of these identities"
    assert trained not in capsys.readouterr().out
    flags = ("--dataset", "arrays", "--data-dir", run / "people.npz", *chosen)
    assert command(run, *flags, to="own") == 0
    assert trained in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods siamese", "--methods siamese: "),
        ("--methods nearest-neighbour", "does not embed: choose from prototypical"),
        ("--pairs 100", "--pairs 100: choose 200 or more"),
        ("--bootstrap 1", "--bootstrap 1: choose 2 or more"),
        ("--dataset folders", "--dataset folders: say where they are with --data-dir"),
        ("--dataset arrays --data-dir no.npz", "no file no.npz; give a .npz"),
    ],
)
def test_mistakes_are_one_line(run, flags, message, capsys):
    assert command(run, *flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_what_a_run_cannot_serve(run, tmp_path, capsys):
    assert command(tmp_path) == 2
    assert "is not a run folder" in capsys.readouterr().err
    x, y = people(7, 5, "b")
    np.savez(tmp_path / "wide.npz", x=x[:, :, :5], y=y)
    flags = ("--dataset", "arrays", "--data-dir", tmp_path / "wide.npz")
    assert command(run, *flags) == 2
    said = capsys.readouterr().err
    assert "has examples of [6, 5, 1], and" in said
    assert "trained on [6, 6, 1]: make them alike" in said
    about = json.loads((run / "config.json").read_text())
    about["data"]["image_shape"] = [6, 5, 1]
    (tmp_path / "config.json").write_text(json.dumps(about))
    flags = ("--dataset", "folders", "--data-dir", tmp_path)
    assert command(tmp_path, *flags, to="folders") == 2
    assert "gives squares, and" in capsys.readouterr().err
    methods = about["config"]["methods"]
    about["config"]["methods"] = {"nearest-neighbour": methods["nearest-neighbour"]}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert command(tmp_path) == 2
    assert "train prototypical, siamese or arcface" in capsys.readouterr().err


def test_images_are_normalised_as_in_training():
    from experiments.studies.verification import _normalised

    x = np.full((2, 3, 3, 3), 51, np.uint8)
    found = _normalised(x, [[0.1, 0.2, 0.3], [0.5, 1.0, 2.0]])
    np.testing.assert_allclose(found[0, 0, 0], [0.2, 0.0, -0.05], atol=1e-6)
    assert _normalised(x, None) is x


def test_a_run_on_arrays_needs_to_know_which(run):
    config = Data("arrays")
    with pytest.raises(ValueError, match=r"say where with --data-dir FILE.npz"):
        sources.load_source(config, {})
    sized = Data("arrays", run / "people.npz", image_size=28)
    with pytest.raises(ValueError, match=r"--image-size: arrays are used at their own"):
        sources.load_source(sized, {})
