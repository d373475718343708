# shellcheck shell=bash
# What the scripts of this folder share; each sources it from the root of the working tree, says what it knows, and lets it read the command line:
#
#   commands   what may be done
#   options    settings with a value: ZONE is --zone=... or stands in the environment
#   switches   settings without one: SPOT is --spot, or SPOT=true in the environment
#
# Afterwards `command` is one of the commands, `train` is what stands after --, and `dry_run` says whether anything is to be done at all.
# shellcheck disable=SC2034  # each script uses what it needs
commands=() options=() switches=()
command='' train=() dry_run=false
script=launch/${0##*/}

usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$script"; }
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}
among() { # whether the first word is one of the others
  local word
  for word in "${@:2}"; do [[ $word != "$1" ]] || return 0; done
  return 1
}

parse() {
  local key
  while (($#)); do
    key=${1%%=*} key=${key#--} key=${key//-/_} key=${key^^}
    case $1 in
    --dry-run) dry_run=true ;;
    --) shift && train=("$@") && break ;;
    -h | --help) usage && exit 0 ;;
    -*)
      if [[ $1 == --*=* ]] && among "$key" "${options[@]}"; then
        printf -v "$key" '%s' "${1#*=}"
      elif among "$key" "${options[@]}"; then
        fail "$1 needs a value, as in $1=..."
      elif [[ $1 != *=* ]] && among "$key" "${switches[@]}"; then
        printf -v "$key" true
      else
        fail "unknown option $1; see $script --help"
      fi
      ;;
    *)
      [[ -z $command ]] || fail "one command at a time: $command or $1"
      command=$1
      ;;
    esac
    shift
  done
  [[ -n $command ]] || { usage >&2 && exit 2; }
  local all
  all=$(printf ', %s' "${commands[@]}")
  among "$command" "${commands[@]}" || fail "unknown command $command; there are ${all#, }"
}

requires() { # names all the settings that are missing
  local setting option missing=()
  for setting; do
    option=${setting,,}
    [[ -n ${!setting:-} ]] || missing+=("--${option//_/-}=...")
  done
  ((${#missing[@]} == 0)) || fail "$command: missing ${missing[*]}"
}
check_numbers() { # refuses settings that are no whole number above or equal to 0
  local setting
  for setting; do [[ ${!setting} =~ ^[0-9]+$ ]] || fail "$setting=${!setting}: must be a whole number"; done
}
requires_train() {
  ((${#train[@]})) || fail "$command: missing -- and what python -m kdjax.train is to be given, as in -- --config=configs/weak2strong.py:scale=paper"
}
requires_runs() { # what pods write must outlive them
  [[ " ${train[*]}" =~ ' --'(config\.runs|workdir)[=\ ] ]] || fail "$command: what it writes would go with its pods; add --config.runs=gs://BUCKET/runs"
}
keeps_local() { # in a folder of that pattern; of several the last counts
  local last='.* --config\.checkpoint\.local[= ]([^ ]*) '
  [[ " ${train[*]} " =~ $last && ${BASH_REMATCH[1]} =~ ^$1$ ]]
}
first_pod() { printf 'jobset.sigs.k8s.io/jobset-name=%s,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0' "$NAME"; }

does() { # runs a command, or shows it as one would type it
  if ! $dry_run; then
    "$@"
    return
  fi
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

tracked_files() { # that are there, separated by NUL: a tracked file may have been deleted
  local file
  git ls-files -z | while IFS= read -r -d '' file; do [[ ! -e $file && ! -L $file ]] || printf '%s\0' "$file"; done
}
train_words() { printf '%q ' "${train[@]}"; } # as a shell reads them again

record() { # what is about to run, from what code
  local folder=launched/$NAME
  if $dry_run; then
    printf 'record in %s: commit, uncommitted changes, command\n' "$folder"
    return
  fi
  mkdir -p "$folder"
  git rev-parse HEAD >"$folder/commit"
  git diff HEAD >"$folder/uncommitted.diff"
  printf '%s\n' "$(train_words)" >"$folder/command"
}
recall() { # what ran before, where nothing else is given
  ((${#train[@]} == 0)) || return 0
  [[ -f launched/$NAME/command ]] || fail "$command: launched/$NAME/command is not here; say again after -- what is to run"
  eval "train=($(cat "launched/$NAME/command"))"
}
