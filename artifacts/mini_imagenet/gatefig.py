import jax, numpy as np, os, metalstm
from metalstm import data, plots
from metalstm.plots.gates import layer_groups
pool = data.load_mini_imagenet(os.environ['DATA']).validation
for shot in (1, 5):
    t = metalstm.pretrained_learner(f"mini-imagenet-{shot}shot-0")
    spec = data.EpisodeSpec(5, shot, 15)
    adapt = jax.jit(lambda key, s: t.algorithm.adapt(t.params, key, s, num_classes=5))
    runs = []
    for task in range(10):
        e = spec.sample(data.episode_key(1, "validation", task), pool)
        inner, trace = adapt(jax.random.key(0), e.support)
        runs.append(jax.tree.map(np.asarray, trace.observed))
    layers = layer_groups(inner.params)
    f, i = (np.stack([r[k] for r in runs]) for k in ("forget", "input"))
    for name, g in (("i", i), ("1-f", 1 - f.astype(np.float64))):
        print(shot, name, plots.gate_variation(g, layers))
    fig = plots.gate_distributions(f, i, layers)
    print(plots.save_figure(fig, f"HERE/gates_{shot}shot_shipped.png"))
