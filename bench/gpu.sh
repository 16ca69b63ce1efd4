#!/usr/bin/env bash
# Test and measure on a GPU, in two parts of at most six minutes each: `bench/gpu.sh a`, then `bench/gpu.sh b`.
#   a  tests: `python -m srm_kernels verify --quick`, the attention kernels once, then the tests marked `gpu`, the most important
#      files first, one line per test.
#   b  benchmarks one at a time, the most important first; then compute-sanitizer, if it is installed.
# A part may be stopped at any time with Ctrl-C: every step writes its results as they come. A step that reaches its
# limit gets the signal of Ctrl-C, so that benchmarks write what they have measured.
# Not in this script, for lack of time: `python -m bench.tune_attention`, `python -m bench.resources`, and
# `python -m bench.fused_neck --dtype bf16` at every batch size.
# Results go to the folder in the second argument (default: bench/results), with a folder for each GPU; its machine.txt
# has the GPU, the driver, the versions and the commit.
set -euo pipefail
part=${1:-}
if [[ $part != a && $part != b ]]; then
  echo "bench/gpu.sh: part is '$part'; expected 'a' (tests) or 'b' (benchmarks), then optionally a folder" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${2:-$here/bench/results}"
root=$(cd "${2:-$here/bench/results}" && pwd)
cd "$here"
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 # buffered lines would be lost when a step is killed
SECONDS=0
LIMIT=345 # seconds of a part; a step has ten more after the signal to end
device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9]+/-/g; s/^-|-$//g')
out=$root/$device
mkdir -p "$out"
status=0
child=

{
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
  "$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)'
  echo "commit $(git describe --always --exclude='*' --abbrev=12 --dirty=+ 2>/dev/null || echo unknown)"
} >"$out/machine.txt"
cat "$out/machine.txt"

step() { # time limit in seconds, name of the output file, command
  local left=$((LIMIT - SECONDS)) limit=$1 file=$out/$2.txt code=0
  shift 2
  if ((left < 5)); then
    echo "no time left: $*" | tee -a "$file"
    return
  fi
  echo "\$ $*" >>"$file"
  # timeout starts a new process group, which Ctrl-C does not reach.
  timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" >>"$file" 2>&1 &
  child=$!
  wait "$child" || code=$?
  child=
  if ((code)); then
    echo "ended with $code: $*" | tee -a "$file"
    status=1
  fi
}

stopped() {
  trap '' INT TERM
  if [[ -n $child ]]; then
    kill -INT "$child" 2>/dev/null || true
    wait "$child" || true
  fi
  exit 130
}
trap stopped INT TERM

attention() { step 30 attention "$PYTHON" -m bench.attention --device cuda --dtype bf16 --seconds 1 --out "$root" "$@"; }

growth() { step "$1" growth "$PYTHON" -m bench.growth --device cuda --dtype bf16 --out "$root" "${@:2}"; }

neck() { step 50 fused_neck "$PYTHON" -m bench.fused_neck --device cuda --dtype bf16 --batches 8 --warmup 5 --repeats 20 --seconds 0.3 --out "$root" "$@"; }

tests() { step "$LIMIT" tests "$PYTHON" -m pytest -m gpu -v --tb=short -rf -p no:cacheprovider "${parallel[@]}" "$@"; }

part_a() {
  local first=(
    tests/kernels/test_triton_on_cuda.py tests/model/test_fused_neck_on_cuda.py tests/kernels/test_triton_attention.py
    tests/kernels/test_pooled_links.py tests/kernels/test_triton_solve.py tests/kernels/test_triton_landmarks.py
    tests/kernels/test_triton_scale_gate_pool.py tests/model/test_fused_neck.py tests/kernels/test_on_cuda.py
  )
  local parallel=() processes=$(($(nproc) / 2 < 8 ? $(nproc) / 2 + 1 : 8))
  rm -f "$out"/{verify,small_run,tests}.txt
  step 90 verify "$PYTHON" -m srm_kernels verify --quick --export "$out/verify.jsonl"
  step 120 small_run "$PYTHON" -m bench.small_run
  if "$PYTHON" -c 'import xdist' >/dev/null 2>&1; then parallel=(-n "$processes"); fi
  tests "${first[@]}"
  tests tests "${first[@]/#/--ignore=}"
  cat "$out/verify.txt"
  tail -n 1 "$out/small_run.txt"
  grep -aE '^(FAILED|ERROR) |^=+ .*(passed|failed|error|no tests ran)' "$out/tests.txt" || tail -n 5 "$out/tests.txt"
}

part_b() {
  local direction batch tool
  rm -f "$out"/{attention,fused_neck,conditioning,neck,training,attacks,growth,sanitizer-memcheck,sanitizer-racecheck}.txt
  for direction in "" --backward; do
    # shellcheck disable=SC2086
    attention --rank 64 --batch 8 --warmup 5 --repeats 30 --kernels --shapes 16384 256 16384 1024 $direction
  done
  for direction in forward both; do
    neck --backbones pvt_v2_b2 --sides 512 --direction "$direction"
    neck --backbones pvt_v2_b2 --sides 512 --direction "$direction" --no-dyt
  done
  step 40 conditioning "$PYTHON" -m bench.conditioning --device cuda --out "$out/conditioning.jsonl"
  step 40 training "$PYTHON" -m bench.training --device cuda --dtype bf16 --warmup 5 --repeats 20 --seconds 5 --out "$root"
  for direction in "" --backward; do
    # shellcheck disable=SC2086
    attention --rank 64 --warmup 3 --repeats 20 --shapes 65536 1024 262144 4096 $direction
    # shellcheck disable=SC2086
    attention --rank 32 --batch 8 --warmup 5 --repeats 30 --shapes 16384 256 $direction
    for batch in 1 32; do
      # shellcheck disable=SC2086
      attention --rank 64 --batch "$batch" --warmup 5 --repeats 30 --shapes 16384 256 $direction
    done
  done
  neck
  neck --no-dyt
  step 50 attacks "$PYTHON" -m bench.attacks --device cuda --backbones pvt_v2_b2 --image-size 512 \
    --necks srm quadratic none --backends triton reference --attacks "pgd mse linf" --steps 10 --repeats 2 \
    --out "$out/attacks.jsonl"
  step 60 neck "$PYTHON" -m bench.neck --device cuda --article --out "$root"
  growth 40 --what crossover --backends triton --warmup 2 --repeats 10 --seconds 0.1
  growth 40 --what growth --seconds 1
  # Compilation takes longer than the other measurements.
  attention --warmup 3 --repeats 20 --compile --shapes 16384 256 65536 1024 262144 4096
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      step 120 "sanitizer-$tool" compute-sanitizer --error-exitcode 1 --tool "$tool" "$PYTHON" -m bench.small_run
    else
      echo "compute-sanitizer is not installed: $tool was not run" | tee "$out/sanitizer-$tool.txt"
    fi
  done
  cat "$out/attention.txt" "$out/fused_neck.txt"
}

"part_$part"
exit "$status"
