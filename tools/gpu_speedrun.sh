#!/usr/bin/env bash
# How long until an encoder is as good as lightly's: SimCLR on CIFAR-10, ResNet-18, 200 epochs, kNN 84.7 %.
#
#   tools/gpu_speedrun.sh OUT CIFAR10 [KEY=VALUE ...]
#
# OUT is the run's folder, CIFAR10 a folder or an archive with one folder a class. A call trains for at most 9 minutes
# (SPEEDRUN_SECONDS), saves, and prints accuracy against time; called again, it goes on. Where it has not come to the
# end it prints a projection. The images are packed once, beside OUT. Exit code: 0 when done, 75 when there is more to
# do, else that of what failed.
set -uo pipefail

if [ $# -lt 2 ]; then sed -n '2,10p' "$0"; exit 2; fi
out=$1 images=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
limit=${SPEEDRUN_SECONDS:-520}
began=$SECONDS

if [ ! -d "$out.images" ]; then
    "$python" -m ssl_ib.cli.data pack "$images" "$out.images" || exit
fi
timeout --signal=TERM --kill-after=30 "$((limit - SECONDS + began))" \
    "$python" -m ssl_ib.cli.train simclr_resnet18_cifar10 source=packed "source.path=$out.images" "$@" \
    --out "$out" --auto-resume
code=$?
"$python" "$here/speedrun_table.py" "$out" || exit
# The run saved itself when `timeout` asked it to stop.
case $code in 124 | 143) exit 75 ;; *) exit "$code" ;; esac
