#!/usr/bin/env bash
# Everything there is to know of this package on a GPU, in one command of less than nine minutes, or in several, which
# leaves a measurement the time that all else takes:
#
#   benchmarks/run_gpu.sh OUT [all | tests | measure | throughput | row_kernels | scaling | objectives | accuracy]
#
# for a machine whose python3 holds torch >= 2.10, triton >= 3.6, pybind11, scikit-build-core and pytest, and which needs no
# package registry. Builds in place, runs the kernels' tests and the GPU tests, then measures; results are in OUT as they come.
# Peers are measured too where they are installed, or lie as wheels in .whl/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
choices="all tests measure throughput row_kernels scaling objectives accuracy"
usage="usage: benchmarks/run_gpu.sh OUT [${choices// / | }]"
out=${1:?$usage}
what=${2:-all}
[[ " $choices " == *" $what "* ]] || { echo "$usage" >&2 && exit 2; }
mkdir -p "$out"
python=${PYTHON:-python3}
begun=$SECONDS
left() { echo $((530 - (SECONDS - begun) > 60 ? 530 - (SECONDS - begun) : 60)); } # seconds of the nine minutes

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv 2>/dev/null
  "$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__, torch.cuda.get_device_name())'
} | tee "$out/machine.txt"

echo "== build"
if ! "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . >"$out/build.log" 2>&1; then
  tail -n 30 "$out/build.log"
  exit 1
fi
for wheel in .whl/*.whl; do
  [[ -e $wheel ]] && "$python" -m pip install --quiet --no-deps --no-index "$wheel" >>"$out/build.log" 2>&1
done

failed=0
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8") # most of the small tests' time is Triton's compiler
tests() {                                                        # name, seconds, arguments of pytest
  local name=$1 limit=$2
  shift 2
  [[ $what == all || $what == tests ]] || return
  echo "== tests: $name"
  timeout -k 5 "$limit" "$python" -m pytest -q --maxfail=12 -p no:cacheprovider -o timeout=0 -W ignore "$@" >"$out/tests-$name.log" 2>&1 || failed=1
  tail -n 15 "$out/tests-$name.log"
}
# The row kernel first: what everything else rests on.
tests rows 80 $workers tests/test_row_divergence.py -k "triton or cuda"
tests cuda 20 tests/test_cuda.py
tests tiled 90 $workers tests/test_tiled.py
tests weights 40 tests/test_question_weights.py
tests features 60 tests/test_features.py
tests gpu 200 -m gpu tests/test_gpu.py
[[ $what == tests ]] && exit $failed

measure() { # name, per cent of the seconds that are left, or all for one alone, arguments; what is written by then counts
  local name=$1 limit=$(($(left) * $2 / 100))
  shift 2
  [[ $what == "$name" ]] && limit=$(left)
  [[ $what == all || $what == measure || $what == "$name" ]] || return
  [[ $name == throughput || $name == row_kernels ]] && set -- "$@" --seconds $((limit * 7 / 10)) # and starts nothing then
  echo "== measure: $name"
  timeout -k 5 "$limit" "$python" -W ignore "benchmarks/$name.py" --device cuda --output "$out" "$@" >"$out/$name.log" 2>&1 || failed=1
  tail -n 40 "$out/$name.log"
}
measure throughput 50
measure row_kernels 35
measure scaling 35 --rows 1024 --width 4096 --vocabulary 151936
measure objectives 40
measure accuracy 90
"$python" benchmarks/report.py --output "$out" >"$out/report.md" || failed=1
exit $failed
