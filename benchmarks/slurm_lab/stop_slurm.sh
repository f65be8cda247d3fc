#!/usr/bin/env bash
# Stop what start_slurm.sh started in DIR, each process by its own recorded PID.
#   stop_slurm.sh DIR
set -u
LAB=$(realpath -m "$1")
export PATH=$PATH:/usr/sbin:/sbin
alive() { local s; s=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) && [ "${s:0:1}" != Z ]; }
end() { # PIDFILE [SIGNAL]: end that process, by force after 5 s
    local p; p=$(cat "$1" 2>/dev/null) && [ -n "$p" ] || return 0
    kill "-${2:-TERM}" "$p" 2>/dev/null
    for _ in $(seq 50); do alive "$p" || break; sleep 0.1; done
    alive "$p" && kill -KILL "$p" 2>/dev/null
    rm -f "$1"
}
for f in "$LAB"/run/node.*.pid; do end "$f" KILL; done # --kill-child ends the whole PID namespace
for f in "$LAB"/run/slurmctld.pid "$LAB"/run/slurmdbd.pid "$LAB"/db/mariadbd.pid "$LAB"/munge/munged.pid; do end "$f"; done
if ID=$(cat "$LAB/run/id" 2>/dev/null); then
    for f in /run/netns/pbkd"$ID"-n*; do [ -e "$f" ] && ip netns del "${f##*/}"; done
    ip link del "pbkd$ID" 2>/dev/null
fi
exit 0
