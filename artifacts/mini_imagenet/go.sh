export METALSTM_CACHE_DIR=CACHE_DIR OPENBLAS_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
export CACHE=CACHE_DIR/mini-imagenet-84-ac7a1745c56b.npz DATA=DATA PYTHONPATH=LIB
export PATH=REPO/.venv/bin:$PATH
export PY="taskset -c 1 python"
cd HERE && exec setsid python run_queue.py queue.txt
