# shellcheck shell=bash
# What slurm/submit.sh knows of a job before it is queued. It sources this and launch.sh, and has value_of.

readonly UNLIMITED=999999999 # minutes

# What a training job would launch. Its script is run up to `launch`, which then only checks (DEBERTA_XL_CHECK) and has
# the true PATH again: until there, bash finds programs that look at text, and passes over all others.
can_check_job() { # can_check_job SCRIPT: whether it launches training, and starts no program by its path
  grep -q '^ *launch ' "$1" && grep -q 'slurm/lib/launch\.sh' "$1" && ! grep -q '^[[:space:]]*[^[:space:]#=]*/' "$1"
}

check_job() { # check_job SCRIPT ARGUMENT...
  local harmless program place device='' path=$PATH status=0
  (($(number "$(asked_gpus)" 0) == 0)) || device=cuda # what the job is planned for; this machine may have none
  harmless=$(mktemp -d)
  for program in grep sed head tail cut tr wc sort uniq cat basename dirname date; do
    place=$(type -P "$program") && ln -s "$place" "$harmless/$program"
  done
  # shellcheck disable=SC2317
  command_not_found_handle() { echo "not done here: $*" >&2; }
  export -f command_not_found_handle
  DEBERTA_XL_CHECK=yes DEBERTA_XL_PATH=$path PATH=$harmless SLURM_JOB_NUM_NODES=$nodes \
    DS_ACCELERATOR=${DS_ACCELERATOR:-$device} SLURM_NTASKS=$((nodes * per_node)) "$BASH" "$@" || status=$?
  rm -r "$harmless"
  return "$status"
}

# Which resource is short, and what to type. sinfo has a line for each kind of node: partition, nodes, cores, MiB, gres,
# time limit; of a node's resources the largest of the partition's nodes is compared.
explain_shortage() { # explain_shortage NODES TASKS_PER_NODE
  local nodes=$1 per_node=$2 there partition words
  partition=$(value_of partition p SBATCH_PARTITION)
  there=$(sinfo --exact --noheader --format='%P|%D|%c|%m|%G|%l' 2>/dev/null) || { echo "see above"; return; }
  if [[ -n $partition ]]; then
    if ! cut -d'|' -f1 <<<"$there" | grep -qxF -e "$partition" -e "$partition*"; then
      echo "there is no partition $partition; choose one of: $(cut -d'|' -f1 <<<"$there" | tr -d '*' | sort -u | xargs)"
      return
    fi
    there=$(awk -F'|' -v name="$partition" '$1 == name || $1 == name "*"' <<<"$there")
  elif grep -q '^[^|]*\*' <<<"$there"; then
    there=$(grep '^[^|]*\*' <<<"$there") # the default partition
  fi
  there=$(sort -u <<<"$there")
  words=$(
    short "$nodes" "$(awk -F'|' '{ n += $2 } END { print n + 0 }' <<<"$there")" nodes --nodes
    short_of_cores "$per_node" "$(number "$(value_of cpus-per-task c SBATCH_CPUS_PER_TASK)" 1)" "$(largest 3 <<<"$there")"
    short_of_gpus "$per_node" "$(asked_gpus)" "$(cut -d'|' -f5 <<<"$there" | count_gpus | sort -n | tail -n 1)"
    short "$(value_of mem ' ' SBATCH_MEM_PER_NODE | mebibytes)" "$(largest 4 <<<"$there")" "MiB of memory per node" --mem M
    short_of_time "$(value_of 'time' t SBATCH_TIMELIMIT | minutes)" "$(cut -d'|' -f6 <<<"$there" | minutes | sort -n | tail -n 1)"
  )
  words=${words//$'\n'/; }
  echo "${words:-"see above; what there is: sinfo --format='%P %D %c %m %G %l'"}"
}

largest() { # largest FIELD: the greatest number of a column
  cut -d'|' -f"$1" | tr -cd '0-9\n' | sort -n | tail -n 1
}

short() { # short ASKED THERE NAME OPTION [UNIT]: a line where more is asked than there is
  if [[ $1 =~ ^[0-9]+$ && $2 =~ ^[0-9]+$ ]] && (($1 > $2)); then echo "$1 $3 asked, $2 there: $4=$2${5:-}"; fi
}

short_of_cores() { # short_of_cores TASKS_PER_NODE CORES_PER_TASK THERE
  local asked=$(($1 * $2)) way="--cpus-per-task=$(($3 / $1))"
  if (($1 > $3)); then way="--ntasks-per-node=$3 --cpus-per-task=1"; fi
  if ((asked > $3)); then echo "$asked cores asked per node ($1 x $2), $3 there: $way"; fi
}

short_of_gpus() { # short_of_gpus TASKS_PER_NODE ASKED THERE
  local way="--gres=gpu:$3"
  if (($1 > $3)); then way+=" --ntasks-per-node=$3"; fi
  if (($3 == 0)); then way='--gres=none, to train on CPUs, or another --partition'; fi
  if (($2 > $3)); then echo "$(count "$2" GPU) asked per node, $3 there: $way"; fi
}

short_of_time() { # short_of_time MINUTES_ASKED MINUTES_ALLOWED
  if (($1 < UNLIMITED && $1 > $2)); then echo "--time of $1 minutes asked, the partition allows $2: --time=$2"; fi
}

asked_gpus() { # GPUs per node, from --gres or --gpus-per-node
  printf '%s\n%s\n' "$(value_of gres ' ' SBATCH_GRES)" "gpu:$(value_of gpus-per-node ' ' SBATCH_GPUS_PER_NODE)" |
    count_gpus | sort -n | tail -n 1
}

count_gpus() { # the number in each line like gpu:8, gpu:a100:8(S:0-1), (null)
  sed -n 's/(S:[^)]*)//g; s/.*gpu[^,]*:\([0-9][0-9]*\).*/\1/p; t; s/^gpu$/1/p; t; s/.*/0/p'
}

mebibytes() { # 64G -> 65536; nothing for 0, which means all
  awk '{ n = $1 + 0; u = toupper(substr($1, length($1)))
    f = u == "K" ? 1 / 1024 : u == "G" ? 1024 : u == "T" ? 1048576 : 1; if (n) printf "%d", n * f }'
}

minutes() { # days-hours:minutes:seconds, hours:minutes:seconds, minutes:seconds, minutes -> minutes, rounded up
  awk '/[0-9]/ { days = 0; text = $1; if (split(text, d, "-") == 2) { days = d[1]; text = d[2] }
    n = split(text, t, ":")
    if (days) m = t[1] * 60 + t[2] + (t[3] > 0); else if (n == 3) m = t[1] * 60 + t[2] + (t[3] > 0); else m = t[1] + (t[2] > 0)
    print days * 1440 + m; next } { print '"$UNLIMITED"' }'
}
