import sys, jax, jax.numpy as jnp, numpy as np, time
from metalstm import rules
from metalstm.learned_optimizers import make_paired_runs, with_random_scaling, make_loss_curves
from metalstm.base import UpdateRule
from experiments.learned_optimizer import meta_tasks
from experiments.learned_optimizer.general_training import _mean_log
rule = rules.moment_gates(); fresh = rule.init(jax.random.key(0), {})
zero = jax.tree.map(lambda x: 0.0, fresh)
def shifted(by):
    p = jax.tree.map(lambda x: x, fresh); p["output"]["bias"] = p["output"]["bias"].at[0].add(by); return p
S = (-1.0, -0.5, 0.0, 0.5, 1.0)
if sys.argv[1] == "val":
    told = UpdateRule(rule.init, lambda params: rules.with_progress(rule.bind(params), 1000))
    for t in meta_tasks.validation_tasks():
        run = make_loss_curves(t.family, told, num_instances=3, num_steps=1000, record_every=1000, eval_batch=1024, task_mapping="vmap")
        r = np.array([_mean_log(run(shifted(s), t.data, 1_000_003)) for s in S])
        print(f"{t.name:18s}", np.round(r - r[2], 3), flush=True)
else:
    for t in meta_tasks.training_tasks():
        P = 2 if t.costly else 4
        run = make_paired_runs(with_random_scaling(t.family, .5, 2.0, per="problem"), rule, num_pairs=P, tell_progress=0.85)
        out=[]
        for n in (200, 1000):
            r = np.array([float(run(shifted(s), zero, t.data, jax.random.key(5), jnp.int32(n)).score) for s in S])
            out.append(np.round(r - r[2], 3))
        print(f"{t.name:18s}", *out, flush=True)
