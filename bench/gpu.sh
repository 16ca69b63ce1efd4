#!/usr/bin/env bash
# Everything that only a GPU can show, inside ten minutes, in two parts.
# Side by side, at most 290 s: the GPU tests, compute-sanitizer, and every benchmark once at its briefest, which fills
# Triton's cache and shows what breaks. Then, one at a time, the benchmarks that count, the most wanted first.
# A step ends at its own limit or when the ten minutes do, whichever comes first, by the signal that Ctrl-C sends: what
# it measured until then is written.
# `python -m bench.tune_attention`, `python -m bench.resources` and `python -m bench.fused_neck --dtype bf16` at every
# batch are for hours with more time.
# Results go to the folder given as the first argument (default bench/results), one folder a device, with the
# device, driver, versions and commit beside them; what the first part printed goes to its folder `rehearsal`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS=0
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
root=${1:-bench/results}
out=$root/$device
log=$out/rehearsal
scratch=$(mktemp -d)
rm -rf "$log" "$out"/{tests,sanitizer-memcheck,sanitizer-racecheck,attention,fused_neck,conditioning,operators,neck,training,attacks,growth}.txt
mkdir -p "$log"
{
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD 2>/dev/null || true
} >"$out/machine.txt"
processes=$(($(nproc) / 2 < 8 ? $(nproc) / 2 + 1 : 8))
status=0
rehearsing=

limited() { # most seconds, file of its output, command
  local left=$((rehearsing ? 290 - SECONDS : 590 - SECONDS)) limit=$1 file=$2
  shift 2
  if ((left < 5)); then
    echo "no time left: $*" >>"$file"
    return 1
  fi
  echo "\$ $*" >>"$file"
  # In a process group of its own, which Ctrl-C does not reach.
  timeout --signal=INT --kill-after=5 $((limit < left ? limit : left)) "$@" >>"$file" 2>&1 &
  child=$!
  trap 'kill -INT "$child" 2>/dev/null || true; wait "$child" || true; exit 130' INT TERM
  wait "$child"
}

step() { # most seconds, file of its output, options that make it brief, command
  local limit=$1 file=$2 brief=$3
  shift 3
  if ((rehearsing)); then
    while (($(jobs -pr | wc -l) >= processes)); do wait -n || true; done
    # shellcheck disable=SC2086
    (limited 280 "$log/$BASHPID-$file" "$@" $brief || echo "rehearsal of $file ended with $?: $*" >>"$log/failed") &
  else
    limited "$limit" "$out/$file" "$@" || status=$?
  fi
}
trap 'trap - INT TERM; kill -TERM $(jobs -p) 2>/dev/null || true; wait || true; exit 130' INT TERM
trap 'rm -rf "$scratch"' EXIT

attention() {
  step 30 attention.txt "--warmup 1 --repeats 1 --seconds 0 --out $scratch" \
    "$PYTHON" -m bench.attention --device cuda --dtype bfloat16 --seconds 1 --out "$root" "$@"
}

benchmarks() {
  local brief="--warmup 1 --repeats 1 --seconds 0 --out $scratch" direction rank batch options
  for direction in "" --backward; do
    for rank in 64 32; do
      attention --rank "$rank" --batch 8 --warmup 5 --repeats 30 --kernels --shapes 16384 256 $direction
      attention --rank "$rank" --warmup 3 --repeats 20 --shapes 65536 1024 262144 4096 $direction
    done
  done
  for options in "" --no-dyt "--direction both" "--direction both --no-dyt"; do
    step 40 fused_neck.txt "$brief" "$PYTHON" -m bench.fused_neck --device cuda --dtype bf16 --batches 8 --warmup 5 \
      --repeats 20 --seconds 0.3 --out "$root" $options
  done
  step 40 conditioning.txt "--repeats 1 --out $scratch/conditioning.jsonl" \
    "$PYTHON" -m bench.conditioning --device cuda --out "$out/conditioning.jsonl"
  step 40 training.txt "$brief" "$PYTHON" -m bench.training --device cuda --dtype bf16 --warmup 5 --repeats 20 \
    --seconds 5 --out "$root"
  step 60 neck.txt "$brief" "$PYTHON" -m bench.neck --device cuda --article --out "$root"
  step 50 attacks.txt "--steps 1 --repeats 1 --out $scratch/attacks.jsonl" \
    "$PYTHON" -m bench.attacks --device cuda --backbones pvt_v2_b2 --image-size 512 \
    --necks srm quadratic none --backends triton reference --attacks "pgd mse linf" --steps 10 --repeats 2 \
    --out "$out/attacks.jsonl"
  step 60 operators.txt "--benchmark-max-time 0.01 --benchmark-min-rounds 1 --benchmark-json $scratch/operators.json" \
    "$PYTHON" -m pytest bench --benchmark-only --on cuda --kind bf16 --shapes one \
    --benchmark-max-time 0.1 --benchmark-min-rounds 3 --benchmark-json "$out/operators.json"
  for batch in 1 32; do
    for direction in "" --backward; do
      attention --batch "$batch" --warmup 5 --repeats 30 --shapes 16384 256 $direction
    done
  done
  step 50 growth.txt "$brief" \
    "$PYTHON" -m bench.growth --device cuda --dtype bf16 --seconds 1 --out "$root"
  attention --crossover --warmup 2 --repeats 10
  # Compiling takes longer than all that it is compared with.
  attention --warmup 3 --repeats 20 --compile --shapes 16384 256 65536 1024 262144 4096
}

rehearsing=1
parallel=()
if "$PYTHON" -c 'import xdist' >/dev/null 2>&1; then parallel=(-n "$processes"); fi
limited 280 "$out/tests.txt" "$PYTHON" -m pytest -m gpu tests "${parallel[@]}" -rf &
tests=$!
for tool in memcheck racecheck; do
  (limited 280 "$out/sanitizer-$tool.txt" compute-sanitizer --error-exitcode 1 --tool "$tool" \
    "$PYTHON" -m bench.small_run || echo "$tool ended with $?" >>"$log/failed") &
done
benchmarks
wait "$tests" || status=$?
wait
rehearsing=0
if [ -e "$log/failed" ]; then status=1; fi
benchmarks
cat "$log/failed" 2>/dev/null || true
tail -n 30 "$out/tests.txt"
cat "$out/attention.txt"
exit "$status"
