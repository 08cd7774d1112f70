#!/usr/bin/env bash
# Everything there is to know of this package on a GPU, in one command of less than nine minutes, or in several:
#
#   benchmarks/run_gpu.sh OUT [STEP ...]
#
# without steps all of them, in the order of `steps` below. For a machine whose python3 holds torch >= 2.10, triton >= 3.6,
# pybind11, scikit-build-core, pytest and pytest-xdist, and which needs no package registry.
# Peers are measured too where they are installed, or lie as wheels in .whl/. SECONDS_LEFT (530) is what it may take: a step
# that is cut leaves what it has found by then. Results are in OUT as they come, a summary in OUT/summary.txt.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps="matmuls contract rows row_kernels kernel_times throughput kernels gpu operator ranks features scaling objectives accuracy"
out=${1:?usage: benchmarks/run_gpu.sh OUT [${steps// / | }]}
shift
for step in "$@"; do
  [[ " $steps " == *" $step "* ]] || { echo "run_gpu.sh: expected steps of: $steps, got $step" >&2 && exit 2; }
done
chosen=" ${*:-$steps} "
mkdir -p "$out"
python=${PYTHON:-python3}
deadline=$((SECONDS + ${SECONDS_LEFT:-530}))
failed=0
trap 'cat "$out/summary.txt"' EXIT

say() { echo "[$SECONDS s] $*" | tee -a "$out/summary.txt"; }
limit() { # the lesser of some seconds and of all that are left
  local left=$((deadline - SECONDS))
  echo $(($1 < left ? $1 : left))
}

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv 2>/dev/null
  "$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.cuda.get_device_name())'
} | tee "$out/machine.txt"

for wheel in .whl/*.whl; do
  [[ -e $wheel ]] && "$python" -m pip install --quiet --no-deps --no-index "$wheel" >>"$out/build.log" 2>&1
done
"$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . >>"$out/build.log" 2>&1 &
build=$!
if [[ $chosen == *" matmuls "* ]]; then # needs PyTorch alone, and a GPU that waits for the compiler
  timeout -k 5 "$(limit 90)" "$python" -W ignore benchmarks/matmuls.py --output "$out" >"$out/matmuls.log" 2>&1 || failed=1
  say "matmuls"
  tail -n 40 "$out/matmuls.log"
fi
if ! wait $build; then
  tail -n 30 "$out/build.log"
  say "the build failed"
  exit 1
fi
say "built"

tests() { # step, name, seconds, arguments of pytest
  local name=$2 log="$out/tests-$2.log"
  [[ $chosen == *" $1 "* ]] || return
  [[ $(limit "$3") -gt 5 ]] || { say "tests $name: no time left" && return; }
  timeout -s INT -k 10 "$(limit "$3")" "$python" -m pytest -v --tb=short -p no:cacheprovider -p no:benchmark -o timeout=0 \
    -W ignore "${@:4}" >"$log" 2>&1
  local status=$?
  [[ $status == 0 ]] || failed=1
  say "tests $name: status $status, $(grep -c ' PASSED' "$log") passed, $(grep -c ' FAILED' "$log") failed," \
    "$(grep -c ' SKIPPED' "$log") skipped, $(grep -c ' ERROR' "$log") errors$([[ $status -ge 124 ]] && echo ", cut")"
  grep ' FAILED' "$log" | head -n 20
  grep -E '^E  ' "$log" | sort | uniq -c | sort -rn | head -n 15
}

measure() { # name, seconds, arguments
  [[ $chosen == *" $1 "* ]] || return
  local seconds
  seconds=$(limit "$2")
  [[ $seconds -gt 20 ]] || { say "$1: no time left" && return; }
  [[ $1 == throughput || $1 == row_kernels ]] && set -- "$@" --seconds $((seconds * 7 / 10)) # and starts nothing then
  timeout -k 5 "$seconds" "$python" -W ignore "benchmarks/$1.py" --device cuda --output "$out" "${@:3}" >"$out/$1.log" 2>&1 || failed=1
  say "$1"
  tail -n 60 "$out/$1.log"
}

real_size="bf16_contract or several_chunks or 2_to_the_31"
row_kernels="long_double or in_place"
# What everything rests on, at real size; then the row kernel; then times.
tests contract contract 120 -n 3 tests/test_gpu.py -k "$real_size"
tests rows rows 100 -n 12 --dist worksteal tests/test_gpu.py -k "$row_kernels"
measure row_kernels 100
measure kernel_times 60
measure throughput 240 ${THROUGHPUT:-}
tests kernels kernels 100 -n 12 --dist worksteal tests/test_row_divergence.py tests/test_question_weights.py \
  tests/test_scaling.py -k "triton or weights or multiplied or written"
tests gpu gpu 120 -n 6 --dist worksteal tests/test_gpu.py -k "not ($real_size or $row_kernels)"
tests operator operator 150 -n 12 --dist worksteal tests/test_objectives.py tests/test_policy.py \
  tests/test_divergences.py tests/test_metrics.py tests/test_routed_teachers.py tests/test_shared_prefix.py -k triton
tests ranks ranks 60 -n 3 -m gpu tests/test_shards.py tests/test_batch_over_processes.py tests/test_routed_teachers.py
tests features features 60 -n 12 --dist worksteal tests/test_features.py
measure scaling 120 --rows 1024 --width 4096 --vocabulary 151936
measure objectives 150 --rows 4096 --width 4096 --repeats 5
measure accuracy 90
"$python" benchmarks/report.py --output "$out" >"$out/report.md" 2>/dev/null
exit $failed
