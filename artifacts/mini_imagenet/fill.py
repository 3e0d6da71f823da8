import json, numpy as np, os
from pathlib import Path
page=open('page.md').read()
f=lambda s,n: json.loads(Path(f'final/mini-imagenet-{n}shot-{s}/evaluation-5w{n}s-0.json').read_text())[0]
for n in (1,5):
    m=[100*f(s,n)['mean'] for s in range(3)]
    for s in range(3):
        page=page.replace(f'@T{n}{s}@', f"{m[s]:.2f} ± {100*f(s,n)['ci95']:.2f}")
    page=page.replace(f'@T{n}m@', f"{np.mean(m):.2f} ± {np.std(m,ddof=1):.2f}")
    print(n, m, [100*(f(s,n)['mean']-f(s,n)['ci95']) for s in range(3)], np.mean(m), np.std(m,ddof=1))
acc=lambda n: np.load(n+'.npz')['accuracies'] if Path(n+'.npz').exists() and Path(n+'.json').exists() else None
def cell(name, base):
    a=acc(name)
    if a is None: return None
    b=acc(base); d=a-b[:len(a)]
    ci=lambda x: 1.96*x.std(ddof=1)/len(x)**.5
    return f"{a.mean():.2f} ± {ci(a):.2f}", f"{d.mean():+.2f} ± {ci(d):.2f}"
rows=[("the gates' start: i = 0.1 in the head, 0.001 in the body, f = 1, not meta-trained","v1b","v5b"),
("the head alone adapts (i = 0 in the body), not meta-trained","a1head","a5head"),
("theta_0 without the prototypical loss: the classifier alone","a1s0","a5s0"),
("features of their own length, the same gates","a1raw","a5raw"),
("pre-trained without crops and flips","a1p","a5p")]
out=[]
for label,a,b in rows:
    c,d=cell(a,'v1a'),cell(b,'v5a')
    if c is None and d is None: print('missing',label); continue
    c=c or ('','');d=d or ('','')
    out.append(f"| {label} | {c[0]} | {c[1]} | {d[0]} | {d[1]} |")
page=page.replace('@ABL@','\n'.join(out))
c,d=cell('v1b','v1a'),cell('v5b','v5a')
print(c,d)
for s in (1,2):
    for n in (1,5):
        for x in (f'v{n}s{s}', f'v{n}s{s}b'):
            a=acc(x); 
            if a is not None: print(x,len(a),a.mean())
        if acc(f'v{n}s{s}b') is not None and acc(f'v{n}s{s}') is not None: print(cell(f'v{n}s{s}b',f'v{n}s{s}'))
open('page_filled.md','w').write(page)
