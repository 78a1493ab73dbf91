#!/bin/bash
# Filled in by `vitjax launch tpu-vm`: @WHAT@
# Steps: create wait copy install start, all of them with `up`; then follow, stop, delete.
set -euo pipefail

place=(@PLACE@)
source=@SOURCE@  # the repository, copied to every worker
jobs=(@JOBS@)
slices=@SLICES@
run=@RUN@

nodes() {  # of a job: itself, or one for each of its slices
  if ((slices == 1)); then echo "$1"; else
    for ((i = 0; i < slices; i++)); do echo "$1-$i"; done
  fi
}

everywhere() {  # $1: a job, $2: what to run on every worker of it
  local node
  for node in $(nodes "$1"); do
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$2"
  done
}

create() {
  local names=(--node-id="$1")
  if ((slices > 1)); then names=(--node-prefix="$1" --node-count="$slices"); fi
  gcloud compute tpus queued-resources create "$1" "${place[@]}" "${names[@]}" \
    --accelerator-type=@TYPE@ --runtime-version=@RUNTIME@ @OPTIONS@
}

wait_for() {
  local state
  while true; do
    state=$(gcloud compute tpus queued-resources describe "$1" "${place[@]}" \
      --format='value(state.state)')
    echo "$1: $state"
    case $state in
      ACTIVE) return ;;
      FAILED|SUSPENDED|SUSPENDING) return 1 ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

copy() {
  local node packed
  packed=$(mktemp -d)/vitjax.tar.gz
  tar --exclude=.git --exclude=.venv --exclude=runs --exclude=__pycache__ -czf "$packed" -C "$source" .
  for node in $(nodes "$1"); do
    gcloud compute tpus tpu-vm scp "$packed" "$node:vitjax.tar.gz" "${place[@]}" --worker=all
  done
  rm -r "${packed%/*}"
}

install() {  # a Python of its own, since the system's may be older than what vitjax needs
  everywhere "$1" 'set -e; mkdir -p vitjax; tar -xzf vitjax.tar.gz -C vitjax
python3 -m pip install -q --user uv
~/.local/bin/uv venv -q --allow-existing --python 3.12 vitjax/.venv
~/.local/bin/uv pip install -q --python vitjax/.venv/bin/python -e "vitjax[tpu]"'
  mount_bucket "$1" @BUCKET@
}

mount_bucket() {  # by gcsfuse, from Google's packages; a whole checkpoint's folder is renamed
  everywhere "$1" "set -e; bucket=$2 path=$3"'
if mountpoint -q "$path"; then exit 0; fi
from=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
curl -fsSL "$from/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
sudo apt-get update -qq
sudo apt-get install -qq -y gcsfuse
sudo mkdir -p "$path"
sudo chown "$USER" "$path"
gcsfuse --implicit-dirs --rename-dir-limit=200000 "$bucket" "$path"'
}

start() {  # in a session that outlives the connection
  local words="job=$1; $run"
  everywhere "$1" "rm -f vitjax.stop; tmux new-session -d -s vitjax bash -c $(printf %q "$words")"
}

follow() {
  gcloud compute tpus tpu-vm ssh "$(nodes "$1" | head -n 1)" "${place[@]}" --worker=0 \
    --command='tail -n 100 -F vitjax.log'
}

stop() {  # each saves and leaves; start goes on
  everywhere "$1" 'touch vitjax.stop; tmux send-keys -t vitjax C-c'
}

delete() {  # nothing is paid for after this; what lies on the workers' disks is lost
  gcloud compute tpus queued-resources delete "$1" "${place[@]}" --force --quiet
}

case ${1:-} in
  up) steps=(create wait_for copy install start) ;;
  wait) steps=(wait_for) ;;
  create|copy|install|start|follow|stop|delete) steps=("$1") ;;
  *) echo "usage: bash $0 up|create|wait|copy|install|start|follow|stop|delete" >&2; exit 2 ;;
esac
for step in "${steps[@]}"; do
  for job in "${jobs[@]}"; do "$step" "$job"; done
done
