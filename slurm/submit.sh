#!/bin/bash
# Check a job, then queue it. From the repository's root:
#
#     slurm/submit.sh [--dry-run] [--chain N] [OPTIONS OF SBATCH] SCRIPT [ARGUMENTS OF THE JOB]
#     slurm/submit.sh --dry-run --nodes=4 slurm/pretrain_1.5b.sh data.train=/shared/train run.folder=/shared/runs/first
#
# Refused here, in seconds: a configuration that does not parse or fit together, data or tokenizer that are missing or
# do not match, a batch that this number of GPUs cannot divide, a run folder that cannot be made, resources that the
# cluster does not have. --dry-run shows the job and asks the scheduler, and queues nothing. --chain N queues N jobs
# that run one after the other and continue each other, where preempted or timed-out jobs are not requeued; those that
# are left when the run is done end at once.
#
# Nothing of the job is done here. A script that ends in `launch` (slurm/lib/launch.sh) is read by bash up to there, with
# no program at hand but those that look at text; of any other script only the headers are known.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit 0
fi

fail() {
  echo "error: $*" >&2
  exit 2
}

is_dry='' links=1 options=()
while (($#)) && [[ $1 != *.sh ]]; do
  case $1 in
    --dry-run) is_dry=yes ;;
    --chain=*) links=${1#*=} ;;
    --chain)
      links=${2:-}
      shift
      ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ $links =~ ^[1-9][0-9]{0,3}$ ]] || fail "--chain $links is not a number of jobs"
(($#)) || fail "no job script; for example: slurm/submit.sh --dry-run slurm/pretrain_1.5b.sh data.train=..."
[[ -r $1 ]] || fail "there is no job script $1"
script=$1
shift

# What sbatch will take: the command line, else its environment (site.env may set it), else the script's headers.
value_of() { # value_of LONG SHORT VARIABLE
  local long=$1 short=$2 variable=$3 value='' number
  for number in "${!options[@]}"; do
    case ${options[number]} in
      "--$long="*) value=${options[number]#*=} ;;
      "--$long" | "-$short") value=${options[number + 1]:-} ;;
      "-$short"?*) value=${options[number]#-"$short"} ;;
    esac
  done
  printf '%s' "${value:-${!variable:-$(sed -n "s/^#SBATCH --$long=//p" "$script" | head -n 1)}}"
}

if [[ -r slurm/site.env ]]; then
  # shellcheck disable=SC1091
  . slurm/site.env
fi
# shellcheck source=slurm/lib/launch.sh
. slurm/lib/launch.sh || fail "start this from the root of the repository"
# shellcheck source=slurm/lib/resources.sh
. slurm/lib/resources.sh
command -v sbatch >/dev/null || fail "there is no sbatch here; log in to a machine of the cluster"
nodes=$(value_of nodes N SBATCH_NODES) per_node=$(value_of ntasks-per-node ' ' SBATCH_NTASKS_PER_NODE)
[[ ${nodes:=1} =~ ^[1-9][0-9]{0,5}$ ]] || fail "--nodes=$nodes: give one number, at least 1; a training job has a fixed size"
[[ ${per_node:=1} =~ ^[1-9][0-9]{0,5}$ ]] || fail "--ntasks-per-node=$per_node: give a number of ranks, at least 1"

echo "== $script on $(count "$nodes" node) x $(count "$per_node" rank)"
run_folder=''
if can_check_job "$script"; then
  said=$(check_job "$script" "$@" 2>&1) || { echo "$said" >&2; exit 2; }
  echo "$said"
  run_folder=$(sed -n 's/^run folder: //p' <<<"$said")
  [[ -n $run_folder ]] || exit 0 # the run is done
  # The fullest stage's.
  needed=$(sed -n 's/.*each rank.* parameters, \([0-9.]*\) GiB .*/\1/p' <<<"$said" | sort -n | tail -n 1)
  if [[ -n ${GPU_MEMORY_GIB:-} && -n $needed ]] && awk -v needed="$needed" -v memory="$GPU_MEMORY_GIB" 'BEGIN { exit !(needed > 0.9 * memory) }'; then
    fail "an estimated $needed GiB per rank does not fit GPU_MEMORY_GIB=$GPU_MEMORY_GIB: use a smaller train.micro_batch_size, train.activation_checkpointing=true, parallel.tensor_parallel_size, or ZeRO-3"
  fi
else
  echo "not checked here, but when the job starts: what $script does with its arguments"
fi

if ((links > 1)); then
  # singleton: one job of this name at a time, so the name has to be the run's own
  name=$(value_of job-name J SBATCH_JOB_NAME)${run_folder:+-$(basename "$run_folder")}
  options+=(--no-requeue --dependency=singleton "--job-name=$name")
  DEBERTA_XL_CHAIN=$name-$(date +%s)
  export DEBERTA_XL_CHAIN
fi
log=$(value_of output o SBATCH_OUTPUT)
log=${log:-slurm-%j.out} # sbatch's own
array=$(value_of array a SBATCH_ARRAY_INX)
if [[ -n $array && $log != *%a* ]]; then # found by the number that squeue shows
  log=${log//%j/%A_%a}
  options+=("--output=$log")
fi
command=(sbatch "${options[@]}" "$script" "$@")
printf '== '
printf '%q ' "${command[@]}"
printf '\n'
sbatch --test-only "${options[@]}" "$script" "$@" ||
  fail "the scheduler would not take this job: $(explain_shortage "$nodes" "$per_node")"
if [[ -n $is_dry ]]; then
  echo "== dry run: nothing was queued"
  exit 0
fi
for ((link = 1; link <= links; link++)); do
  queued=$("${command[@]}")
  echo "$queued"
done
number=$(sed -n 's/^\(Submitted batch job \)\{0,1\}\([0-9][0-9]*\)\(;.*\)\{0,1\}$/\2/p' <<<"$queued" | tail -n 1)
job_name=$(value_of job-name J SBATCH_JOB_NAME)
log=${log//%x/"$job_name"} log=${log//%j/$number} log=${log//%A/$number} log=${log//%a/${array%%[!0-9]*}}
watch=$(printf '%q' "$log")
if [[ -n $run_folder ]]; then watch+="; tensorboard --logdir $(printf '%q' "$run_folder/tensorboard")"; fi
echo "== watch it: squeue --me; tail -F $watch"
