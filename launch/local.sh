#!/usr/bin/env bash
# Starts a run of several processes on this host, and ends them all when one fails. (bash 5.1)
#
#   launch/local.sh COUNT [OPTION OF experiments.main]...
#   launch/local.sh 4 --config=digits --workdir=runs/four
#
# With GPUS=1 each process has one GPU. (One process can also use all GPUs of a host: without this
# script.) PYTHON names another interpreter.
set -euo pipefail

if (($# < 1)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

pids=()
stop() { # SIGTERM, Ctrl-C, a failure: every process saves and stops
  stop() { :; } # once is enough
  kill -TERM "${pids[@]}" 2> /dev/null || true
}
trap stop INT TERM

for ((i = 0; i < count; i++)); do
  if [[ ${GPUS:-0} == 1 ]]; then export CUDA_VISIBLE_DEVICES=$i; fi
  "$python" -m experiments.main --distributed --coordinator="localhost:$port" \
    --processes="$count" --process="$i" "$@" &
  pids+=($!)
done

status=0
for ((left = count; left > 0;)); do
  code=0
  wait -n -p ended || code=$?
  if [[ -n ${ended:-} ]]; then
    left=$((left - 1))
  elif ((code == 127)); then # none is left: bash missed one that was killed early
    left=0
  else # the trap came between
    continue
  fi
  if ((code && !status)); then
    status=$code
    stop
  fi
done
exit "$status"
