"""The Meta-LSTM started from a pre-trained body, before any meta-training: validation.

  python start_meta_lstm.py RUN.npz --data MINI_IMAGENET [--episodes 200]

theta_0: the pre-trained body and a tied head of zeros; features of one length before the
head; batch norm frozen at pre-training's averages; gates whose biases are set by hand.
"""

from __future__ import annotations

import argparse, json, time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.algorithms import published_meta_lstm
from metalstm.base import Learner, LearnerState
from metalstm.data import EpisodeSpec, load_mini_imagenet
from metalstm.evaluation import make_evaluate
from metalstm.learners import conv4, tied_head
from metalstm.rules import lstm_gates


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
        group = "clean" if "clean.norm1.mean" in a else "stats"  # whole images: a little better
        stats[f"norm{i}"] = {k: a[f"{group}.norm{i}.{k}"] for k in ("mean", "var")}
    head = {"kernel": jnp.zeros((800, 1)), "bias": jnp.zeros((1,))}
    return LearnerState({"body": body, "head": head}, stats, {})


def logit(p):
    return float(np.log(p / (1 - p)))


def algorithm(final_relu, *, steps, i_head, i_body, f_bias=10.0, length=5.0, hidden=4):
    learner = tied_head(one_length(conv4(None, final_relu=final_relu, momentum=0.95), length))
    h, b = logit(i_head), logit(i_body)
    rule = lstm_gates(
        hidden_size=hidden, bias_per="tensor", input_bias=(b, b), forget_bias=(f_bias, f_bias),
        input_bias_of={"head": (h, h)},
    )
    return published_meta_lstm(
        learner, rule, num_steps=steps, query_norm="frozen", train_query_norm="frozen",
        gradient_scale="way", train_way=5, support_stats="final",
    )


def main():
    p = argparse.ArgumentParser()
    p.add_argument("npz")
    p.add_argument("--data", required=True)
    p.add_argument("--episodes", type=int, default=200)
    p.add_argument("--shots", default="1,5")
    p.add_argument("--heads", default="0.03,0.1")
    p.add_argument("--bodies", default="1e-6,1e-3")
    p.add_argument("--steps", type=int, default=5)
    a = p.parse_args()
    spec = json.loads(Path(a.npz).with_suffix(".json").read_text())["spec"]
    pool = load_mini_imagenet(a.data).validation
    state = state_of(a.npz)
    for shot in map(int, a.shots.split(",")):
        for i_head in map(float, a.heads.split(",")):
            for i_body in map(float, a.bodies.split(",")):
                alg = algorithm(bool(spec["final_relu"]), steps=a.steps, i_head=i_head, i_body=i_body)
                es = EpisodeSpec(way=5, shot=shot, queries=15)
                episode = es.sample(jax.random.key(0), pool)
                meta = alg.init(jax.random.key(0), episode)._replace(learner=state)
                start = time.time()
                got = make_evaluate(alg, es, batch_size=4)(
                    meta, pool, num_episodes=a.episodes, seed=1, split="validation"
                )
                print(f"shot {shot} i_head {i_head} i_body {i_body}: {got} [{time.time() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
