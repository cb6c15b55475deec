#!/bin/sh
# Two machines, or more, without a scheduler. On each of them, in a checkout whose data/ and log/ they share:
#
#     HEAD=10.0.0.1:29500 NODES=2 sh examples/two_nodes.sh gpt2-124m
#
# HEAD is the first machine's address, with a free port. A machine that is lost may come back and give the same command: the
# others wait for it, and all go on from the last checkpoint. A stop, SIGTERM to each torchrun, has the step saved first.
# (--shutdown-timeout came with torch 2.12; before, leave it out, and torchrun waits 30 s.)
set -eu
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a machine that comes back is not told where the others meet
exec torchrun --nnodes="${NODES:-2}" --nproc_per_node="${GPUS:-8}" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id=gpt2 --shutdown-timeout=60 -- \
    train.py "$@"
