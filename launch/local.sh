#!/usr/bin/env bash
# Starts a run of several processes on this host, and ends them all when one fails.
#
#   launch/local.sh COUNT [OPTION OF experiments.main]...
#   launch/local.sh 4 --config=experiments/configs/digits.py --workdir=runs/four
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
# shellcheck disable=SC2317 # the trap calls it
stop() { # SIGTERM, Ctrl-C: every process saves and stops
  # shellcheck disable=SC2317
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
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  if ((code > 128)) && kill -0 "$pid" 2> /dev/null; then # the trap came between
    code=0
    wait "$pid" || code=$?
  fi
  ((status == 0)) && status=$code
done
exit "$status"
