#!/bin/bash
# Pretrain DeBERTa with 1.5 billion parameters on nodes with 8 GPUs. From the repository's root:
#
#     sbatch slurm/pretrain_1.5b.sh data.train=/shared/data/train run.folder=/shared/runs/first
#     sbatch --nodes=4 --time=12:00:00 slurm/pretrain_1.5b.sh train.global_batch_size=1024
#
# Options of sbatch override the lines below; what follows the script's name overrides the preset, and may be --config
# or --deepspeed_config, too. slurm/submit.sh checks everything before it queues. docs/slurm.md tells the rest.
#SBATCH --job-name=pretrain-1.5b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

cd "${DEBERTA_XL_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/lib/launch.sh
. slurm/lib/launch.sh ||
  { echo "error: submit from the root of the repository, or export DEBERTA_XL_ROOT=/path/to/it" >&2; exit 2; }

launch deberta_xl/pretrain.py --config xxlarge --deepspeed_config deepspeed_configs/zero1_bf16.json \
  data.train=data/train data.valid=data/valid run.folder=runs/pretrain-1.5b "$@"
