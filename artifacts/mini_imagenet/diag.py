import sys, numpy as np, jax, jax.numpy as jnp, metalstm, os

import meta_train as m
from metalstm import algorithms, data, nn, rules
import optax
def algo(shot=1,steps=5,i_head=.1,i_body=1e-3,hidden=4,length=5.0):
    body = nn.conv4(None, final_relu=False, momentum=0.95)
    learner = nn.tied_head(m.one_length(body, length) if length else body)
    h,b=m.logit(i_head),m.logit(i_body)
    rule = rules.lstm_gates(hidden_size=hidden, bias_per="tensor", input_bias=(b, b), forget_bias=(10.,10.), input_bias_of={"head": (h, h)})
    return algorithms.published_meta_lstm(learner, rule, num_steps=steps, query_norm="frozen", train_query_norm="frozen", gradient_scale="way", train_way=5, support_stats="final", differentiation=metalstm.first_order())
if __name__=='__main__':
    pools = data.load_mini_imagenet(os.environ['DATA'])
    A=algo(); spec=data.EpisodeSpec(5,1,15)
    e=spec.sample(data.episode_key(1,"validation",0), pools.validation)
    p=A.init(jax.random.key(0), e)
    p=p._replace(learner=m.state_of('f4.npz'))
    for f in ['start','mA1.npz','mB1.state.npz','mD1.state.npz']:
        q=p
        if f!='start':
            with np.load(f) as z: a=dict(z)
            pre='best.' if 'state' in f else ''
            q=m.load(p,{k[len(pre):]:v for k,v in a.items() if k.startswith(pre)})
        inner,trace=A.adapt(q, jax.random.key(0), e.support, num_classes=5)
        g=trace.observed
        fl,il=jax.tree.leaves(g)[:2] if len(jax.tree.leaves(g))==2 else (None,None)
        print(f, jax.tree.map(jnp.shape,g) if f=='start' else '')
        sizes=[('conv1',32+864),('conv2',32+9216),('conv3',32+9216),('conv4',32+9216),('norms',256),('head',5+4000)]
        # order of leaves: body conv1..4 (bias,kernel), norm1..4, head
        for k in ('forget','input'):
            o=0; out=[]
            for n,c in sizes:
                x=np.asarray(g[k])[:,o:o+c]; o+=c
                out.append(n+' '+' '.join(f'{v:.5f}' for v in x.mean(1))+f' sd {x[-1].std():.5f}')
            print(k,'| '.join(out))
