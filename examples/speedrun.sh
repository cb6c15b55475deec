#!/bin/bash
# From a bare machine to a model on a page of your own: trains GPT-2 124M on all of its GPUs.
#
#     bash path/to/this/repository/examples/speedrun.sh
#
# Data, run and model are written into the current folder. Each step is skipped once it is done, so
# run the script again to resume. These variables change it:
#
#     PRESET     what to train (gpt2-124m); OPTIONS has further options of train.py
#     NAME       name of the run and the model (speedrun)
#     PROCESSES  one for each GPU
#     CORPUS     text to tokenize with TOKENIZER (gpt2), as prepare.py takes it; "fineweb" tokenizes
#                FineWeb-Edu; by default published tokens of it are downloaded
#     HELLASWAG  a file of HellaSwag's examples; by default they are downloaded
#     PRICE      of one device per hour, to say what all this cost (0)
#     PYTHON     a Python with the requirements installed; by default .venv is created
#     PAGE       "no" does not start the page
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
preset=${PRESET:-gpt2-124m}
name=${NAME:-speedrun}
data=data/$name
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
state=$name-steps
python=${PYTHON:-.venv/bin/python}
mkdir -p "$state"

# step NAME COMMAND…: run a command unless it has succeeded before, and record its time
step() {
    local title=$1 began=$SECONDS status=0
    shift
    if [ -e "$state/$title" ]; then
        echo "== $title: done before"
        return
    fi
    echo "== $title"
    "$@" || status=$?
    echo $((SECONDS - began)) >> "$state/seconds"
    [ $status -eq 0 ] || exit $status
    touch "$state/$title"
}

environment() {
    if [ -z "${PYTHON:-}" ]; then
        python3 -m venv .venv
        .venv/bin/pip install --quiet -r "$root/requirements.txt"
    fi
}

data() {
    case ${CORPUS:-} in
        "") "$python" "$root/fineweb.py" --pretokenized --out "$data" ;;
        fineweb) "$python" "$root/fineweb.py" --out "$data" ;;
        *) "$python" "$root/prepare.py" "$CORPUS" --tokenizer "${TOKENIZER:-gpt2}" --out "$data" ;;
    esac
}

train() {
    # shellcheck disable=SC2086 (OPTIONS holds several words)
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" \
        "$root/train.py" "$preset" --name "$name" --data "$data" ${OPTIONS:-}
}

score() {
    "$python" "$root/hellaswag.py" -m "log/$name" ${HELLASWAG:+--data "$HELLASWAG"} \
        --json "$name-hellaswag.json"
}

report() {
    "$python" "$root/report.py" "log/$name" | tee "$name-report.txt"
}

export_model() {  # a Hugging Face folder with a model card
    "$python" "$root/publish.py" export "log/$name" "$name-model"
}

step environment environment
step data data
step train train
step hellaswag score
step report report
step export export_model

awk -v n="$processes" -v price="${PRICE:-0}" '{ s += $1 } END {
    printf "== %.2f hours on %d devices cost %.2f\n", s / 3600, n, s / 3600 * n * price
}' "$state/seconds"
echo "== the model is in $name-model; its page: $python $root/app.py --model $name-model"
[ "${PAGE:-}" = no ] || exec "$python" "$root/app.py" --model "$name-model"
