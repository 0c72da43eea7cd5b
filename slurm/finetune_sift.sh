#!/bin/bash
# Fine-tune with SiFT on one node with 8 GPUs; with --array once per seed. From the repository's root:
#
#     sbatch slurm/finetune_sift.sh --task rte --data /shared/glue/RTE --init /shared/runs/first run.folder=/shared/runs/rte
#     sbatch --array=1-5 slurm/finetune_sift.sh --task rte --data ... --init ... run.folder=/shared/runs/rte
#     sbatch --array=1-15 slurm/finetune_sift.sh --sweep sweep.txt --task rte ... run.folder=/shared/runs/rte
#
# In an array, task N uses train.seed=N and the folder run.folder-N. With --sweep FILE each line of the file holds
# overrides (optimizer.learning_rate=1e-5 sift.weight=3): task N takes the line ((N-1) modulo lines) and the next seed
# after each turn; its log is also finetune-sift-ARRAY_N.out. When all are done: python tools/table.py '/shared/runs/rte-*'.
# docs/finetuning.md tells the rest.
#SBATCH --job-name=finetune-sift
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

cd "${DEBERTA_XL_ROOT:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/lib/launch.sh
. slurm/lib/launch.sh ||
  { echo "error: submit from the root of the repository, or export DEBERTA_XL_ROOT=/path/to/it" >&2; exit 2; }

sweep='' arguments=()
while (($#)); do
  if [[ $1 == --sweep ]]; then
    sweep=${2:-}
    shift
    [[ -r $sweep ]] || refuse "--sweep $sweep: there is no such file; give one with overrides, a run a line"
  else
    arguments+=("$1")
  fi
  shift || refuse "--sweep needs a file"
done

folder=$(last_value run.folder "${arguments[@]}")
folder=${folder:-runs/finetune-sift}
# slurm/submit.sh checks an array by its first task.
if [[ -n $sweep && -n ${DEBERTA_XL_CHECK:-} ]]; then SLURM_ARRAY_TASK_ID=1; fi
check_numbers SLURM_ARRAY_TASK_ID
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  lines=('') seed=$SLURM_ARRAY_TASK_ID
  if [[ -n $sweep ]]; then
    mapfile -t lines < <(grep -v -e '^ *$' -e '^ *#' "$sweep")
    ((${#lines[@]})) || refuse "--sweep $sweep holds no line of overrides"
    seed=$(((SLURM_ARRAY_TASK_ID - 1) / ${#lines[@]} + 1))
  fi
  read -r -a overrides <<<"${lines[(SLURM_ARRAY_TASK_ID - 1) % ${#lines[@]}]}"
  arguments+=("${overrides[@]}" "train.seed=$seed" "run.folder=$folder-$SLURM_ARRAY_TASK_ID")
elif [[ -n $sweep ]]; then
  refuse "--sweep needs an array: sbatch --array=1-N, N = lines of the file x seeds"
fi

# slurm's pattern for names cannot tell an array from a job: the task's log gets the name that squeue shows, too.
log=${SLURM_JOB_NAME:-}-${SLURM_JOB_ID:-}.out task_log=${SLURM_JOB_NAME:-}-${SLURM_ARRAY_JOB_ID:-}_${SLURM_ARRAY_TASK_ID:-}.out
if [[ -n ${SLURM_ARRAY_JOB_ID:-} && -z ${DEBERTA_XL_CHECK:-} && -f $SLURM_SUBMIT_DIR/$log && ! -e $SLURM_SUBMIT_DIR/$task_log ]]; then
  ln -s "$log" "$SLURM_SUBMIT_DIR/$task_log"
fi

launch deberta_xl/finetune.py --config finetune_sift --deepspeed_config deepspeed_configs/zero1_bf16.json \
  run.folder="$folder" "${arguments[@]}"
