#!/usr/bin/env bash
# A run on a slice of TPU VMs, asked for as a queued resource.
#
#   launch/tpu_vm.sh create NAME        asks for the slice (it may wait in the queue)
#   launch/tpu_vm.sh state NAME         says whether it is there
#   launch/tpu_vm.sh install NAME       copies this project's last commit to all its hosts, and
#                                       installs it; again = updates it, deletions too
#   launch/tpu_vm.sh run NAME OPTION... runs experiments.main on all hosts; again = goes on
#   launch/tpu_vm.sh delete NAME
#
# TYPE (v5litepod-16), ZONE, PROJECT and VERSION (v2-alpha-tpuv5-lite) say which; SPOT=1 asks for
# pre-emptible ones. --workdir must be on a file system that all hosts share (Filestore, mounted).
# DRY=1 prints the commands instead. uv installs, with a newer Python where a host's is older than
# 3.11; hosts need access to the internet.
set -euo pipefail

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
(($# >= 2)) || usage
what=$1 name=$2
shift 2
type=${TYPE:-v5litepod-16} version=${VERSION:-v2-alpha-tpuv5-lite}
where=(--zone="${ZONE:?names the zone}" --project="${PROJECT:?names the project}")

do_it() {
  if [[ ${DRY:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_all_hosts() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

case $what in
  create)
    spot=()
    if [[ ${SPOT:-0} == 1 ]]; then spot=(--spot); fi
    do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" \
      --accelerator-type="$type" --runtime-version="$version" "${where[@]}" "${spot[@]}"
    ;;
  state)
    do_it gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format="value(state.state)"
    ;;
  install)
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
    do_it git -C "$(dirname "$0")/.." archive --output="$folder/saflex_jax.tar.gz" HEAD
    do_it gcloud compute tpus tpu-vm scp "$folder/saflex_jax.tar.gz" "$name:" "${where[@]}" --worker=all
    # shellcheck disable=SC2016 # the hosts expand it
    on_all_hosts 'set -e
      mkdir -p saflex_jax && cd saflex_jax
      # What the last one brought goes first; .venv, data and runs are not of it.
      if [ -e .installed ]; then xargs -d "\n" rm -f -- < .installed; fi
      tar -tzf ../saflex_jax.tar.gz | grep -v "/$" > .installed
      tar -xzf ../saflex_jax.tar.gz
      PATH=$HOME/.local/bin:$PATH
      command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh
      uv venv -q --allow-existing --python ">=3.11" .venv
      uv pip install -q -e ".[experiments]" "jax[tpu]"'
    ;;
  run)
    on_all_hosts "cd saflex_jax && .venv/bin/python -m experiments.main --distributed --noprogress ${*@Q}"
    ;;
  delete)
    do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force
    ;;
  *) usage ;;
esac
