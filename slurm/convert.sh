#!/bin/bash
# Convert a checkpoint on a compute node, where the memory is. From the repository's root:
#
#     sbatch slurm/convert.sh --from native --to huggingface /shared/runs/first /shared/exported
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=01:00:00
#SBATCH --no-requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

cd "${DEBERTA_XL_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/lib/launch.sh
. slurm/lib/launch.sh ||
  { echo "error: submit from the root of the repository, or export DEBERTA_XL_ROOT=/path/to/it" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} && -z ${DEBERTA_XL_CHECK:-} ]] || refuse "not inside a SLURM job; start this script with sbatch"
find_python
"${CONTAINER[@]}" python tools/convert.py "$@"
