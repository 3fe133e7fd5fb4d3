#!/usr/bin/env bash
# One job on several machines, without a scheduler: run this on each of them. torchrun does the rest.
#
#   NODE=0 launch/multinode.sh HEAD NODES RANKS launch/train.py configs/quickstart.yaml run.resume=auto
#
# HEAD   address of machine 0, which holds the rendezvous; HEAD:PORT for another port than 29400
# NODES  machines; RANKS of each; then the program. All machines see one file system, for checkpoints.
# NODE   0 on the head, another number elsewhere.  RESTARTS (3): how often a lost machine may come back.
# JOB    (shardgrad): a name, where several jobs share a head.  PYTHON (python).
# GLOO_SOCKET_IFNAME is set only where this host's name does not lead to the address that HEAD sees.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
head=$1 nodes=$2 ranks=$3; shift 3
: "${NODE:?say which machine this is: NODE=0 on the head}"
case $head in *:*) port=${head##*:} head=${head%:*} ;; *) port=29400 ;; esac
python=${PYTHON:-python}
# This machine's address on the way to the head: what the other machines can reach.
address=$("$python" -c '
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
print(s.getsockname()[0])' "$head")
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && ! getent ahostsv4 "$(hostname)" | grep -q "^$address "; then
  GLOO_SOCKET_IFNAME=$(ip -o -4 addr | awk -v a="$address" 'index($4, a "/") == 1 {print $2; exit}')
  export GLOO_SOCKET_IFNAME
fi
# With a shared store torchrun tells its address in the first round only (torch 2.13, dynamic_rendezvous.py): a machine
# that comes back would wait for it in vain.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# NCCL's kernels begin before products that wait with them for the GPU; no value changes. See docs/nccl.md.
export TORCH_NCCL_HIGH_PRIORITY=${TORCH_NCCL_HIGH_PRIORITY:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "${JOB:-shardgrad}" \
  --rdzv-conf "is_host=$([ "$NODE" = 0 ] && echo 1 || echo 0)" --local-addr "$address" "$@"
