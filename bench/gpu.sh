#!/usr/bin/env bash
# Everything that only a GPU can show, inside ten minutes: the GPU tests, compute-sanitizer, then the benchmarks.
# `python -m bench.tune_attention` and `python -m bench.resources` are for hours with more time.
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
timeout 200 "$PYTHON" -m pytest -m gpu tests >"$out/tests.txt" 2>&1 || status=$?
for tool in memcheck racecheck; do
  timeout 50 compute-sanitizer --error-exitcode 1 --tool "$tool" "$PYTHON" -m bench.small_run || status=$?
done >"$out/sanitizer.txt" 2>&1
attention() { # seconds, arguments
  timeout "$1" "$PYTHON" -m bench.attention --device cuda "${@:2}" || status=$?
}
{
  for batch in 1 8 32; do
    for direction in "" --backward; do
      attention 25 --dtype bfloat16 --batch "$batch" --warmup 5 --repeats 30 --shapes 16384 256 $direction
    done
  done
  attention 50 --dtype bfloat16 --warmup 3 --repeats 20 --compile --shapes 16384 256 65536 1024 262144 4096
  attention 50 --dtype bfloat16 --crossover --warmup 2 --repeats 10
  attention 25 --dtype float32
} >"$out/attention.txt" 2>&1
"$PYTHON" -m bench.attacks --device cuda --backbone pvt_v2_b2 --image-size 512 --necks srm quadratic none \
  >"$out/attacks.txt" 2>&1 || status=$?
"$PYTHON" -m bench.conditioning --device cuda --out "$out/conditioning.jsonl" >"$out/conditioning.txt" 2>&1 || status=$?
tail -n 3 "$out/tests.txt"
cat "$out/attention.txt" "$out/attacks.txt"
exit "$status"
