#!/bin/bash
# Pretrain a DeBERTaV3 by replaced token detection on nodes with 8 GPUs. From the repository's root:
#
#     sbatch slurm/pretrain_v3.sh data.train=/shared/data/train data.valid=/shared/data/valid run.folder=/shared/runs/v3
#     sbatch --nodes=1 slurm/pretrain_v3.sh --config v3_small model.vocab_size=none train.global_batch_size=2048 ...
#     sbatch --nodes=8 slurm/pretrain_v3.sh --config mv3_base ...
#
# --config takes v3_xsmall, v3_small, v3_base, v3_base_8k, v3_large or mv3_base. Generator and discriminator are trained
# by the same job, in one run folder. Options of sbatch override the lines below; what follows the script's name
# overrides the preset. slurm/submit.sh checks everything before it queues. docs/slurm.md tells the rest.
#SBATCH --job-name=pretrain-v3
#SBATCH --nodes=4
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

launch deberta_xl/pretrain.py --config v3_base --deepspeed_config deepspeed_configs/zero1_bf16.json \
  data.train=data/train data.valid=data/valid run.folder=runs/pretrain-v3 "$@"
