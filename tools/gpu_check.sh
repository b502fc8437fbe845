#!/usr/bin/env bash
# Tests and measures the kernels on a machine with a GPU, straight from a checkout: needs torch, triton, pytest and nvcc,
# installs nothing, and takes under 8 minutes.
#
#   tools/gpu_check.sh OUT          tests, sanitizer, and the shapes that goals are stated for
#   tools/gpu_check.sh OUT --all    instead of the latter every shape (takes longer)
#
# OUT receives machine.txt, build.log, tests.log, sanitizer.log, bench.txt, bench.json and summary.txt. Every step runs
# whatever became of the one before it; the exit code is 0 if all of them passed.
set -uo pipefail
if [ $# -lt 1 ]; then sed -n '2,10p' "$0"; exit 2; fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shapes=${2:---goals}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET SSL_IB_OPS
: > "$out/summary.txt"
failed=0

step() { # name, seconds it may take, command...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    timeout "$limit" "$@"
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "$name: exit $code after $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

{
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv
    nvcc --version | tail -2
    python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} > "$out/machine.txt" 2>&1
cat "$out/machine.txt"

step build 180 python3 -c 'from ssl_ib.ops import extension; print(extension.load())' > "$out/build.log" 2>&1
tail -3 "$out/build.log"
# Several processes compile Triton's variants side by side; the GPU runs them in turn.
workers=$(python3 -c 'import importlib.util as u; print("-n 8" if u.find_spec("xdist") else "")')
# shellcheck disable=SC2086
step tests 240 python3 -m pytest -q -p no:cacheprovider $workers tests/ops/test_backends.py tests/ops/test_operators.py \
    tests/kernels/test_triton_gather.py tests/kernels/test_triton_softmax.py > "$out/tests.log" 2>&1
tail -15 "$out/tests.log"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 tools/small_shapes.py cuda triton \
            >> "$out/sanitizer.log" 2>&1
    done
    grep -E "ERROR SUMMARY|RACECHECK SUMMARY|not supported" "$out/sanitizer.log" | tail -4
else
    echo "sanitizer: compute-sanitizer is not installed" | tee -a "$out/summary.txt"
fi
if [ "$shapes" = --goals ]; then selection=(--goals --rounds 50); else selection=(--rounds 20 --baselines cross_entropy mae embed_all); fi
step bench 600 python3 -m ssl_ib.cli.bench --device cuda "${selection[@]}" --json "$out/bench.json" > "$out/bench.txt" 2>&1
cat "$out/bench.txt"
cat "$out/summary.txt"
exit $failed
