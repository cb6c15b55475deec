#!/bin/bash
# A run on a Slurm cluster, from a checkout on its shared file system:
#
#     sbatch examples/slurm.sh gpt2-124m
#     sbatch --nodes=8 examples/slurm.sh gpt2-124m --shard
#
# A minute and a half before the time is over, or when the job is preempted, Slurm sends SIGTERM: the step is saved, and the job
# goes back into the queue, where it goes on from there. A job that ends otherwise, complete or refused, stays ended.
# (--shutdown-timeout came with torch 2.12; before, leave it out, and torchrun waits 30 s.)
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
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a machine that comes back is not told where the others meet
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" --shutdown-timeout=60 -- \
    train.py "$@" &
run=$! stopped=
trap 'stopped=yes; kill -TERM $run' TERM  # srun hands it on to every torchrun
wait $run
code=$?
if [ -n "$stopped" ]; then
    wait $run
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
