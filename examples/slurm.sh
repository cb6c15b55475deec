#!/bin/bash
# Train on a Slurm cluster, from a checkout on its shared file system:
#
#     sbatch examples/slurm.sh gpt2-124m
#     sbatch --nodes=8 examples/slurm.sh gpt2-124m --shard
#
# Slurm sends SIGTERM 90 seconds before the time limit, or when it preempts the job. The run then
# saves a checkpoint, and this script puts the job back into the queue; the job resumes from the
# checkpoint. A job that ends by itself, with success or an error, is not queued again.
# --shutdown-timeout needs torch 2.12. With an older version leave it out: torchrun then waits 30 s.
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -u

# without this, a restarted machine does not learn the others' new address
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# train, in the background so that this script can receive the signal
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=10 --shutdown-timeout=60 -- train.py "$@" &
run=$!
stopped=
trap 'stopped=yes; kill -TERM $run' TERM  # srun forwards the signal to every torchrun
wait $run
code=$?

# after a signal, wait for the checkpoint and queue the job again
if [ -n "$stopped" ]; then
    wait $run
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
