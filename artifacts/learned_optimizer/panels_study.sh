cd $ML/opt/panels; . ./env.sh
ALL="--few-baselines sgd,momentum,nesterov,rmsprop,adam,adamw,adagrad,adadelta,adam-cosine"
$P --preset quadratics --rules moment-gates=q2/rules/moment-gates.npz,l2l=$ML/opt/frozen6p/metalstm/rules/shipped/l2l-quadratics.npz --study comparison $ALL --workdir study-quadratics --curves curves &&
$P --preset mnist-mlp $D --rules moment-gates=m1/rules/moment-gates.npz,l2l=$ML/opt/frozen6p/metalstm/rules/shipped/l2l-mnist.npz --study panels $ALL --quadratics-run study-quadratics --workdir study --curves curves --instances 24 --tune-instances 4 --long-instances 8 --record-every 5
