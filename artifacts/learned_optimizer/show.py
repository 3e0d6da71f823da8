"""python show.py RUN: the curve of a general run."""
import json, sys
for l in open(f"HERE/runs/{sys.argv[1]}/metrics.jsonl"):
    r=json.loads(l)
    if r['kind']=='train':
        if r['step']%(int(sys.argv[2]) if len(sys.argv)>2 else 50)==0: print(r['step'], round(r['loss'],3), round(r['grad_norm'],1), r['above_start'], r['diverged'])
    else: print('VAL', {k:(round(v,3) if isinstance(v,float) else v) for k,v in r.items() if k not in ('method','kind')})
