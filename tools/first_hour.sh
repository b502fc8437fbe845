#!/usr/bin/env bash
# Does what a newcomer with a folder of images does in the first hour, and checks what the terminal says.
#
#   tools/first_hour.sh            on real images, from SSL_IB_DATA (default ../shared/data): some ten minutes on two cores
#   tools/first_hour.sh --small    on scikit-learn's digits as PNG files: under a minute
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

# expect NAME CODE PATTERNS COMMAND...: runs the command, which has to end with the code and to print every pattern (extended
# regular expressions, one a line; one that begins with ! must not be printed).
expect() {
    local name=$1 code=$2 patterns=$3 wrong=() got pattern
    shift 3
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
