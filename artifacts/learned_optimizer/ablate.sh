# ablate.sh NAME FLAGS: one ablation; AdamW's validation losses are the same for all and copied from the first.
F=runs/ablations/$1; mkdir -p $F; cp -n runs/ablations/full/validation-2x2000.json $F/ 2>/dev/null; shift
exec taskset -c ${CORE:-1} python -m experiments.learned_optimizer.general --meta-steps 150 --linear-steps 40 --validate-every 25 --save-every 5 --folder $F "$@"
