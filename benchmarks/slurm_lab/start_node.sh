#!/usr/bin/env bash
# Start node I of the Slurm in DIR: a machine of its own, as far as namespaces go, with a slurmd.
#   start_node.sh DIR I          DIR/run/node.nI.pid: kill -9 this, and the whole node is gone
set -euo pipefail
LAB=$1 I=$2 N=n$2
ID=$(cat "$LAB/run/id"); NS=pbkd$ID-$N NET=10.77.$ID
export PATH=$PATH:/usr/sbin:/sbin
mkdir -p "$LAB/nodes/$N/spool" "$LAB/nodes/$N/empty"
if [ ! -e "/run/netns/$NS" ]; then
    ip netns add "$NS"; ip link add "$NS" type veth peer name eth0 netns "$NS"
    ip link set "$NS" master "pbkd$ID" up
    ip -n "$NS" addr add "$NET.$I/24" dev eth0; ip -n "$NS" link set eth0 up; ip -n "$NS" link set lo up
    ip -n "$NS" route add default via "$NET.254"
fi
read -r -d '' NODE <<'SCRIPT' || true
# PID 1 of the node: reaps what slurmd orphans, dies with it
LAB=$1 N=$2
hostname "$N"; mount --make-rprivate /
mount -t tmpfs -o size=2g shm /dev/shm
mount --bind "$LAB/hosts" /etc/hosts
# No name server is within a node's reach, and torch's rendezvous asks one: it would wait 20 s for the answer.
mount --bind "$LAB/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$LAB/nodes/$N/empty" "$LAB/login-only"
export SLURM_CONF=$LAB/slurm.conf
slurmd -D -f "$SLURM_CONF" -N "$N" </dev/null >"$LAB/log/slurmd.$N.out" 2>&1 &
while kill -0 $! 2>/dev/null; do wait $!; done
SCRIPT
# nsenter, not 'ip netns exec': that one remounts /sys without /sys/fs/cgroup, and slurmd then won't start
nsenter --net="/run/netns/$NS" unshare --uts --pid --mount --fork --mount-proc --kill-child \
    bash -c "$NODE" node "$LAB" "$N" </dev/null >"$LAB/log/node.$N.out" 2>&1 &
echo $! >"$LAB/run/node.$N.pid"
