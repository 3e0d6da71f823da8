"""The command line of few_shot: what flags and presets mean, and what is refused."""

from __future__ import annotations

import functools
import inspect
import json
import re

import jax
import pytest
from few_shot_runs import SMALL

from experiments.common.saved_options import flags_of, from_json, to_json
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot import methods, presets
from experiments.few_shot.command_line import parse
from experiments.few_shot.methods import LEARNERS, METHODS, options_of
from experiments.few_shot.options import Common, Options, Retest
from experiments.few_shot.presets import Preset
from experiments.few_shot.train import may_change
from metalstm import algorithms, nn, rules
from metalstm.algorithms.gradient.published import DEFAULT_GATES
from metalstm.predictor import example_episode
from metalstm.specs import build_algorithm, build_learner, build_rule

MODULES = {"learner": nn.networks}


@functools.cache
def parsed(line: str) -> Options:
    return parse(line.split())


def arguments_of(factory) -> set[str]:
    """Also those that a factory passes on as **options, to the one that takes them."""
    found = set(inspect.signature(factory).parameters)
    passing = "options" in found
    return found | (arguments_of(algorithms.learned_init) if passing else set())


# -- flags are constructors' arguments -------------------------------------------------

# What is an option without being an argument: `more` of methods.toml.
OTHER_NAMES = set("optimizer order keep last adam_rate outer_step of rule rate".split())


@pytest.mark.parametrize("name", METHODS)
def test_options_are_their_constructors_arguments(name):
    own = METHODS[name].default
    factory = getattr(algorithms, own.constructor)
    known = arguments_of(factory)
    if name == "gradient-agreement":  # and those of what is weighed
        known |= arguments_of(algorithms.maml)
    assert set(own.__struct_fields__) - OTHER_NAMES <= known
    defaults = {n: p.default for n, p in inspect.signature(factory).parameters.items()}
    for field in {"distance", "classifier", "compare", "num_slots", "strength"}:
        if hasattr(own, field) and name in ("mann", "imaml", "siamese"):
            assert getattr(own, field) == defaults[field]


def test_the_options_of_rules_and_networks_likewise():
    gates = inspect.signature(rules.lstm_gates).parameters
    own = methods.Gates()
    for field in own.__struct_fields__:
        if field != "input_bias_of":
            default = DEFAULT_GATES.get(field, gates[field].default)
            assert getattr(own, field) == default
    networks = {"conv4": "Conv4", "mlp": "MLP", "resnet12": "ResNet12"}
    for name, options in LEARNERS.items():
        module = getattr(nn.networks, networks[name])
        fields = set(options.__struct_fields__) - {
            "learner", "tied_head", "feature_length",
        }  # fmt: skip
        assert fields <= set(inspect.signature(module).parameters)
    assert LEARNERS["conv4"]().filters == nn.networks.Conv4.filters


def test_one_flag_sets_every_method_and_a_prefix_one():
    line = "--algorithms meta-lstm,maml,scratch --num-steps 3 --maml.num-steps 4"
    options = parsed(f"{line} --filters 8 --scratch.filters=6 --rate 0.3")
    steps = {name: own.method.num_steps for name, own in options.methods.items()}
    # a fresh learner needs more updates than an inner loop
    assert steps == {"meta-lstm": 3, "maml": 4, "scratch": 50}
    filters = [own.learner.filters for own in options.methods.values()]
    assert filters == [8, 8, 6]
    assert options.methods["maml"].method.rate == 0.3
    later = parsed("--algorithms maml --maml.rate 0.2 --rate 0.3")
    assert later.methods["maml"].method.rate == 0.2, "its own flag, wherever it stands"


def test_the_network_of_one_method():
    options = parsed("--algorithms maml,anil --anil.learner mlp --anil.widths 5 6")
    assert options.methods["maml"].learner.learner == "conv4"
    assert options.methods["anil"].learner.widths == (5, 6)
    spec = methods.specs_of(options)["anil"]["learner"]
    assert spec["learner"] == "mlp"
    assert spec["num_classes"] == 5


def test_how_to_differentiate():
    def of(line: str) -> dict | None:
        name = line.split()[1]
        return methods.specs_of(parsed(line))[name].get("differentiation")

    second = of("--algorithms meta-lstm --order second --keep remat --last 2")
    assert second == {"order": "second", "keep": "remat", "last": 2}
    assert of("--algorithms meta-lstm")["order"] == "second"
    assert of("--algorithms fo-meta-lstm")["order"] == "first"
    assert of("--algorithms maml")["order"] == "second"
    assert of("--algorithms maml --last 1")["last"] == 1


@pytest.mark.parametrize("topic", ["", "meta-lstm", "maml", "mann", "conv4", "devices"])
def test_help_is_short(topic, capsys):
    with pytest.raises(SystemExit) as info:
        parse(["--help", *topic.split()])
    assert info.value.code == 0
    shown = re.findall(
        r"^\W{0,3}(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE
    )
    assert 3 < len(shown) <= 45
    expected = {"": "--way", "meta-lstm": "--forget-bias", "maml": "--rate"}
    assert expected.get(topic, shown[0]) in shown


# -- presets ---------------------------------------------------------------------------


def test_presets_name_options_that_exist():
    known = flags_of(Common)
    of_methods = {
        name: set().union(*(flags_of(methods.kind_of(name, n)) for n in LEARNERS))
        for name in METHODS
    }
    for preset in presets.read_presets().values():
        assert set(preset.shared) <= known.union(*of_methods.values())
        for name, settings in preset.each.items():
            assert not set(settings) & known, "the same for all methods of a table"
            kin = set().union(*of_methods.values())
            assert set(settings) <= kin, name


@pytest.mark.parametrize("name", sorted(presets.read_presets()))
def test_presets_are_options_that_work(name, tmp_path):
    options = parsed(f"--preset {name}")
    assert options.run.preset == name
    document = {"config": to_json(options), "data": {}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert options_of(tmp_path) == options


def test_published_recipes():
    """Ravi & Larochelle's code, and Finn et al.'s."""
    for preset, shot, steps, momentum, episodes in (
        ("ravi-5shot", 5, 8, 0.05, 50_000),
        ("ravi-1shot", 1, 12, 0.1, 75_000),
    ):
        options = parsed(f"--preset {preset}")
        own = options.methods["meta-lstm"]
        assert (options.data.shot, options.data.queries) == (shot, 15)
        assert own.method.num_steps == steps
        assert own.learner.momentum == momentum
        assert (own.training.episodes, own.training.meta_batch) == (episodes, 1)
        assert (own.training.learning_rate, own.training.clip) == (1e-3, 0.25)
        rule = own.method.rule
        assert rule.hidden_size == 20
        assert (rule.forget_bias, rule.input_bias) == ((4, 5), (-5, -4))
        spec = methods.specs_of(options)["meta-lstm"]
        assert spec["differentiation"]["order"] == "first"
        assert spec["gradient_scale"] == "1/batch"
        assert spec["support_stats"] == "moving"
        assert spec["train_query_norm"] == "transductive"
        assert spec["query_norm"] == "support"
    maml = parsed("--preset maml-omniglot").methods["maml"]
    assert (maml.method.rate, maml.method.num_steps) == (0.4, 1)
    assert maml.training.meta_batch == 32
    mini = parsed("--preset maml-mini-imagenet").methods["fomaml"].method
    assert (mini.num_steps, mini.num_test_steps, mini.rate) == (5, 10, 0.01)


@pytest.fixture
def mine(monkeypatch):
    """A preset whose methods have settings of their own."""
    shared = {"way": 3, "num_steps": 2, "algorithms": ["meta-lstm", "sgd"]}
    each = {
        "meta-lstm": {"filters": 8, "num_steps": 3, "rotations": True},
        "sgd": {"filters": 4, "num_steps": 4},
        "matching": {"filters": 6, "episodes": 7},
    }
    monkeypatch.setattr(presets, "read_presets", lambda: {"mine": Preset(shared, each)})
    return "--preset mine --algorithms meta-lstm,sgd,matching,maml".split()


def test_methods_have_settings_of_their_own(mine):
    own = parse(mine).methods
    # sgd starts from meta-lstm's theta_0, so it adapts its learner
    filters = {name: one.learner.filters for name, one in own.items()}
    assert filters == {"meta-lstm": 8, "sgd": 8, "matching": 6, "maml": 32}
    steps = {n: own[n].method.num_steps for n in ("meta-lstm", "sgd", "maml")}
    assert steps == {"meta-lstm": 3, "sgd": 4, "maml": 2}
    assert own["matching"].training.episodes == 7
    assert own["sgd"].training.rotations


def test_the_command_line_wins_over_a_preset(mine):
    # also when it says what the preset has for the others
    own = parse([*mine, "--num-steps", "2", "--filters=5", "--no-rotations"]).methods
    assert {one.learner.filters for one in own.values()} == {5}
    assert own["sgd"].method.num_steps == own["meta-lstm"].method.num_steps == 2
    assert not own["meta-lstm"].training.rotations
    assert own["matching"].training.episodes == 7


def test_flags_override_presets():
    line = "--preset demo --algorithms meta-lstm --input-bias-of head -1.5 -1"
    spec = methods.specs_of(parsed(line))["meta-lstm"]
    assert spec["rule"]["input_bias_of"] == {"head": (-1.5, -1)}
    demo = parsed("--preset demo --way 7 --algorithms maml")
    assert (demo.data.way, demo.data.dataset) == (7, "glyphs")
    assert demo.methods["maml"].learner.tied_head
    assert parsed("--preset demo").methods["scratch"].method.num_steps == 20


# -- methods ---------------------------------------------------------------------------


def test_all_names_every_method():
    for preset in ("", "--preset omniglot", "--preset mini-imagenet"):
        options = parsed(f"{preset} --algorithms all")
        assert options.run.algorithms == tuple(options.methods) == tuple(METHODS)
        assert set(methods.specs_of(options)) == set(METHODS)


@functools.cache
def specs_of_omniglot() -> dict:
    return methods.specs_of(parsed("--preset omniglot --algorithms all"), 781)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_omniglot_preset_predicts(name):
    """By shapes alone: nothing is compiled."""
    spec = json.loads(json.dumps(specs_of_omniglot()[name]))
    algorithm = build_algorithm(spec)
    episode = example_episode((28, 28, 1), 5)

    def predict():
        params = algorithm.init(jax.random.key(0), episode)
        key, (support, query) = jax.random.key(0), episode
        return algorithm.predict(params, key, support, query.x, num_classes=5)

    assert jax.eval_shape(predict).shape == (5, 5)


def test_transfer_methods_share_what_has_the_same_settings():
    line = "--algorithms finetune-head,finetune-all,feature-cosine --finetune-all."
    options = parsed(f"{line}filters 8")
    wanted, uses = methods.pretrainings(options, methods.specs_of(options, 9))
    assert uses == {
        "finetune-head": "pretrained-linear",
        "finetune-all": "pretrained-linear-2",
        "feature-cosine": "pretrained-linear",
    }
    assert wanted["pretrained-linear-2"].spec["learner"]["filters"] == 8
    assert wanted["pretrained-linear-2"].options.learner.filters == 8
    spec = dict(wanted["pretrained-linear"].spec)
    assert spec.pop("learner")["num_classes"] is None
    assert spec == {
        "algorithm": "pretrained_features", "num_classes": 9, "compare": "centroid",
        "classifier": "linear", "batch_size": None, "per_class": None,
        "centroid_weight": 0.0,
    }  # fmt: skip


def test_what_may_change_when_a_run_is_resumed(mine):
    changeable = may_change(parse([*mine, "--matching.schedule", "cosine"]))
    assert {"methods.maml.training.episodes", "data.data_dir"} <= set(changeable)
    assert "methods.matching.training.minutes" in changeable
    assert "methods.matching.training.episodes" not in changeable


def test_spec_builders_refuse_unknown_names():
    with pytest.raises(ValueError, match="learner='vgg': choose one of conv4"):
        build_learner({"learner": "vgg"})
    with pytest.raises(ValueError, match="there is no rule 'lion'"):
        build_rule({"rule": "lion"})
    with pytest.raises(ValueError, match="your own by mymodule:my_rule"):
        build_rule({"rule": "mymodule.my_rule"})
    with pytest.raises(ValueError, match="algorithm='magic'"):
        build_algorithm({"algorithm": "magic", "learner": {"learner": "mlp"}})
    spec = {"algorithm": "maml", "learner": {"learner": "mlp", "num_classes": 2}}
    with pytest.raises(ValueError, match=r"maml cannot be built of its spec: .*rates"):
        build_algorithm(spec | {"rates": 0.1})


# -- refusals --------------------------------------------------------------------------

ONE = "--algorithms nearest-neighbour"
MISTAKES = [
    ("--algorithms meta-lsmt", "did you mean meta-lstm"),
    ("--algorithms maml,maml", "names maml twice"),
    ("--algorithms ,", "--algorithms is empty"),
    ("--algorithms sgd", "add one of meta-lstm, fo-meta-lstm, maml"),
    (
        "--algorithms reptile --theta-learning-rate 0",
        "reptile moves theta_0 by --outer",
    ),
    (
        "--algorithms maml,sgd --learner mlp --sgd.widths 8",
        "sgd adapts the network of m",
    ),
    (
        "--algorithms scratch,maml --scratch.init-from no",
        "scratch starts from nothing t",
    ),
    ("--preset rawi-5shot", "did you mean ravi-5shot"),
    ("--preset demo --resume x", "drop --preset"),
    ("--wey 5", "--wey: did you mean way?"),
    ("5 --algorithms maml", "5: options begin with --"),
    (f"{ONE} --rate 0.1", "none of the chosen methods (nearest-neighbour) has it"),
    (f"{ONE} --maml.rate 0.1", "--maml.rate: --algorithms has nearest-neighbour; add"),
    ("--algorithms maml --maml.rates 1", "--maml.rates: did you mean rate?"),
    ("--mamml.rate 0.1", "--mamml.rate: did you mean maml"),
    ("--algorithms mann --hidden-size 3", "such as --mann.hidden-size"),
    ("--algorithms maml --learner vgg", "--learner vgg: choose conv4, mlp, resnet12"),
    ("--algorithms maml --num-steps 0", "--num-steps 0: choose 1 or more"),
    ("--shot 0", "--shot 0: choose 1 or more"),
    ("--way five", "--way: invalid literal for int() with base 10: 'five'"),
    ("--algorithms maml --maml.num-steps x", "--maml.num-steps: invalid literal"),
    ("--algorithms maml --maml.rate nan", "--maml.rate nan: give a number"),
    ("--algorithms maml --learning-rate 0", "--learning-rate 0: choose a number above"),
    ("--algorithms maml --batch-size 2", "does not divide the 5 images"),
    (
        "--algorithms reptile --train-shots 4 --batch-size 3",
        "--batch-size 3 does not divide the 20 images",
    ),
    (
        "--algorithms reptile --train-shots 4 --test-batch-size 4",
        "--test-batch-size 4 does not divide the 5 images",
    ),
    (
        "--algorithms maml --accumulate-tasks 3 --meta-batch 4",
        "--meta-batch 4 is not a multiple of --accumulate-tasks 3: choose 3, say",
    ),
    ("--algorithms maml --schedule cosine --minutes 1", "needs --episodes"),
    ("--algorithms maml --query-norm all", "goes with --evaluate"),
    ("--algorithms maml --query-norm frozen", "add --train-query-norm frozen"),
    ("--algorithms maml --queries 2 --train-way 4", "wrap it in metalstm.nn.tied_head"),
    ("--algorithms meta-lstm,sgd --no-learn-init", "drop sgd"),
    ("--algorithms meta-lstm --order first --last 1", "needs --order second"),
    ("--resume nowhere", "not a run folder"),
    ("--resume nowhere --workdir x", "not a run folder"),
    ("--evaluate nowhere", "not a run folder"),
    ("--evaluate", "--evaluate is empty"),
    ("--help nothing", "--help nothing: "),
    ("--dataset omniglott", "choose glyphs, omniglot"),
    ("--dataset folders", "--data-dir"),
    ("--dataset folders --data-dir nowhere", "nowhere"),
    ("--dataset mini-imagenet --data-dir nowhere", "mini-ImageNet"),
    ("--way 700", "way=700 is more than the 5 classes"),
    ("--way 700", "choose way <= 5"),
    ("--shot 9", "choose shot + queries <= 6"),
    ("--normalise imagenet", "3 channels"),
    ("--image-size 20", "glyphs are drawn at 28"),
    ("--skip-corrupt", "is for --dataset folders"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(
    line, message, capsys, tmp_path, monkeypatch
):
    from few_shot_runs import tiny_dataset

    from metalstm import data

    monkeypatch.setattr(data, "load_glyphs", tiny_dataset)
    monkeypatch.chdir(tmp_path)
    chosen = "" if "--algorithms" in line or "--evaluate" in line else ONE
    assert few_shot.main([*chosen.split(), *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(capsys):
    assert (
        few_shot.main([*SMALL, "--algorithms", "maml", "--shot", "0", "--debug"]) == 2
    )
    assert "Traceback" in capsys.readouterr().err


def test_options_survive_their_file_and_refuse_other_types():
    options = parsed("--preset demo")
    saved = to_json(options)
    common = from_json(Common, saved)
    assert common == Common(options.data, options.test, options.run, options.devices)
    own = methods.kind_of("meta-lstm", "conv4")
    assert from_json(own, saved["methods"]["meta-lstm"]) == options.methods["meta-lstm"]
    saved["data"] |= {"of_another_version": 1, "data_dir": "a/b"}
    del saved["data"]["way"]  # added since then
    again = from_json(Common, saved)
    assert (again.data.way, str(again.data.data_dir)) == (5, "a/b")
    with pytest.raises(
        ValueError, match=r"Expected `int`, got `str` - at `\$.data.way`"
    ):
        from_json(Common, saved | {"data": {"way": "five"}})


def test_evaluation_takes_the_options_of_the_run(tmp_path):
    options = parsed("--algorithms maml,scratch --way 3 --seed 4")
    document = {"config": to_json(options), "data": {}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    line = ["--evaluate", str(tmp_path), "--shot", "2", "--query-norm", "all"]
    again = parse([*line, "--num-test-steps", "3"])
    assert (again.data.way, again.data.shot, again.run.seed) == (3, 2, 4)
    assert again.retest == Retest("all", 3)
    assert again.methods == options.methods
    for flag in ("--filters", "--maml.rate", "--episodes"):
        with pytest.raises(
            ValueError, match=f"{flag.split('.')[-1][-4:]}.*as they were"
        ):
            parse([*line, flag, "3"])
