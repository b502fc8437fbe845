#!/usr/bin/env bash
# Builds, measures and tests the kernels on a machine with a GPU, straight from a checkout, and times training. Installs
# nothing: it needs torch, triton, ninja, nvcc and pytest; the step `training` also the package's other requirements.
#
#   tools/gpu_check.sh OUT                every step, the most valuable first
#   tools/gpu_check.sh OUT bench tests    these steps alone, in this order
#   tools/gpu_check.sh --plan             prints the steps and their limits, and runs nothing
#
# A step needs no other step and ends within 9 minutes by its own limit. It writes its files in OUT as it goes, so that
# a machine that stops it keeps what it has found so far. summary.txt has a line a step. Every step runs, whatever
# became of the one before it; the exit code is 0 if none of them failed. A sanitizer that is absent, or that the
# machine refuses, is skipped and is no failure.
set -uo pipefail

# Seconds until a step is interrupted. It is killed $grace seconds later if it has not ended by then.
grace=15
declare -A limit=([build]=300 [bench]=500 [tests]=500 [sanitizer]=500 [training]=500 [compiled]=500 [shapes]=500)
declare -A what=(
    [build]="csrc with nvcc; the steps that need it build it themselves where this one has not run"
    [bench]="the shapes that goals are stated for: time, memory, error, and whether the answers repeat"
    [tests]="the kernels' and the ops' tests, a line a test"
    [sanitizer]="compute-sanitizer's memcheck and racecheck on every op"
    [training]="steps of recipes, plain, compiled and in CUDA graphs: images/s, the views' share; call it until all is done"
    [compiled]="only on request: the same shapes beside torch.compile, which tunes each of them for a minute"
    [shapes]="only on request: every shape"
)
default=(build bench tests sanitizer training)
known=("${default[@]}" compiled shapes)
test_files=(
    tests/kernels/test_triton_augment.py tests/kernels/test_triton_gather.py tests/kernels/test_triton_softmax.py
    tests/ops/test_backends.py tests/ops/test_operators.py
)
# What is trained, on random images, by the names of their files; each once plain, compiled and in CUDA graphs.
declare -A recipe=(
    [simclr]="simclr_vit_base_imagenet model.backbone=vit_small_patch16_224 batch_size=256"
    [dino]="dino_vit_small_imagenet batch_size=128"
    [mae]="mae_vit_base_imagenet batch_size=256"
    [moco]="moco_v3_vit_base_imagenet model.backbone=vit_small_patch16_224 batch_size=256"
)
cases=()
for mode in false graphs true; do
    for name in simclr dino mae moco; do cases+=("$name $mode"); done
done
python=${PYTHON:-python3}

plan() {
    printf '%-10s %4s s  %s\n' step max "what it does"
    for name in "${known[@]}"; do
        printf '%-10s %4s s  %s\n' "$name" "$((limit[$name] + grace))" "${what[$name]}"
    done
    printf 'tests: %s\n' "${test_files[*]}"
    for name in simclr dino mae moco; do printf 'training: %s\n' "${recipe[$name]}"; done
}

if [ $# -lt 1 ]; then sed -n '2,13p' "$0"; exit 2; fi
case $1 in
    --plan) plan; exit 0 ;;
    -h | --help) sed -n '2,13p' "$0"; exit 0 ;;
    -*) echo "gpu_check.sh: unknown option '$1'; --plan prints the steps" >&2; exit 2 ;;
esac
folder=$1
shift
steps=("$@")
[ $# -gt 0 ] || steps=("${default[@]}")
for name in "${steps[@]}"; do
    if [ -z "${limit[$name]:-}" ]; then
        echo "gpu_check.sh: unknown step '$name'; choices: ${known[*]}" >&2
        exit 2
    fi
done
mkdir -p "$folder" || exit 2
out=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET SSL_IB_OPS
failed=0

# Interrupts a command after that time, so that it can still say what it found. Itself alone: pytest, interrupted along
# with its workers, would print no failures.
within() { # seconds, command...
    timeout --foreground -s INT -k "$grace" "$@"
}

report() { # name, exit code, seconds it took
    local text="passed"
    case $2 in
        0) ;;
        124 | 137) text="stopped at its limit" failed=1 ;;
        *) text="failed (exit $2)" failed=1 ;;
    esac
    echo "$1: $text after $3 s" | tee -a "$out/summary.txt"
}

run_build() {
    within "${limit[build]}" "$python" -c 'from ssl_ib.ops import extension; print(extension.load())' \
        > "$out/build.log" 2>&1
    local code=$?
    tail -3 "$out/build.log"
    return $code
}

run_bench() { # name of the files, arguments of the benchmark...
    local name=$1
    shift
    within "${limit[bench]}" "$python" -m ssl_ib.cli.bench --device cuda "$@" --json "$out/$name.json" 2>&1 |
        tee "$out/$name.txt"
    return "${PIPESTATUS[0]}"
}

run_tests() {
    local workers=()
    # Several processes compile Triton's variants side by side; the GPU runs them in turn.
    if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 8); fi
    within "${limit[tests]}" "$python" -m pytest -v --tb=short -p no:cacheprovider "${workers[@]}" "${test_files[@]}" \
        > "$out/tests.log" 2>&1
    local code=$?
    tail -15 "$out/tests.log"
    return $code
}

# Every op on small shapes: at first alone, which also builds csrc and fills Triton's cache, so that the sanitizer sees
# nothing but the kernels. Torch's allocator hands out parts of large blocks, where memcheck would miss a read past a
# tensor's end: it is off.
run_sanitizer() {
    local log=$out/sanitizer.log code worst=0 tool backend
    : > "$log"
    if ! command -v compute-sanitizer > /dev/null; then
        skipped="compute-sanitizer is not installed"
        return 0
    fi
    local uncached=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
    within 140 "${uncached[@]}" "$python" tools/small_shapes.py cuda triton >> "$log" 2>&1 || { tail -5 "$log"; return 1; }
    for tool in memcheck racecheck; do
        for backend in cuda triton; do
            echo "==== $tool of $backend" >> "$log"
            # With the process that it watches.
            timeout -k "$grace" 75 "${uncached[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                "$python" tools/small_shapes.py "$backend" > "$log.part" 2>&1
            code=$?
            cat "$log.part" >> "$log"
            if grep -q "Device not supported" "$log.part"; then
                skipped="the machine refuses it (Device not supported)"
                rm "$log.part"
                return 0
            fi
            echo "$tool of $backend: exit $code, $(grep -E 'SUMMARY' "$log.part" || echo 'no summary')"
            [ $code -eq 0 ] || worst=$code
        done
    done
    rm "$log.part"
    return $worst
}

# A case after the other as long as there is time, each in files of its own, so that another call goes on with the rest.
# One that fails, or needs more than $most seconds, is left out by later calls: its file .failed says so.
run_training() {
    local most=280 end=$((SECONDS + limit[training])) worst=0 case name mode file left code beside
    if ! "$python" -c 'import pydantic, timm, yaml' 2> "$out/training.log"; then
        skipped="it needs the package's requirements: $(tail -1 "$out/training.log")"
        return 0
    fi
    mkdir -p "$out/training"
    for case in "${cases[@]}"; do
        read -r name mode <<< "$case"
        file=$out/training/$name-$mode
        if [ -e "$file.json" ] || [ -e "$file.failed" ]; then continue; fi
        left=$((end - SECONDS))
        if [ $left -lt 60 ]; then
            echo "training: there are more cases: call it again" | tee -a "$out/summary.txt"
            break
        fi
        beside=()
        if [ "$case" = "dino false" ] && "$python" -c 'import lightly' 2> /dev/null; then beside=(--lightly-views); fi
        # shellcheck disable=SC2086 # words of their own
        within $((left < most ? left : most)) "$python" tools/bench_train.py ${recipe[$name]} compile="$mode" \
            source=noise eval.linear.enabled=false --no-memory --rounds 20 "${beside[@]}" ${TRAINING:-} \
            --json "$file.json" > "$file.txt" 2>&1
        code=$?
        if [ $code -eq 0 ]; then
            echo "$name, compile=$mode:"
            tail -n $((2 + ${#beside[@]})) "$file.txt"
        elif [ $left -ge $most ] || [ $code -ne 124 ]; then
            echo "$name, compile=$mode: failed (exit $code): $(tail -1 "$file.txt")" | tee "$file.failed"
            worst=$code
        fi
    done
    return $worst
}

{
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv
    nvcc --version | tail -2
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} > "$out/machine.txt" 2>&1
cat "$out/machine.txt"

# Of what is installed on some machine only, Inf-CL's kernel, which goals are stated against; the rest is left to the full
# benchmark.
others=(--baselines cross_entropy mae embed_all inf_cl)
for name in "${steps[@]}"; do
    start=$SECONDS skipped=""
    case $name in
        build) run_build ;;
        bench) run_bench bench --goals --rounds 50 "${others[@]}" ;;
        tests) run_tests ;;
        sanitizer) run_sanitizer ;;
        training) run_training ;;
        compiled) run_bench compiled --goals --rounds 20 --baselines compiled ;;
        shapes) run_bench shapes --rounds 20 "${others[@]}" ;;
    esac
    code=$?
    if [ -n "$skipped" ]; then
        echo "$name: skipped: $skipped" | tee -a "$out/summary.txt"
    else
        report "$name" $code $((SECONDS - start))
    fi
done
exit $failed
