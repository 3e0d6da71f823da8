"""Short trial: PES only on three cheap families."""
import time, sys, jax, jax.numpy as jnp, numpy as np, optax, metalstm
from experiments.learned_optimizer import meta_tasks
from metalstm import rules, learned_optimizers as lo
lr=float(sys.argv[1]); std=float(sys.argv[2]); minutes=float(sys.argv[3]); K=int(sys.argv[4]); T=int(sys.argv[5])
rule=rules.moment_gates()
tasks=[t for t in meta_tasks.training_tasks() if t.name in ("digits-relu","logistic","teacher")]
parts=[]; 
for t in tasks:
    fam=lo.with_random_scaling(t.family,.3,3.,per="problem",loss=(.01,100.))
    alg=lo.learned_optimizer(fam,rule,num_tasks=T,unroll_steps=K,horizon=(100,1000),estimator="pes",pes_std=std,task_mapping="vmap",tell_progress=.7,loss_transform="log_relative",stagger=True,weights=lambda d: 3*d**2)
    parts.append(metalstm.MixturePart(alg,lo.ProblemSampler(fam,K+1),T))
opt=metalstm.adam_clipped(lr,1.)
pools=[t.data for t in tasks]
st=metalstm.init_mixture_state(parts,opt,0,pools)
loop=metalstm.make_mixture_loop(parts,opt)
def make_eval(t,steps=500):
    f=lo.make_loss_curves(t.family,metalstm.UpdateRule(rule.init,lambda p: rules.with_progress(rule.bind(p),steps)),num_instances=4,num_steps=steps,record_every=steps,eval_batch=512,task_mapping="vmap")
    return lambda p: float(np.mean(lo.capped_logs(f(p,t.data,77))))
evals={t.name:make_eval(t) for t in tasks}
def show(tag): print(tag, {k:round(f(st.params),3) for k,f in evals.items()}, flush=True)
show("start"); t0=time.time(); s=0; ls=[]
while time.time()-t0<60*minutes:
    st,m=loop(st,pools); s+=1; ls.append(float(m["loss"][0]))
    if s%200==0: print(s, round(time.time()-t0), "loss", np.mean(ls[-200:]).round(3), "div", float(m["diverged"][0]), "gn", float(m["grad_norm"][0]),flush=True)
    if s%600==0: show("eval")
show("end")
