#!/usr/bin/env bash
# Does what a newcomer with a folder of images does in the first hour, and checks what the terminal says.
#
#   tools/first_hour.sh            on real images, from SSL_IB_DATA (default ../shared/data): some ten minutes on two cores
#   tools/first_hour.sh --small    on scikit-learn's digits as PNG files, without some of the steps: under a minute
#
# Prints a line a step. A step that says or does something else than it should is shown with its output; the others go
# on, and the exit code is 1. Everything is written to a folder that is removed at the end.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
root=$PWD
data=$(realpath "${SSL_IB_DATA:-../shared/data}" 2>/dev/null)
python=${PYTHON:-python3}
small=false
case ${1:-} in
    --small) small=true ;;
    "") ;;
    *) sed -n '2,8p' "$0"; exit 2 ;;
esac
if ! $small && [ ! -f "$data/imagenette96.tar.xz" ]; then
    echo "first_hour.sh: no imagenette96.tar.xz in ${data:-SSL_IB_DATA}; --small needs no images" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$work" || exit 2
train=("$python" -m ssl_ib.cli.train)
sweep=("$python" -m ssl_ib.cli.sweep)
failures=0
# What other tests do as well is left out of the small form.
only_large() { $small || "$@"; }

# expect NAME CODE PATTERNS COMMAND...: runs the command, which has to end with the code and to print every pattern (extended
# regular expressions, one a line; one that begins with ! must not be printed).
expect() {
    local name=$1 code=$2 patterns=$3 wrong=() got pattern
    shift 3
    [ -f output.txt ] && mv output.txt before.txt
    "$@" > output.txt 2>&1 < /dev/null
    got=$?
    [ "$got" = "$code" ] || wrong+=("exit code $got in place of $code")
    grep -q Traceback output.txt && wrong+=("a traceback")
    while IFS= read -r pattern; do
        [ -n "$pattern" ] || continue
        if [ "${pattern:0:1}" = "!" ]; then
            grep -Eq -- "${pattern:1}" output.txt && wrong+=("says: ${pattern:1}")
        else
            grep -Eq -- "$pattern" output.txt || wrong+=("does not say: $pattern")
        fi
    done <<< "$patterns"
    if [ ${#wrong[@]} -eq 0 ]; then
        echo "ok      $name"
    else
        failures=$((failures + 1))
        echo "FAILED  $name"
        printf '          %s\n' "${wrong[@]}"
        echo "          $*" | cut -c1-300
        sed 's/^/          | /' output.txt | tail -n 25
    fi
}

# The images: `labelled/train/CLASS` and `labelled/val/CLASS`, and the same files in other places.
if $small; then
    "$python" - << 'PY' || exit 1
from pathlib import Path
from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for number, (pixels, label) in enumerate(zip(digits.images[:120], digits.target[:120])):
    folder = Path("labelled") / ("val" if number % 4 == 0 else "train") / f"digit{label % 3}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15).astype("uint8")).resize((24, 24)).save(folder / f"{number}.png")
PY
    set=(views.size=16 epochs=2 batch_size=32 workers=0 "model.backbone_args={patch_size: 8, embed_dim: 24, depth: 1}")
    epochs=12
else
    tar -xJf "$data/imagenette96.tar.xz" && mv imagenette96 labelled && tar -xJf "$data/camvid.tar.xz" || exit 1
    set=(views.size=64 epochs=2 batch_size=64 "model.backbone_args={embed_dim: 96, depth: 4}")
    epochs=4
fi
classes=(labelled/train/*/)
mkdir -p sites/north/2023 sites/south/2024 one
find "${classes[0]}" -type f | head -n 40 | xargs cp -t sites/north/2023
find "${classes[1]}" -type f | head -n 40 | xargs cp -t sites/south/2024
cp -r "${classes[0]}" one/only
(cd sites && echo "file,label" && find . -type f | sed 's|^\./||' | awk 'NR % 3 { print $0 "," (NR % 3 == 1 ? "a" : "b") }') > labels.csv

# What it knows.
expect "--help and --version" 0 "usage: ssl-ib-train" "${train[@]}" --help
expect "--version" 0 "^ssl-ib-train [0-9]" "${train[@]}" --version
expect "recipes with a line each" 0 "^mae_vit_tiny_224 +MAE on a folder" "${train[@]}" --list recipes
expect "what a recipe needs" 0 "needs: +images at images"$'\n'"base: +_vit_tiny_224" \
    "${train[@]}" --describe recipe:simclr_vit_tiny_224
only_large expect "a section" 0 "weight_decay"$'\n'"milestones" "${train[@]}" --describe optim

# Mistakes: all at once, with what was meant, before anything is read.
expect "four mistakes in one go" 2 "'optim\.lr'"$'\n'"'batch_size'"$'\n'"'temperature'"$'\n'"'labels'" \
    "${train[@]}" simclr_vit_tiny_224 source.path=sites lr=0.1 batch-size=32 criterion.temperatur=0.2 source.label=none
only_large expect "a folder that is not there" 2 "nowhere" "${train[@]}" simclr_vit_tiny_224 source.path=nowhere
only_large expect "a sweep whose cases differ" 2 "SimCLR.*has no such key" \
    "${sweep[@]}" mrcl_digits masker.ratio=0.3 --case "MRCL:" --case "SimCLR: simclr_digits"

# Labels.
expect "folders that are classes" 0 "labels +[0-9]+ classes: .* [0-9]+, "$'\n'"kNN top-1: chance [0-9.]+, untrained" \
    "${train[@]}" simclr_vit_tiny_224 source.path=labelled "${set[@]}"
expect "a run without a terminal prints where it is" 0 "^step +[0-9]+.*loss" cat before.txt
expect "folders that are none" 0 "labels +none: .*labels=folders"$'\n'"held-out loss: first"$'\n'"RankMe"$'\n'"!kNN top-1" \
    "${train[@]}" simclr_vit_tiny_224 source.path=sites "${set[@]}" --out runs/sites
expect "a table of labels" 0 "labels +2 classes: a [0-9]+, b [0-9]+; [0-9]+ images without a label"$'\n'"chance" \
    "${train[@]}" simclr_vit_tiny_224 source.path=sites source.labels=labels.csv "${set[@]}" --out runs/table
only_large expect "one class has no accuracy" 0 "!kNN top-1"$'\n'"held-out loss" \
    "${train[@]}" simclr_vit_tiny_224 source.path=one source.labels=folders "${set[@]}" --out runs/one
only_large expect "masks are not trained on" 0 "masks of other images are left out" \
    "${train[@]}" simclr_vit_tiny_224 source.path=camvid "${set[@]}" --dry-run

# Images that cannot be read.
cp -r sites spoilt && for n in 1 2 3 4; do echo spoilt > "spoilt/north/2023/$n.png"; done
expect "too many images that cannot be read" 2 "source\.max_unreadable" \
    "${train[@]}" simclr_vit_tiny_224 source.path=spoilt "${set[@]}" --out runs/spoilt
only_large expect "as many as are allowed" 0 "4 images could not be read" \
    "${train[@]}" simclr_vit_tiny_224 source.path=spoilt source.max_unreadable=0.2 "${set[@]}" --out runs/spoilt

# Another backbone, every family, stopping and going on.
only_large expect "another backbone is one override" 0 "dry run of simclr_vit_tiny_224 passed" \
    "${train[@]}" simclr_vit_tiny_224 source.path=labelled views.size=64 model.backbone=resnet18 --dry-run
for recipe in {simclr,mrcl_simclr,mae,mi_mae,dino,svib}_vit_tiny_224; do
    only_large expect "$recipe" 0 "dry run of $recipe passed" "${train[@]}" "$recipe" source.path=labelled --dry-run
done
interrupted() {
    "${train[@]}" simclr_vit_tiny_224 source.path=labelled "${set[@]}" "epochs=$epochs" --out runs/stopped &
    for _ in $(seq 600); do
        [ -s runs/stopped/metrics.jsonl ] && break
        sleep 0.2
    done
    kill -TERM $!
    wait $!
}
expect "a run that is stopped saves itself" 143 "saved .*continue with .*runs/stopped --resume" interrupted
expect "and goes on, named by its folder alone" 0 "resumed +at step"$'\n'"kNN top-1" "${train[@]}" runs/stopped --resume
expect "the encoder from Python" 0 "^features [0-9]+ x [0-9]+" "$python" -c '
import ssl_ib
features, names = ssl_ib.load("runs/sites").embed_folder("sites")
print("features", len(features), "x", features.shape[1])'

[ "$failures" = 0 ] || { echo "$failures steps failed"; exit 1; }
echo "all steps passed"
