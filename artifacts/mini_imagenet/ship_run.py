"""ship_run.py RUN METHOD OUT INFO_JSON: a finished run's best as a file that ships."""
import json, sys, os
from pathlib import Path
import jax, numpy as np
import metalstm
from experiments.few_shot.command_line import parse
from experiments.few_shot.data import load_source
from experiments.few_shot.saved_runs import read_runs
run, method, out, info = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
saved = json.load(open(run/'config.json'))
p = metalstm.load_run(run, method)
small = p.params
config = saved['config']; config['run']['algorithms'] = [method]; config['methods'] = {method: config['methods'][method]}  # one method alone
config['data']['data_dir'] = None
(r,) = read_runs([run])
source = load_source(r.options.data, {})
info |= {'config': config, 'data': saved['data'], 'versions': saved['versions']}
print(metalstm.save(out, p.algorithm, small, source.dataset.train, source.test, info=info), os.path.getsize(out))
