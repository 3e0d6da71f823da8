# final.sh SEED THETA RULE1 RULE5: the files that ship, then the test, by the library's command
set -e
export PYTHONPATH=LIB:HERE
for n in 1 5; do
  rule=$([ $n = 1 ] && echo $3 || echo $4)
  out=final/mini-imagenet-${n}shot-$1
  mkdir -p final
  $PYX ship.py --theta $2 --rule $rule --shot $n --seed $1 --out $out.npz
  [ -f $out/evaluation-5w${n}s-0.json ] || (cd final; $PYX -m experiments.few_shot --evaluate ../$out.npz --data-dir $DATA --workdir ../$out)
done
