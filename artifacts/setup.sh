# On a new machine: ML=folder outside the tree, REPO=this checkout, SHARED=where the data are. About two minutes, then start the queues.
set -e
cd $REPO; PYENV_VERSION=3.13.0 python3.13 -m venv .venv; .venv/bin/pip install -q -e '.[dev]' -c constraints/py313.txt
mkdir -p $ML/cache $ML/jaxcache313 $ML/mini $ML/data/mini_imagenet
for s in train val test; do unzip -q -o $SHARED/data/mini_imagenet/$s.zip -d $ML/data/mini_imagenet/$s; done
ln -sfn $SHARED/data/tensorflow_datasets $ML/data/tensorflow_datasets
git clone -q . $ML/frozen13
cd $ML/mini; cp -r $REPO/artifacts/mini_imagenet/. .; rm -f *.md; tar xJf lr_cells.tar.xz
grep "o-mann \|o-mlstm1 " queue2.txt >> queue2.txt.done
sed -i 's#frozen\(2\|9\|10\|11\|12\)\b#frozen13#g; s#classifier-f4.npz#mini-imagenet-classifier-0#; s#o-proto:prototypical#omniglot-prototypical-0#' *.sh *.txt *.done
sed -i "s#\$ML#$ML#g; s#\$REPO#$REPO#g" *.sh *.txt *.done
sed -i "s#CACHE_DIR=CACHE_DIR#CACHE_DIR=$ML/cache JAX_COMPILATION_CACHE_DIR=$ML/jaxcache313#g; s#CACHE=CACHE_DIR/mini-imagenet-84-ac7a1745c56b.npz#CACHE=$ML/cache/mini-imagenet-84-ac7a1745c56b-format2.npz#; s#\bHERE\b#$ML/mini#; s#DATA=DATA#DATA=$ML/data/mini_imagenet#; s#PYTHONPATH=LIB#PYTHONPATH=$ML/frozen13#; s#=REPO/.venv#=$REPO/.venv#; s#OMNI\b#$ML/data/tensorflow_datasets#; s#cd REPO#cd $REPO#; s#=REPO #=$REPO #" *.sh
# then, once: . ./go.sh's exports; python ship_features.py --theta k0 --out classifier-k0.npz (one minute; it writes the decoded images too)
