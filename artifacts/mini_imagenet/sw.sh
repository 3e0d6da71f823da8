# sw.sh WORKDIR: accuracy over shots and ways on mini-ImageNet, of what ships and of the same features
export PYTHONPATH=$ML/frozen13
exec $PYX -m experiments.studies.shots_and_ways mini-imagenet-1shot-0 mini-imagenet-5shot-0 c1 c2c --data-dir $DATA --workdir $1 --shots 1 2 3 5 10 20 --ways 5 10 15 20 --test-episodes 100
