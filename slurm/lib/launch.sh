# shellcheck shell=bash
# From the allocation to the ranks, for every training job. The job scripts source this in the repository's root.
#
#     launch ENTRY_POINT ARGUMENT...
#
# ENTRY_POINT is a Python file that is started once per GPU with these arguments, and once per node with --check in
# front of them, where it ends with status 2 and one line on standard error if it could not run. The last
# run.folder=FOLDER among the arguments says where it keeps STATE, LATEST, OWNER and heartbeat/.
#
# How the job goes on depends on how the ranks ended:
#
#     slurm has started it anew    exit: this is a lost node that lives on
#     STATE says done              exit 0, now and at every later start
#     this shell got TERM          exit: scancel, which means it, or a preemption, after which slurm requeues by itself
#     another job took the folder  exit: that one goes on
#     all ranks refuse to start    exit 2: a user's error that only they could find
#     STATE says diverged          exit 2: the same command would come to the same end; a chain's other jobs do nothing
#     STATE says stopped           requeue: the time limit (USR1), or a preemption that only the ranks were told of
#     anything else, a crash       requeue, but at most MAX_CRASHES times in a row without a new checkpoint

set -uo pipefail

readonly REFUSED=4 # deberta_xl/commands/training_command.py; srun tells it only when no rank was killed or ended with a greater one

say() { printf '[%(%F %T)T] %s%s\n' -1 "${SLURM_JOB_ID:+job ${job:-$SLURM_JOB_ID}.${SLURM_RESTART_COUNT:-0}: }" "$*"; }

refuse() { # refuse REASON: something that a person has to change; another start would not help
  say "error: $*" >&2
  exit 2
}

launch() {
  local entry_point=$1 status=0
  shift
  asked='' training_pid='' bad_nodes=''
  PATH=${DEBERTA_XL_PATH:-$PATH} # slurm/submit.sh has kept the programs of the script's other lines away
  [[ -n ${SLURM_NTASKS:-} ]] || refuse "not inside a SLURM job; start this script with sbatch or slurm/submit.sh"
  run_folder=$(last_value run.folder "$@")
  [[ -n $run_folder ]] || refuse "run.folder=FOLDER is missing from the arguments"
  if [[ $(read_line STATE) == "done" ]]; then
    say "$run_folder is done; to train on with more train.steps, remove $run_folder/STATE first"
    exit 0
  fi
  find_python
  check_numbers MAX_CRASHES WATCHDOG_SECONDS SLURM_NTASKS SLURM_JOB_NUM_NODES SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_NTASKS_PER_NODE \
    SLURM_GPUS_ON_NODE SLURM_CPUS_PER_TASK
  [[ ${WATCHDOG_SECONDS:-900} != 0 ]] || refuse "WATCHDOG_SECONDS=$WATCHDOG_SECONDS would end every start at once; give seconds, as in WATCHDOG_SECONDS=900"
  if [[ -n ${DEBERTA_XL_CHECK:-} ]]; then
    check_submission "$entry_point" "$@"
    exit 0
  fi
  name_job
  check_crashes
  trap 'hear USR1' USR1
  trap 'hear TERM' TERM
  prepare_environment
  check_tasks
  prepare_run_folder
  check_inputs "$entry_point" "$@"
  owner_before=$(read_line OWNER) # a start that fails before it claims the folder leaves another job's name there
  replace STATE running # an earlier start's "stopped" must not speak for this one
  [[ -n $asked ]] || preflight || status=$?
  [[ -n $asked ]] || ((status)) || train "$entry_point" "$@" || status=$?
  conclude "$status"
}

# Bash takes what stands in arithmetic for an expression, and runs the commands in its subscripts. So nothing that was
# read from a file or the environment may come there before it has gone through here or check_numbers.
number() { # number TEXT DEFAULT: TEXT where it is a whole number of at most 9 digits, else DEFAULT; in decimal
  if [[ $1 =~ ^[0-9]{1,9}$ ]]; then printf '%d' "$((10#$1))"; else printf '%s' "$2"; fi
}

check_numbers() { # check_numbers NAME...: refuse variables that are set and hold something else
  local name value
  for name in "$@"; do
    value=$(number "${!name:-0}" '')
    [[ -n $value ]] || refuse "$name=${!name} is not a whole number of at most 9 digits"
    if [[ -n ${!name:-} ]]; then printf -v "$name" '%s' "$value"; fi
  done
}

last_value() { # last_value KEY ARGUMENT...: the value of the last KEY=VALUE
  local key=$1 value='' argument
  shift
  for argument in "$@"; do
    if [[ $argument == "$key="* ]]; then value=${argument#*=}; fi
  done
  if [[ $value == "~"* ]]; then value=$(expand_home "$value"); fi
  printf '%s' "$value"
}

expand_home() { # expand_home PATH: ~/x, ~ and ~user/x as Python will understand them
  local user=${1%%/*} home=~
  if [[ $user != "~" ]]; then home=$(getent passwd "${user#?}" | cut -d: -f6); fi
  printf '%s' "${home:-$user}${1#"$user"}"
}

read_line() { # read_line FILE: first line of a file of the run folder, nothing when there is none
  [[ ! -f $run_folder/$1 ]] || head -c 4096 "$run_folder/$1" 2>/dev/null | head -n 1 || true
}

replace() { # replace FILE LINE: write a file of the run folder in one piece
  printf '%s\n' "$2" >"$run_folder/$1.partial" && mv -f "$run_folder/$1.partial" "$run_folder/$1"
}

hear() { # hear SIGNAL: the traps
  asked=$1
  if [[ -n $training_pid ]]; then
    say "received $1: asking the ranks to save a checkpoint and to stop"
    kill -USR1 "$training_pid" 2>/dev/null || true # srun hands it to every rank
  else
    say "received $1 before training began"
  fi
}

find_python() {
  CONTAINER=()
  # shellcheck disable=SC1091
  if [[ -r slurm/site.env ]]; then . slurm/site.env; fi
  if [[ -x .venv/bin/python && ${#CONTAINER[@]} == 0 ]]; then PATH=$PWD/.venv/bin:$PATH; fi
  command -v "${CONTAINER[0]:-python}" >/dev/null ||
    refuse "no ${CONTAINER[0]:-python} here; run \`make setup\` in $PWD, or say in slurm/site.env where it is"
  export PATH PYTHONUNBUFFERED=1
}

# For slurm/submit.sh, which starts a job script on the login node with DEBERTA_XL_CHECK set: says what it would do.
check_submission() { # check_submission ENTRY_POINT ARGUMENT...
  local there=$run_folder kind
  while [[ ! -e $there && $there == */* ]]; do there=${there%/*}; done
  if [[ ! -e ${there:=/} ]]; then there=.; fi
  [[ -d $there && -w $there ]] || refuse "run.folder=$run_folder cannot be made: $there is not writable"
  kind=$(stat --file-system --format=%T "$there")
  case $kind in
    nfs* | lustre | gpfs | beegfs | ceph | wekafs | panfs | fuse* | smb* | afs | 9p | v9fs) ;;
    *) ((${SLURM_JOB_NUM_NODES:-1} == 1)) ||
      say "warning: run.folder=$run_folder is on $kind, which other nodes may not see; the job will check" ;;
  esac
  SLURM_STEP_ID='' RANK=0 LOCAL_RANK=0 WORLD_SIZE=$SLURM_NTASKS "${CONTAINER[@]}" python "$1" --check "${@:2}" || exit 2
  printf 'run folder: %s\n' "$run_folder"
}

# What slurm's commands call this job. In an array, a number alone may mean all of its tasks: the last one has the array's.
name_job() {
  local found
  job=${SLURM_ARRAY_JOB_ID:-}_${SLURM_ARRAY_TASK_ID:-}
  if [[ $job == _ ]]; then job=$SLURM_JOB_ID; fi
  found=$(job_field JobId)
  # A job that was submitted by a task of an array has inherited that task's variables.
  if [[ -n $found && $found != "$SLURM_JOB_ID" ]]; then job=$SLURM_JOB_ID; fi
}

check_crashes() {
  local chain count what
  read -r chain count _ <<<"$(read_line slurm/crashes)"
  count=$(number "$count" 0)
  what="this chain of jobs has crashed $count times in a row without a new checkpoint"
  if [[ $(read_line STATE) == diverged ]]; then what="the run of this chain of jobs has diverged"; fi
  [[ -z ${DEBERTA_XL_CHAIN:-} || $chain != "$DEBERTA_XL_CHAIN" ]] || ((count < ${MAX_CRASHES:-3})) ||
    refuse "$what; the rest of it does nothing"
}

prepare_environment() {
  num_nodes=${SLURM_JOB_NUM_NODES:-1}
  NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  # A port of this start's own: stragglers of an earlier one cannot walk in.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 10000))
  MASTER_ADDR=$(address_of "${NODE_NAMES%% *}")
  : "${OMP_NUM_THREADS:=${SLURM_CPUS_PER_TASK:-1}}"
  : "${WATCHDOG_SECONDS:=900}" # the ranks' own patience is longer
  NUM_RANKS=$SLURM_NTASKS
  export NUM_RANKS NODE_NAMES MASTER_ADDR MASTER_PORT OMP_NUM_THREADS WATCHDOG_SECONDS
}

address_of() { # address_of NODE: its name where that can be looked up, else the address slurm uses
  local address=''
  getent hosts "$1" >/dev/null || address=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  printf '%s' "${address:-$1}"
}

check_tasks() {
  local per_node=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / num_nodes))} gpus=${SLURM_GPUS_ON_NODE:-} asked_for
  ((per_node * num_nodes == SLURM_NTASKS)) ||
    refuse "$(count "$SLURM_NTASKS" task) do not spread evenly over $(count "$num_nodes" node); use --nodes and --ntasks-per-node"
  asked_for=$(job_field TresPerNode)$(job_field TresPerJob)
  [[ -n $gpus && $asked_for == *gpu* ]] || return 0 # an exclusive job is given GPUs that it did not ask for
  ((per_node <= gpus)) ||
    refuse "$(count "$per_node" rank) but $(count "$gpus" GPU) on a node; one rank drives one GPU: use --ntasks-per-node=$gpus, or more --gres"
  if [[ $asked_for =~ gpu[^,]*[:=]([0-9]+) ]]; then gpus=${BASH_REMATCH[1]}; fi
  ((per_node >= gpus)) || say "warning: $(count "$per_node" rank) leave $((gpus - per_node)) of $(count "$gpus" GPU) of a node idle"
}

count() { # count NUMBER NOUN: "1 node", "2 nodes"
  if (($1 == 1)); then echo "1 $2"; else echo "$1 $2s"; fi
}

prepare_run_folder() {
  { mkdir -p "$run_folder/slurm" && replace slurm/probe "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"; } ||
    refuse "run.folder=$run_folder cannot be written; choose another folder, or make room"
  say "run folder $run_folder; $(count "$SLURM_NTASKS" rank) on $NODE_NAMES; they meet at $MASTER_ADDR:$MASTER_PORT"
}

# Here first: what is wrong everywhere is said once.
check_inputs() { # check_inputs ENTRY_POINT ARGUMENT...
  check_node "$PWD" "$run_folder" "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "${#CONTAINER[@]}" "${CONTAINER[@]}" "$@" || exit 2
  ((num_nodes > 1)) || return 0
  srun --export=ALL --mpi=none --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1 --cpus-per-task=1 --quiet \
    bash -c "$(declare -f check_node); check_node \"\$@\"" check_node "$PWD" "$run_folder" \
    "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "${#CONTAINER[@]}" "${CONTAINER[@]}" "$@" ||
    refuse "the node named above cannot take part; mend it, or leave it out: scontrol update jobid=... ExcNodeList=..., sbatch --exclude=..."
}

check_node() { # check_node ROOT RUN_FOLDER PROBE NUM CONTAINER... ENTRY_POINT ARGUMENT...: on one node, before torch
  local root=$1 folder=$2 probe=$3 node=${SLURMD_NODENAME:-$HOSTNAME} container said
  complain() { echo "error: node $node: $*" >&2; return 2; }
  container=("${@:5:$4}")
  shift "$((4 + $4))"
  cd "$root" 2>/dev/null || complain "there is no $root; put the repository on a file system that all nodes share" || return
  [[ $(cat "$folder/slurm/probe" 2>/dev/null) == "$probe" ]] ||
    complain "run.folder=$folder is not the folder that the first node sees; choose one that all nodes share" || return
  command -v "${container[0]:-python}" >/dev/null ||
    complain "there is no ${container[0]:-python}; put the environment on a file system that all nodes share" || return
  # As rank 0 of the training step, wherever this is: the step of this check counts nodes.
  said=$(SLURM_STEP_ID='' RANK=0 LOCAL_RANK=0 WORLD_SIZE=$NUM_RANKS "${container[@]}" python "$1" --check "${@:2}" 2>&1) ||
    complain "$(tail -n 1 <<<"$said")" || return
}

ranks() { # ranks COMMAND... &: start it once per rank; "exec", so that $! is srun, which passes signals on
  exec srun --export=ALL --mpi=none --kill-on-bad-exit=1 --distribution=block \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${CONTAINER[@]}" "$@"
}

preflight() {
  ranks python -m deberta_xl.run.preflight "$run_folder" &
  finish "$!" || {
    local status=$?
    bad_nodes=$(read_line slurm/bad_nodes)
    say "the pre-flight failed${bad_nodes:+; to blame: $bad_nodes}"
    ((num_nodes == 1 || $(wc -w <<<"$bad_nodes") < num_nodes)) || refuse "all nodes are alike: it is not theirs to mend"
    return "$status"
  }
}

finish() { # finish PID: wait for a child; its status. A signal that is trapped ends "wait" early
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  wait "$1"
}

train() { # train ENTRY_POINT ARGUMENT...
  ranks python "$@" &
  training_pid=$!
  "${CONTAINER[@]}" python -m deberta_xl.run.watchdog "$run_folder/heartbeat" --limit "$WATCHDOG_SECONDS" \
    --since "$run_folder/slurm/probe" &
  local watchdog_pid=$!
  while kill -0 "$training_pid" 2>/dev/null; do
    if [[ -n $watchdog_pid ]] && ! kill -0 "$watchdog_pid" 2>/dev/null; then
      wait "$watchdog_pid" || (($? != 3)) || kill_ranks # it has said what hangs
      watchdog_pid=''
    fi
    wait -n "$training_pid" ${watchdog_pid:+"$watchdog_pid"} || true
  done
  if [[ -n $watchdog_pid ]]; then kill "$watchdog_pid" 2>/dev/null || true; fi
  wait "$training_pid"
}

kill_ranks() {
  local step
  for step in $(squeue --steps --noheader --jobs="$job" --format=%i | grep '\.[0-9][0-9]*$'); do
    scancel --signal=KILL "$step"
  done
}

conclude() { # conclude STATUS: how the job ends
  local status=$1 state owner
  if [[ $(job_field Restarts) != "${SLURM_RESTART_COUNT:-0}" ]]; then
    say "slurm has started this job again elsewhere, or does not answer; this start ends" # on a node that was lost
    exit 1
  fi
  state=$(read_line STATE) owner=$(read_line OWNER)
  say "the ranks ended with status $status; STATE: ${state:-none}; asked to stop by: ${asked:-nobody}; LATEST: $(read_line LATEST)"
  if [[ $state == "done" ]]; then exit 0; fi
  if [[ $asked == TERM ]]; then exit $((status ? status : 143)); fi
  if [[ -n $owner && $owner != "$owner_before" && $owner != "job $SLURM_JOB_ID."* ]]; then
    say "error: $run_folder belongs to $owner; this job ends" >&2
    exit 1
  fi
  if [[ $state == diverged ]]; then
    replace slurm/crashes "${DEBERTA_XL_CHAIN:-$SLURM_JOB_ID} ${MAX_CRASHES:-3} $(read_line LATEST)"
    refuse "the run has diverged; do what the ranks said above, then submit the command again"
  fi
  if [[ -n $training_pid && $status == "$REFUSED" ]]; then
    refuse "another start would end there, too; mend what the ranks said above, then submit the same command"
  fi
  if [[ $state == stopped || ( $asked == USR1 && -z $training_pid ) ]]; then
    requeue
    exit 0
  fi
  count_crash || exit $((status ? status : 1))
  requeue
  exit $((status ? status : 1))
}

count_crash() { # false when it is enough
  local chain=${DEBERTA_XL_CHAIN:-$SLURM_JOB_ID} latest last_chain last_count last_latest count=1
  latest=$(read_line LATEST)
  read -r last_chain last_count last_latest <<<"$(read_line slurm/crashes)"
  if [[ $last_chain == "$chain" && $last_latest == "$latest" ]]; then count=$(($(number "$last_count" 0) + 1)); fi
  replace slurm/crashes "$chain $count $latest"
  say "crash $count of at most ${MAX_CRASHES:-3} in a row without a new checkpoint"
  ((count < ${MAX_CRASHES:-3})) || {
    say "error: giving up; mend what the ranks said above, then submit the same command to go on from ${latest:-the start}" >&2
    return 1
  }
}

requeue() { # returns when there will be no other start of this job
  local state
  state=$(job_field JobState)
  if [[ $state != RUNNING ]]; then say "not requeued: the job is $state"; return; fi
  if [[ $(job_field Requeue) != 1 ]]; then say "not requeued: the job was submitted without --requeue"; return; fi
  trap '' TERM # slurm's way of ending this shell now
  scontrol requeue "$job" || { say "not requeued: slurm refuses"; return; }
  say "requeued"
  if [[ -n $bad_nodes ]]; then exclude; fi
  exit 0
}

exclude() {
  local excluded
  excluded=$(job_field ExcNodeList)
  if [[ $excluded == "(null)" ]]; then excluded=''; fi
  if scontrol update jobid="$job" ExcNodeList="${excluded:+$excluded,}${bad_nodes// /,}"; then
    say "from now on without $bad_nodes; to let them in again: scontrol update jobid=$job ExcNodeList=''"
  fi
}

job_field() { # job_field NAME: what slurm says of this job
  scontrol show job "$job" | sed -n "s/.*\b$1=\([^ ]*\).*/\1/p" | head -n 1
}
