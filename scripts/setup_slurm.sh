#!/usr/bin/env bash
# A Slurm of one node for tests: Debian's slurm-wlm and munge, with their own ports, key, socket and folder, so that
# nothing else on the machine is disturbed.
#   scripts/setup_slurm.sh install      the Debian packages (needs root or sudo once)
#   scripts/setup_slurm.sh start DIR    writes DIR/slurm.conf and starts munged, slurmctld and slurmd
#   scripts/setup_slurm.sh stop DIR     cancels all jobs and ends these three
# Then `export SLURM_CONF=DIR/slurm.conf`, and sinfo, sbatch, … speak to it. It has 8 CPUs whatever the machine has, and
# three partitions: low (default), which high preempts after a grace of 30 s, and abrupt, which high preempts without.
# PORT=N (default 26817) and N+1 are the daemons' ports. DIR must be short (a socket lies in it) and readable by all.
set -euo pipefail
action=${1:-} place=${2:-}

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || { echo "error: not Debian; install Slurm and munge yourself" >&2; exit 2; }
    if [ "$(id -u)" = 0 ]; then as_root=(); elif sudo -n true 2>/dev/null; then as_root=(sudo); else
        echo "error: run this once: sudo apt-get install -y --no-install-recommends slurm-wlm munge" >&2
        exit 2
    fi
    local log install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge)
    log=$(mktemp)
    # Not every package list is fresh.
    "${as_root[@]}" "${install[@]}" >"$log" 2>&1 || {
        "${as_root[@]}" apt-get update -qq >>"$log" 2>&1 && "${as_root[@]}" "${install[@]}" >>"$log" 2>&1
    } || {
        tail -n 3 "$log" >&2
        echo "error: slurm-wlm and munge cannot be installed (see above)" >&2
        exit 2
    }
    rm -f "$log"
}

configuration() {
    local host user port=${PORT:-26817}
    host=$(hostname -s) user=$(id -un)
    cat <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$place/munge/socket
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
# Neither cgroups nor task binding: they are not to be had in every container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=abrupt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
END
}

start() {
    mkdir -p "$place"/{munge,state,spool}
    place=$(cd "$place" && pwd)
    chmod 755 "$place" "$place/munge"
    [ -e "$place/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$place/munge/key")
    munged --key-file="$place/munge/key" --socket="$place/munge/socket" --pid-file="$place/munge/pid" \
        --seed-file="$place/munge/seed" --log-file="$place/munge/log"
    configuration >"$place/slurm.conf"
    export SLURM_CONF=$place/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 60); do
        sinfo -h -o %T 2>/dev/null | grep -q idle && return
        sleep 0.5
    done
    tail -n 5 "$place"/slurmctld.log "$place"/slurmd.log >&2
    echo "error: Slurm did not start in $place (see above)" >&2
    stop
    exit 2
}

stop() {
    local name pid
    export SLURM_CONF=$place/slurm.conf
    # Jobs first: their processes would outlive the daemons.
    if timeout 20 scancel --user="$(id -un)" 2>/dev/null; then
        for _ in $(seq 120); do
            [ -n "$(timeout 20 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.5
        done
    fi
    for name in slurmd.pid slurmctld.pid munge/pid; do
        [ -e "$place/$name" ] || continue
        pid=$(cat "$place/$name")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 40); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.25
        done
        kill -9 "$pid" 2>/dev/null || true
    done
}

case "$action:${place:+given}" in
install:*) install ;;
start:given) start ;;
stop:given) stop ;;
*)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
    ;;
esac
