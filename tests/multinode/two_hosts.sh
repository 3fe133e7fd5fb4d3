#!/usr/bin/env bash
# The training job on two hosts with addresses of their own; one is lost, comes back, and the job goes on from its
# checkpoint. A host is a Linux network namespace, its cable a veth pair; both see this machine's files.
#
#   sudo tests/multinode/two_hosts.sh [FOLDER]      exit status 77 where namespaces cannot be made
#
# Lost means: every process of the host gets SIGKILL, and its cable is pulled. It leaves the logs and the run in FOLDER.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"
tag=sg$$
if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null || ! ip netns add "$tag-0" 2>/dev/null; then
  echo "two hosts need root and 'ip netns' (iproute2): not run"
  exit 77
fi
kill_host() { ip netns pids "$tag-$1" | xargs -r kill -9 2>/dev/null || true; }
cleanup() {
  for host in 0 1; do
    kill_host $host
    ip netns del "$tag-$host" 2>/dev/null || true
  done
}
trap cleanup EXIT
trap 'exit 1' INT TERM
ip netns add "$tag-1"
plug() { # the cable between the hosts
  ip link add eth9 netns "$tag-0" type veth peer name eth9 netns "$tag-1"
  for host in 0 1; do
    ip -n "$tag-$host" addr add "10.98.0.$((host + 1))/24" dev eth9
    ip -n "$tag-$host" link set lo up
    ip -n "$tag-$host" link set eth9 up
  done
}
start() { # HOST LOG
  ip netns exec "$tag-$1" env NODE="$1" PYTHON="${PYTHON:-python}" \
    launch/multinode.sh 10.98.0.1 2 1 launch/train.py configs/quickstart.yaml \
    run.dir="$out/run" run.resume=auto run.check=false mesh.timeout_s=60 \
    model.layers=1 model.heads=2 model.d_model=16 model.seq_len=32 train.batch=4 train.warmup=2 \
    train.steps="${STEPS:-400}" train.save_every=20 train.eval_every=100000 train.eval_batches=1 sample.tokens=0 \
    >"$2" 2>&1 &
}
wait_for() { # SECONDS WHAT COMMAND…
  local until=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    if [ $SECONDS -ge $until ]; then
      echo "waited in vain for $what; see $out"
      tail -n 15 "$out"/*.log
      exit 1
    fi
    sleep 0.2
  done
}
saved() { compgen -G "$out/run/checkpoints/step-*" >/dev/null; }
gone() { ! kill -0 "$1" 2>/dev/null; }

plug
start 0 "$out/host-0.log"; first=$!
start 1 "$out/host-1.log"; second=$!
wait_for "${PATIENCE:-120}" "the first checkpoint" saved
kill_host 1
ip -n "$tag-1" link del eth9
wait $second 2>/dev/null || true
echo "host 1 was lost at $(ls "$out/run/checkpoints" | sort | tail -n 1): its processes killed, its cable pulled"
sleep "${AWAY:-5}" # a machine takes longer to start
plug
start 1 "$out/host-1-again.log"; second=$!
wait_for "${PATIENCE:-240}" "the end of the job" gone $first
status=0
wait $first || status=$?
wait $second || status=$?
[ $status = 0 ] || { echo "the job ended with status $status"; tail -n 15 "$out"/*.log; exit 1; }
echo "the job was brought back and ended: $(ls "$out/run/checkpoints" | sort | tail -n 1)"
