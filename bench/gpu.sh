#!/usr/bin/env bash
# Everything that only a GPU can show, inside ten minutes: the GPU tests, the benchmarks, compute-sanitizer.
# A step ends at its own limit or when the ten minutes do, whichever comes first, by the signal that Ctrl-C sends: what
# it measured until then is written.
# `python -m bench.tune_attention`, `python -m bench.resources` and `python -m bench.fused_neck --dtype bf16` at every
# batch are for hours with more time.
# Results go to the folder given as the first argument (default bench/results), one folder a device, with the
# device, driver, versions and commit beside them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS=0
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
root=${1:-bench/results}
out=$root/$device
mkdir -p "$out"
{
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD 2>/dev/null || true
} >"$out/machine.txt"
status=0
child=

step() { # most seconds, file of its output, command
  local limit=$1 file=$2 left=$((590 - SECONDS))
  shift 2
  if ((left < 5)); then
    echo "no time left: $*" >>"$out/$file"
    status=1
    return
  fi
  echo "\$ $*" >>"$out/$file"
  timeout --signal=INT --kill-after=5 $((limit < left ? limit : left)) "$@" >>"$out/$file" 2>&1 &
  child=$!
  wait "$child" || status=$?
}
# The step is in a process group of its own, which Ctrl-C does not reach.
trap 'trap - INT TERM; kill -INT "$child" 2>/dev/null; wait; exit 130' INT TERM

attention() {
  step 30 attention.txt "$PYTHON" -m bench.attention --device cuda --dtype bfloat16 --seconds 1 --out "$root" "$@"
}

rm -f "$out"/{tests,attention,fused_neck,conditioning,operators,neck,training,attacks,growth,sanitizer}.txt
step 180 tests.txt "$PYTHON" -m pytest -m gpu tests
for direction in "" --backward; do
  for rank in 64 32; do
    attention --rank "$rank" --batch 8 --warmup 5 --repeats 30 --shapes 16384 256 $direction
    attention --rank "$rank" --warmup 3 --repeats 20 --shapes 65536 1024 262144 4096 $direction
  done
  for batch in 1 32; do
    attention --batch "$batch" --warmup 5 --repeats 30 --shapes 16384 256 $direction
  done
done
for options in "" --no-dyt "--direction both" "--direction both --no-dyt"; do
  step 40 fused_neck.txt "$PYTHON" -m bench.fused_neck --device cuda --dtype bf16 --batches 8 --warmup 5 --repeats 20 \
    --seconds 0.3 --out "$root" $options
done
attention --crossover --warmup 2 --repeats 10
step 60 conditioning.txt "$PYTHON" -m bench.conditioning --device cuda --out "$out/conditioning.jsonl"
step 60 operators.txt "$PYTHON" -m pytest bench --benchmark-only --on cuda --kind bf16 --shapes one \
  --benchmark-max-time 0.1 --benchmark-min-rounds 3 --benchmark-json "$out/operators.json"
step 60 neck.txt "$PYTHON" -m bench.neck --device cuda --article --out "$root"
step 40 training.txt "$PYTHON" -m bench.training --device cuda
step 50 attacks.txt "$PYTHON" -m bench.attacks --device cuda --backbones pvt_v2_b2 --image-size 512 \
  --necks srm quadratic none --backends triton reference --attacks "pgd mse linf" --steps 10 --repeats 2 \
  --out "$out/attacks.jsonl"
step 50 growth.txt "$PYTHON" -m bench.growth --device cuda --dtype bf16 --seconds 1 --out "$root"
# Compiling takes longer than all that it is compared with.
attention --warmup 3 --repeats 20 --compile --shapes 16384 256 65536 1024 262144 4096
for tool in memcheck racecheck; do
  step 40 sanitizer.txt compute-sanitizer --error-exitcode 1 --tool "$tool" "$PYTHON" -m bench.small_run
done
tail -n 3 "$out/tests.txt"
cat "$out/attention.txt"
exit "$status"
