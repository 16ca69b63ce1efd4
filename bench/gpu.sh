#!/usr/bin/env bash
# Everything that only a GPU can show, inside ten minutes: the GPU tests, then the benchmarks.
# Results go to the folder given as the first argument (default bench/results), one folder a device, with the
# device, driver, versions and commit beside them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
out=${1:-bench/results}/$device
mkdir -p "$out"
{
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD 2>/dev/null || true
} >"$out/machine.txt"
status=0
"$PYTHON" -m pytest -m gpu tests >"$out/tests.txt" 2>&1 || status=$?
for dtype in float32 bfloat16; do
  for batch in 1 8; do
    "$PYTHON" -m bench.attention --device cuda --dtype "$dtype" --batch "$batch" --warmup 10 --repeats 50
  done
done >"$out/attention.txt" 2>&1 || status=$?
tail -n 3 "$out/tests.txt"
cat "$out/attention.txt"
exit "$status"
