#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: tests, kernel times, a 7B block.
#
#     bash kernels/benchmarks/gpu.sh [FOLDER]      # results there; default docs/results/gpu
#
# On a machine without highspy, put its wheel into .whl/ first. Every step is tried, whatever became
# of the one before; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-${OUT:-docs/results/gpu}}
mkdir -p "$out"
if compgen -G ".whl/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --target /tmp/gpu-site .whl/*.whl || exit 1
    export PYTHONPATH=/tmp/gpu-site
fi
export PYTHONPATH=$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
status=0

step() { # name, seconds at most, command
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt" || { echo "$name FAILED"; status=1; }
}

step versions 60 python3 -c "
import datetime, torch, transformers, triton
print(datetime.date.today(), torch.cuda.get_device_name(), 'torch', torch.__version__,
      'triton', triton.__version__, 'transformers', transformers.__version__)"
step tests 220 python3 -m pytest -q -p no:cacheprovider tests/ops/test_kernels.py \
    tests/ops/test_grouped_kernels.py tests/multi_delta/test_grouped.py tests/ops/test_dispatch.py \
    tests/nn/test_shared_input.py tests/ops/test_low_rank.py tests/nn/test_layers.py
step kernels 170 python3 kernels/benchmarks/bench.py --json "$out/kernels.json"
step tenants 60 python3 kernels/benchmarks/tenants.py --json "$out/tenants.json"
step block_7b 80 python3 examples/bench_quality/block_7b.py --device cuda
exit $status
