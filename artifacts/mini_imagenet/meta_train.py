"""Meta-train the Meta-LSTM from a pre-trained theta_0; validation only. Resumable.

  python meta_train.py --name m0_1 --init f4 --shot 1 --episodes 1000 --data MINI_IMAGENET

theta_0: the pre-trained body and a head tied over the classes; features of one length;
batch norm frozen. Gates and theta_0 have each their own rate of Adam (0: not trained).
Validation is of all 600 images a class, always the same episodes. `--at-start` also
validates before the first step. Writes NAME.npz (arrays by path) and NAME.json.
"""

from __future__ import annotations

import argparse, json, os, time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalstm
from metalstm import algorithms, data, nn, rules
from metalstm.base import Learner, LearnerState
from metalstm.data.augment import crop_flip


def one_length(body: Learner, length: float) -> Learner:
    def apply(state, x, *, norm, key=None):
        f, after = body.apply(state, x, norm=norm, key=key)
        size = jnp.sqrt((f * f).sum(-1, keepdims=True) + 1e-12)
        return length * f / size, after

    return Learner(body.init, apply)


def state_of(npz) -> LearnerState:
    with np.load(npz) as f:
        a = {k: jnp.asarray(f[k]) for k in f.files}
    body, stats = {}, {}
    for i in range(1, 5):
        body[f"conv{i}"] = {"kernel": a[f"params.conv{i}.kernel"], "bias": jnp.zeros(32)}
        body[f"norm{i}"] = {k: a[f"params.norm{i}.{k}"] for k in ("scale", "bias")}
        group = "clean" if "clean.norm1.mean" in a else "stats"
        stats[f"norm{i}"] = {k: a[f"{group}.norm{i}.{k}"] for k in ("mean", "var")}
    head = {"kernel": jnp.zeros((800, 1)), "bias": jnp.zeros((1,))}
    return LearnerState({"body": body, "head": head}, stats, {})


def logit(p):
    return float(np.log(p / (1 - p)))


def by_path(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="."): np.asarray(v)
            for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def load(tree, arrays):
    def leaf(k, v):
        got = arrays[jax.tree_util.keystr(k, simple=True, separator=".")]
        assert got.shape == np.shape(v), k
        return jnp.asarray(got)
    return jax.tree_util.tree_map_with_path(leaf, tree)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--name", required=True)
    p.add_argument("--init", required=True)
    p.add_argument("--data", default=os.environ.get("DATA"))
    p.add_argument("--shot", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--episodes", type=int, default=1000)
    p.add_argument("--tasks", type=int, default=1)
    p.add_argument("--train-way", type=int, default=5)
    p.add_argument("--train-queries", type=int, default=15)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--order", default="first")
    p.add_argument("--hidden", type=int, default=4)
    p.add_argument("--i-head", type=float, default=0.1)
    p.add_argument("--i-body", type=float, default=1e-3)
    p.add_argument("--length", type=float, default=5.0)
    p.add_argument("--lr-gates", type=float, default=1e-3)
    p.add_argument("--lr-theta", type=float, default=0.0)
    p.add_argument("--clip", type=float, default=0.25)
    p.add_argument("--left-out", type=int, default=0,
                   help="meta-train on the training classes from this one on")
    p.add_argument("--roll", type=int, default=0, help="which class is the first")
    p.add_argument("--augment", type=int, default=1)
    p.add_argument("--validate-every", type=int, default=250)
    p.add_argument("--validation-episodes", type=int, default=300)
    p.add_argument("--final-episodes", type=int, default=1000)
    p.add_argument("--at-start", action="store_true")
    a = p.parse_args()
    spec = json.loads(Path(a.init + ".json").read_text())["spec"]
    learner = nn.tied_head(one_length(
        nn.conv4(None, final_relu=bool(spec["final_relu"]), momentum=0.95), a.length))
    h, b = logit(a.i_head), logit(a.i_body)
    rule = rules.lstm_gates(hidden_size=a.hidden, bias_per="tensor", input_bias=(b, b),
                            forget_bias=(10.0, 10.0), input_bias_of={"head": (h, h)})
    order = metalstm.first_order() if a.order == "first" else metalstm.second_order()
    algorithm = algorithms.published_meta_lstm(
        learner, rule, num_steps=a.steps, query_norm="frozen", train_query_norm="frozen",
        gradient_scale="way", train_way=a.train_way, support_stats="final", differentiation=order)
    pools = data.load_mini_imagenet(a.data)
    train_pool = jax.tree.map(lambda leaf: jnp.roll(leaf, -a.roll, 0)[a.left_out:], pools.train)
    train_spec = data.EpisodeSpec(a.train_way, a.shot, a.train_queries,
                                  augment=crop_flip() if a.augment else None)
    test_spec = data.EpisodeSpec(5, a.shot, 15)
    steps = a.episodes // a.tasks

    def labels(params):
        return params._replace(**{
            part: jax.tree.map(lambda _: part, getattr(params, part)) for part in params._fields})

    def adam(rate):
        if not rate:
            return optax.set_to_zero()
        return optax.chain(optax.clip_by_global_norm(a.clip),
                           optax.adam(optax.cosine_decay_schedule(rate, steps, 0.1)))

    optimizer = optax.multi_transform(
        {"learner": adam(a.lr_theta), "rule": adam(a.lr_gates)}, labels)
    one = train_spec.sample(data.episode_key(0, "train", 0), train_pool)
    state = metalstm.init_train_state(algorithm, optimizer, a.seed, one)
    params = state.params._replace(learner=state_of(a.init + ".npz"))
    state = jax.tree.map(jnp.array, state._replace(params=params, opt_state=optimizer.init(params)))
    evaluate = metalstm.make_evaluate(algorithm, test_spec, batch_size=4)

    def validate(params, episodes):
        start = time.time()
        got = evaluate(params, pools.validation, num_episodes=episodes, seed=1, split="validation")
        acc = np.asarray(got.accuracies) * 100
        return {"mean": round(float(acc.mean()), 2), "ci95": round(float(1.96 * acc.std(ddof=1) / len(acc) ** 0.5), 2),
                "episodes": episodes, "seconds": round(time.time() - start)}, acc

    log = {"args": vars(a), "curve": [], "seconds": 0.0, "done": False, "best": None}
    ck, out = Path(a.name + ".state.npz"), Path(a.name + ".json")
    best = state.params
    if ck.exists():
        with np.load(ck) as f:
            arrays = dict(f)
        log = json.loads(str(arrays.pop("log")))
        state = load(state, {k[6:]: v for k, v in arrays.items() if k.startswith("state.")})
        best = load(state.params, {k[5:]: v for k, v in arrays.items() if k.startswith("best.")})
    elif a.at_start:
        log["start"], _ = validate(state.params, a.validation_episodes)
        print("start", log["start"], flush=True)
    loop = metalstm.make_train_loop(algorithm, optimizer, train_spec, num_tasks=a.tasks)
    # batch norm keeps its statistics of whole images: meta-training's are of crops
    fixed = jax.device_get((state_of(a.init + ".npz").stats, state.carry))
    start, seen = time.time(), []
    while int(state.step) < steps:
        state, metrics = loop(state, train_pool)
        stats, carry = jax.tree.map(jnp.array, fixed)
        kept = state.params.learner._replace(stats=stats)
        state = state._replace(params=state.params._replace(learner=kept), carry=carry)
        seen.append(metrics)
        n = int(state.step)
        if n % max(1, a.validate_every // a.tasks) == 0 or n == steps:
            mean = {k: round(float(np.mean([float(np.mean(m[k])) for m in seen])), 4) for k in seen[0]}
            seen = []
            value, _ = validate(state.params, a.validation_episodes)
            line = {"episode": n * a.tasks, "train": mean, "validation": value}
            log["seconds"] += time.time() - start
            start = time.time()
            log["curve"].append(line)
            if log["best"] is None or value["mean"] > log["best"]["validation"]["mean"]:
                log["best"], best = line, jax.tree.map(jnp.array, state.params)
            print(line, round(log["seconds"]), flush=True)
            arrays = {"state." + k: v for k, v in by_path(state._replace(carry=state.carry)).items()}
            arrays |= {"best." + k: v for k, v in by_path(best).items()}
            np.savez(str(ck) + ".tmp.npz", log=json.dumps(log), **arrays)
            os.replace(str(ck) + ".tmp.npz", ck)
            out.write_text(json.dumps(log, indent=1))
    final, acc = validate(best, a.final_episodes)
    log |= {"final": final, "done": True, "seconds": log["seconds"]}
    np.savez(a.name + ".npz", accuracies=acc.astype(np.float32), **by_path(best))
    out.write_text(json.dumps(log, indent=1))
    ck.unlink()
    print("final", final, flush=True)


if __name__ == "__main__":
    main()
