"""Whole training step ratio ours/adamw: MLP of 1.06M parameters, batch 128; interleaved, CPU time."""
import time, jax, jax.numpy as jnp, numpy as np, optax
from metalstm import rules
k=jax.random.key
sizes=[784,1024,256,10]
params=[{"w":jax.random.normal(k(i),(a,b))/a**.5,"b":jnp.zeros(b)} for i,(a,b) in enumerate(zip(sizes,sizes[1:]))]
x=jax.random.normal(k(9),(128,784)); y=jnp.arange(128)%10
def loss(p):
    h=x
    for i,l in enumerate(p): h=h@l["w"]+l["b"]; h=jax.nn.relu(h) if i<2 else h
    return optax.softmax_cross_entropy_with_integer_labels(h,y).mean()
r=rules.moment_gates(); n=rules.moment_network()
txs={"adamw":optax.adamw(1e-3),"gates":rules.with_progress(r.bind(r.init(k(0),params)),1000),"network":rules.with_progress(n.bind(n.init(k(0),params)),1000)}
fns,st={}, {}
for name,tx in txs.items():
    def f(p,s,tx=tx):
        g=jax.grad(loss)(p); u,s=tx.update(g,s,p); return optax.apply_updates(p,u),s
    fns[name]=jax.jit(f,donate_argnums=(0,1)); st[name]=(jax.tree.map(jnp.array,params),jax.tree.map(jnp.array,tx.init(params)))
ts={n:[] for n in txs}
for i in range(40):
    for name in txs:
        t=time.process_time(); st[name]=jax.block_until_ready(fns[name](*st[name])); ts[name].append(time.process_time()-t)
m={n:np.median(t[5:])*1e3 for n,t in ts.items()}; print({n:(round(float(v),2),round(float(v/m["adamw"]),2)) for n,v in m.items()})
