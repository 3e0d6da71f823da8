"""Update cost: ours / adamw, 1M parameters, interleaved."""
import time, jax, jax.numpy as jnp, numpy as np, optax
from metalstm import rules
params={"a":jax.random.normal(jax.random.key(0),(784,1024))*.03,"b":jnp.zeros(1024),"c":jax.random.normal(jax.random.key(1),(1024,256))*.03,"d":jnp.zeros(256)}
g=jax.tree.map(lambda p: jnp.sin(p*3)+.1,params)
r=rules.moment_gates(); txs={"ours":rules.with_progress(r.bind(r.init(jax.random.key(0),params)),1000),"adamw":optax.adamw(1e-3)}
fns={}
for n,tx in txs.items():
    def f(p,s,tx=tx):
        u,s=tx.update(g,s,p); return optax.apply_updates(p,u),s
    fns[n]=(jax.jit(f,donate_argnums=(0,1)),)
st={n:(jax.tree.map(jnp.array,params),jax.tree.map(jnp.array,tx.init(params))) for n,tx in txs.items()}
ts={n:[] for n in txs}
for i in range(40):
    for n in txs:
        t=time.process_time(); st[n]=jax.block_until_ready(fns[n][0](*st[n])); ts[n].append(time.process_time()-t)
print({n:np.median(t[5:])*1e3 for n,t in ts.items()})
