#!/bin/bash
# sbatch slurm.sh train --config mdlm/blocks_12 --workdir /shared/runs/blocks_12 --mesh.data 32
#
# One process per GPU. Five minutes before the time is over Slurm ends them by SIGTERM: the run saves
# its step, ends with status 143, and goes back into the queue, from where it continues.
#SBATCH --job-name=dials
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

status=0
srun dials "$@" --distributed || status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
