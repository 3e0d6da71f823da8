# ablate.sh NAME FLAGS: one ablation; AdamW's validation losses are the same for all: the first makes them, the others copy.
F=runs/ablations/$1; mkdir -p $F
if [ $1 != full ]; then until ls runs/ablations/full/validation-*.json >/dev/null 2>&1; do sleep 5; done; cp -n runs/ablations/full/validation-*.json $F/; fi; shift
exec taskset -c ${CORE:-1} python -m experiments.learned_optimizer.general --meta-steps 100 --linear-steps 30 --validate-every 25 --save-every 5 --folder $F "$@"
