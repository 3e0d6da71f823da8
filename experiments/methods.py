"""From flags to the JSON specs that `metalstm.runs` builds methods from."""

from __future__ import annotations

from typing import Any

from experiments.config import HAND_MADE, Config

Spec = dict[str, Any]

# Rates that tuning starts from; the grid grows by itself when the best is at its edge.
RATE_GRIDS = {
    "sgd": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "momentum": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    "adagrad": (0.001, 0.003, 0.01, 0.03, 0.1),
    "adadelta": (0.3, 1.0, 3.0, 10.0, 30.0),
    "adam": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "scratch": (0.01, 0.03, 0.1, 0.3, 1.0),
    "finetune-head": (0.003, 0.01, 0.03, 0.1, 0.3),
    "finetune-all": (0.001, 0.003, 0.01, 0.03, 0.1),
    "baseline++": (0.003, 0.01, 0.03, 0.1, 0.3),
}

# Methods that compare embeddings: the constructor and its options.
COMPARING: dict[str, tuple[str, Spec]] = {
    "hallucination": ("hallucination", {}),
    "prototypical": ("prototypical", {}),
    "prototypical-cosine": ("prototypical", {"distance": "cosine"}),
    "matching": ("matching", {}),
    "matching-euclidean": ("matching", {"distance": "euclidean"}),
    "matching-fce": ("matching", {"context_steps": 3}),
    "relation": ("relation", {}),
    "relation-softmax": ("relation", {"loss": "cross_entropy"}),
    "siamese": ("siamese", {}),
    "siamese-triplet": ("siamese", {"loss": "triplet"}),
}
# Transfer floors: the constructor and its options. Those with one classifier share
# their pre-training.
TRANSFER: dict[str, tuple[str, Spec]] = {
    "feature-neighbour": ("pretrained_features", {"compare": "neighbour"}),
    "feature-centroid": ("pretrained_features", {"compare": "centroid"}),
    "feature-cosine": ("pretrained_features", {"compare": "cosine"}),
    "am-softmax": ("margin_classifier", {"loss": "am_softmax"}),
    "arcface": ("margin_classifier", {"loss": "arcface"}),
    # a fixed scale: with their own length, features shrank and learned little
    "sphereface": ("margin_classifier", {"loss": "sphereface", "scale": 30.0}),
    "finetune-head": ("fine_tuning", {"tune": "head"}),
    "finetune-all": ("fine_tuning", {"tune": "all"}),
    "baseline++": ("fine_tuning", {"tune": "head", "classifier": "cosine"}),
}


def method_specs(config: Config, num_train_classes: int = 2) -> dict[str, Spec]:
    """One spec a method, in the order of --algorithms.

    ``num_train_classes``: of meta-training, rotations included; what the transfer
    floors pre-train on.
    """
    specs = {name: _spec(name, config) for name in config.methods.algorithms}
    for name in TRANSFER.keys() & specs.keys():
        specs[name]["algorithm"]["options"]["num_classes"] = num_train_classes
    return specs


def pretraining(spec: Spec) -> tuple[str, Spec] | None:
    """What a transfer floor's pre-training is called, and how to build it.

    It is validated by the comparison that costs least. None for other methods.
    """
    options = spec["algorithm"].get("options", {})
    if spec["algorithm"]["name"] not in ("fine_tuning", "pretrained_features"):
        return None
    kind = options.get("classifier", "linear")
    compare = "cosine" if kind == "cosine" else "centroid"
    own: Spec = {"num_classes": options["num_classes"]}
    own |= {"compare": compare, "classifier": kind}
    algorithm = {"name": "pretrained_features", "options": own}
    return f"pretrained-{kind}", spec | {"algorithm": algorithm}


def _spec(name: str, config: Config) -> Spec:
    way = config.data.way
    if name == "nearest-neighbour":
        return {"algorithm": {"name": "nearest_neighbour"}, "way": way}
    spec: Spec = {"learner": _learner(config), "way": way}
    inner = _inner_loop(config)
    second = {"second_order": config.methods.order == "second"}
    rate = config.methods.inner_rate
    if name in COMPARING:
        constructor, own = COMPARING[name]
        options: Spec = own | {"train_way": config.methods.train_way or way}
        options |= {"train_queries": config.data.train_queries}
        if name == "hallucination":
            options["num_generated"] = config.methods.imagined
        spec["algorithm"] = {"name": constructor, "options": options}
        if constructor == "relation":
            spec |= _relation(config)
    elif name == "mann":
        options = {"train_queries": config.data.train_queries}
        options |= {"num_slots": config.methods.memory_slots}
        options |= {"hidden_size": config.methods.memory_hidden}
        spec["algorithm"] = {"name": name, "options": options}
    elif name in TRANSFER:
        constructor, own = TRANSFER[name]
        options = dict(own)
        if constructor == "fine_tuning":
            options["num_steps"] = config.methods.finetune_steps
        spec["algorithm"] = {"name": constructor, "options": options}
    elif name == "meta-lstm":
        spec["rule"] = {"name": "lstm_gates", "options": _gates(config)}
        options = inner | second | {"learn_init": not config.methods.draw_init}
        options["support_stats"] = config.methods.support_stats or "moving"
        if config.methods.gradient_scale == "batch":
            options["gradient_scale"] = "1/batch"
        spec["algorithm"] = {"name": "meta_lstm", "options": options}
    elif name == "learned-sgd":
        steps = max(config.methods.steps, config.methods.test_steps or 0)
        options = {"rate": rate, "per": "tensor", "num_steps": steps}
        spec["rule"] = {"name": "learned_sgd", "options": options}
        spec["algorithm"] = {"name": "learned_init", "options": inner | second}
    elif name == "gradient-agreement":
        weighed = _spec(config.methods.agreement_of, config)
        algorithm = weighed["algorithm"]
        options = algorithm["options"] | {"of": algorithm["name"]}
        spec = weighed | {"algorithm": {"name": "gradient_agreement"}}
        spec["algorithm"]["options"] = options
    elif name == "reptile":
        options = inner | {"rule": config.methods.adam_rate}
        options |= {"test_batch_size": inner["batch_size"]}
        options |= {"batch_size": config.methods.train_batch}
        options |= {"train_shots": config.methods.train_shots}
        spec["algorithm"] = {"name": "reptile", "options": options}
        spec["outer_step"] = config.methods.outer_step
    elif name == "imaml":
        options = inner | {"rule": rate, "strength": config.methods.proximal}
        spec["algorithm"] = {"name": "implicit_maml", "options": options}
    elif name in ("maml", "fomaml", "anil", "meta-sgd"):
        start = [rate, rate] if name == "meta-sgd" else rate
        options = inner | {"rate": start}
        spec["algorithm"] = {"name": name.replace("-", "_"), "options": options}
    elif name in HAND_MADE:
        spec["rule"] = _optimizer(name)
        fixed = {"second_order": False, "trainable": False}
        spec["algorithm"] = {"name": "learned_init", "options": inner | fixed}
    elif name == "scratch":
        spec["rule"] = _optimizer("sgd")
        options = {"num_steps": config.methods.scratch_steps}
        if config.methods.query_norm != "frozen":  # nothing is gathered here
            options["query_norm"] = config.methods.query_norm
        spec["algorithm"] = {"name": "from_scratch", "options": options}
    return spec


def _learner(config: Config) -> Spec:
    spec = _body(config)
    return spec | {"tied_head": True} if config.learner.tied_head else spec


def _body(config: Config) -> Spec:
    options = config.learner
    shared = {
        "norm": options.norm,
        "scale_init": options.scale_init,
        "initializer": options.initializer,
        "zero_head": options.zero_head,
        "momentum": options.norm_momentum,
    }
    if options.learner == "mlp":
        kept = {name: shared[name] for name in ("initializer", "zero_head")}
        return {"name": "mlp", "options": kept | {"widths": list(options.widths)}}
    if options.learner == "resnet12":
        first = options.filters
        widths = [first, first * 5 // 2, first * 5, first * 10]
        return {"name": "resnet12", "options": shared | {"widths": widths}}
    own = {
        "filters": options.filters,
        "num_blocks": options.blocks,
        "downsample": "stride" if options.strided else "max_pool",
        "final_relu": options.final_relu,
    }
    return {"name": "conv4", "options": shared | own}


def _relation(config: Config) -> Spec:
    """Feature maps, halved twice as published, and the network that compares them."""
    learner, options = _learner(config), config.learner
    if learner["name"] == "conv4":
        learner["options"] |= {"feature_maps": True}
        learner["options"] |= {"num_halvings": min(2, options.blocks)}
    net = {
        "filters": options.filters,
        "norm": options.norm,
        "scale_init": options.scale_init,
        "initializer": options.initializer,
    }
    return {"learner": learner, "relation_net": net}


def _inner_loop(config: Config) -> dict[str, Any]:
    methods = config.methods
    options: dict[str, Any] = {
        "num_steps": methods.steps,
        "num_test_steps": methods.test_steps,
        "query_norm": methods.query_norm,
        "train_query_norm": methods.train_query_norm,
        "support_stats": methods.support_stats or "final",
        "batch_size": methods.support_batch,
        "train_queries": config.data.train_queries,
    }
    if config.learner.tied_head:
        options["train_way"] = methods.train_way or config.data.way
    options["gradient_scale"] = "way" if methods.gradient_scale == "way" else 1.0
    if methods.task_mapping is not None:
        options["task_mapping"] = methods.task_mapping
    return options


def _gates(config: Config) -> dict[str, Any]:
    rule = config.rule
    head = rule.head_input_bias
    return {
        "hidden_size": rule.hidden,
        "variant": rule.variant,
        "forget": rule.forget,
        "input": rule.input,
        "loss_input": rule.loss_input,
        "theta_input": rule.theta_input,
        "carry_input": rule.carry_input,
        "feature_gradient": rule.features,
        "forget_bias": list(rule.forget_bias),
        "input_bias": list(rule.input_bias),
        "input_bias_of": None if head is None else {"head": list(head)},
        "bias_per": rule.bias_per,
        "num_bias_steps": max(config.methods.steps, config.methods.test_steps or 0),
    }


def _optimizer(name: str) -> Spec:
    options: dict[str, Any] = {"learning_rate": 0.01}
    if name == "momentum":
        options["momentum"] = 0.9
    return {"name": name, "options": options}
