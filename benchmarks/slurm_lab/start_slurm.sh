#!/usr/bin/env bash
# Start a real Slurm with two nodes and accounting on this machine, as root, with no systemd, cgroups or Docker.
#   start_slurm.sh DIR      then: . DIR/env.sh
# Every node is a network, PID, UTS and mount namespace of its own, with an address and a host name. Several may run at
# once: bridge, network and ports follow from a number that is free. DIR/login-only is seen by no node.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB=$(realpath -m "$1")
NODES=2 CPUS=2 MEM_MB=6000
retry() { local n=$1; shift; for _ in $(seq "$((n * 10))"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
    echo "gave up after ${n}s: $*" >&2; return 1; }

export PATH=$PATH:/usr/sbin:/sbin
getent passwd munge >/dev/null || useradd -r -s /usr/sbin/nologin munge
mkdir -p "$LAB"/{state,log,run,nodes,login-only}; chmod 755 "$LAB"

# --- a number that is free: the bridge is made with it, which one process alone can do ---
for ID in $(seq 10 99); do ip link add "pbkd$ID" type bridge 2>/dev/null && break; done
NET=10.77.$ID CTL=10.77.$ID.254 PORT=$((20000 + ID * 10)) HOST=$(hostname -s)
echo "$ID" >"$LAB/run/id"
ip addr add "$CTL/24" dev "pbkd$ID"; ip link set "pbkd$ID" up

# --- munge: own key and socket, so a system munged is left alone ---
install -d -o munge -g munge -m 755 "$LAB/munge"
head -c 1024 /dev/urandom >"$LAB/munge/munge.key"; chown munge: "$LAB/munge/munge.key"; chmod 400 "$LAB/munge/munge.key"
setpriv --reuid=munge --regid=munge --clear-groups munged --key-file="$LAB/munge/munge.key" \
    --socket="$LAB/munge/munge.sock" --log-file="$LAB/munge/munged.log" --pid-file="$LAB/munge/munged.pid" \
    --seed-file="$LAB/munge/seed" --force
retry 5 munge -S "$LAB/munge/munge.sock" -n
AUTHINFO="socket=$LAB/munge/munge.sock"

# --- accounting ---
install -d -o mysql -g mysql "$LAB/db"
mariadb-install-db --no-defaults --user=mysql --datadir="$LAB/db" --auth-root-authentication-method=normal \
    --skip-test-db >"$LAB/log/db-install.log" 2>&1
mariadbd --no-defaults --user=mysql --datadir="$LAB/db" --socket="$LAB/db/s.sock" --pid-file="$LAB/db/mariadbd.pid" \
    --bind-address=127.0.0.1 --port=$((PORT + 1)) --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
    --innodb-flush-log-at-trx-commit=0 --skip-log-bin >"$LAB/log/mariadbd.log" 2>&1 </dev/null &
SQL=(mariadb --no-defaults -uroot -S "$LAB/db/s.sock")
retry 30 "${SQL[@]}" -e 'select 1'
for at in 127.0.0.1 localhost; do
    "${SQL[@]}" -e "create user slurm@'$at' identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'$at';"
done
"${SQL[@]}" -e "create database slurm_acct_db"
cat >"$LAB/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=$AUTHINFO
DbdHost=$HOST
DbdAddr=$CTL
DbdPort=$((PORT + 2))
SlurmUser=root
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 1))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
chmod 600 "$LAB/slurmdbd.conf"

# --- slurm.conf. cred_expire is also how long a requeued job waits before it may start again (120 s elsewhere). A request
# to end a step is answered when it has ended, after KillWait at most; one not answered in MessageTimeout (10 s elsewhere)
# is sent again a minute later, and would end the same step of the job that was requeued meanwhile. ---
cat >"$LAB/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$HOST($CTL)
SlurmctldPort=$((PORT + 3))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=$AUTHINFO,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmdLogFile=$LAB/log/slurmd.%n.log
SlurmdSpoolDir=$LAB/nodes/%n/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=30
MessageTimeout=60
MinJobAge=300
CompleteWait=0
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$CTL
AccountingStoragePort=$((PORT + 2))
AccountingStoragePass=$LAB/munge/munge.sock
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
CONF
for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeAddr=$NET.$i Port=$((PORT + 4)) CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM_MB State=UNKNOWN"
done >>"$LAB/slurm.conf"
# Who submits to `urgent` takes the nodes of jobs in `main`, after 60 s for their state.
cat >>"$LAB/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=10 State=UP PriorityTier=10 PreemptMode=OFF
CONF
printf 'export SLURM_CONF=%q\nexport PATH=$PATH:/usr/sbin\n' "$LAB/slurm.conf" >"$LAB/env.sh"
export SLURM_CONF=$LAB/slurm.conf
# Debian 12's slurmd wants a cgroup plugin even where nothing uses it; v1 asks for no dbus or systemd
echo "CgroupPlugin=cgroup/v1" >"$LAB/cgroup.conf"
{ echo "127.0.0.1 localhost"; echo "$CTL $HOST"; for i in $(seq "$NODES"); do echo "$NET.$i n$i"; done; } >"$LAB/hosts"
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$LAB/nsswitch.conf"

# --- daemons ---
SLURM_CONF="$LAB/slurmdbd.conf" slurmdbd; retry 30 timeout 5 sacctmgr -n list cluster
sacctmgr -i -Q add cluster lab >/dev/null 2>&1 || true
slurmctld -f "$LAB/slurm.conf"; retry 30 timeout 5 scontrol ping
for i in $(seq "$NODES"); do "$HERE/start_node.sh" "$LAB" "$i"; done
ready() { [ "$(timeout 5 sinfo -h -p main -t idle -o %D)" = "$NODES" ]; }
retry 60 ready || { sinfo -N -l; tail -n 20 "$LAB"/log/*; exit 1; }
