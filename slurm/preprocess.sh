#!/bin/bash
# Tokenise a corpus on many nodes: one process of MPI per node, with a worker per core. From the repository's root:
#
#     sbatch slurm/preprocess.sh --input '/shared/corpus/*.jsonl.zst' --tokenizer /shared/tokenizer --output /shared/data/train
#
# The processes share the input files out, so give it more files than nodes. The output is what one process would write.
#SBATCH --job-name=preprocess
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

cd "${DEBERTA_XL_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/lib/launch.sh
. slurm/lib/launch.sh ||
  { echo "error: submit from the root of the repository, or export DEBERTA_XL_ROOT=/path/to/it" >&2; exit 2; }

[[ -n ${SLURM_JOB_ID:-} && -z ${DEBERTA_XL_CHECK:-} ]] || refuse "not inside a SLURM job; start this script with sbatch"
find_python
command -v "${MPIRUN[0]:=mpirun}" >/dev/null ||
  refuse "there is no ${MPIRUN[0]}; load an MPI in slurm/site.env, or pip install mpich, or set MPIRUN=(srun --mpi=pmix) there"
if [[ ${MPIRUN[0]} == mpirun ]]; then MPIRUN+=(-n "$SLURM_NTASKS"); fi
"${MPIRUN[@]}" "${CONTAINER[@]}" python -m mpi4py tools/preprocess.py --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
