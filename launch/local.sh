#!/usr/bin/env bash
# Trains on this machine by the deepspeed launcher: as many processes as asked for, one per GPU where there are any.
#
#   launch/local.sh NPROC CONFIG [--set section.key=value ...]
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NPROC CONFIG [--set section.key=value ...]" >&2
  exit 2
fi
processes=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -x $root/.venv/bin/python ]]; then
  export PATH="$root/.venv/bin:$PATH"
fi
if ! command -v deepspeed >/dev/null; then
  echo "launch/local.sh: deepspeed is not installed; run \`make demo\` once, or pip install -e $root" >&2
  exit 2
fi

if ! command -v nvidia-smi >/dev/null; then
  export DS_ACCELERATOR=cpu
  threads=$(($(nproc) / processes))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi
# The project's own folder: a stale lock of somebody else's build would stop every start without a word.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.cache/torch_extensions}

# A port of its own, so that two runs on one machine do not meet.
port=$(python -c 'from xlscale.ports import free_port; print(free_port())')

# In a process group of its own, ended as a whole: the launcher's own children would outlive it and train on.
set -m
deepspeed --log_level error --num_gpus "$processes" --master_addr 127.0.0.1 --master_port "$port" \
  --module xlscale.cli train "$@" &
group=$!
# A signal goes to the training processes alone, which save and exit with a status (75: start it again) that the launcher
# hands on. The launcher itself would end them one after the other and exit with 1. A second signal ends all at once.
hand_on() {
  trap 'kill -TERM -- "-$group" 2>/dev/null' TERM INT HUP USR1
  pkill "-$1" -g "$group" -f -- '-m xlscale\.cli' || kill -TERM -- "-$group" 2>/dev/null
}
trap 'hand_on TERM' TERM INT HUP
trap 'hand_on USR1' USR1
# A trap ends a wait, and what it sent takes its time; bash keeps the status for the last one.
while kill -0 "$group" 2>/dev/null; do
  wait "$group" || true
done
status=0
wait "$group" || status=$?
exit "$status"
