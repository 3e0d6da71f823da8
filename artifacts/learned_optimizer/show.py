"""python show4.py RUN [EVERY]: validation rows and training means of a whole-run evolution."""
import json, sys
rows=[json.loads(l) for l in open(f"runs/{sys.argv[1]}/metrics.jsonl")]
every=int(sys.argv[2]) if len(sys.argv)>2 else 50
acc=[]
for r in rows:
    if r['kind']=='train':
        acc.append(r)
        if r['step']%every==0:
            m=lambda k: sum(a[k] for a in acc)/len(acc)
            print(r['step'], f"score {m('loss'):.3f} |g| {m('grad_norm'):.2f} diverged {m('diverged'):.4f} s {r['seconds']:.0f}"); acc=[]
    else: print('VAL', {k:(round(v,3) if isinstance(v,float) else v) for k,v in r.items() if k not in ('method','kind')})
