#!/bin/sh
# Train on two or more machines without a scheduler. Run this on each of them, in a checkout. The
# data and log/ must be on a file system that all machines share:
#
#     HEAD=10.0.0.1:29500 NODES=2 sh examples/two_nodes.sh gpt2-124m
#
# HEAD is the first machine's address and a free port on it. If a machine fails, run the same
# command on it again: the others wait for it, and all resume from the last checkpoint. To stop the
# run, send SIGTERM to each torchrun; the run saves a checkpoint first.
# --shutdown-timeout needs torch 2.12. With an older version leave it out: torchrun then waits 30 s.
set -eu

# without this, a restarted machine does not learn the others' new address
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="${NODES:-2}" --nproc_per_node="${GPUS:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id=gpt2 \
    --max-restarts=10 --shutdown-timeout=60 -- train.py "$@"
