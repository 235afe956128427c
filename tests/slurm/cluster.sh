#!/usr/bin/env bash
# A real SLURM of one node for the tests, without systemd, cgroups or accounting, on the loopback.
#
#   cluster.sh up DIR      prints the SLURM_CONF to use; everything lies under DIR
#   cluster.sh down DIR    ends what `up` started, and only that
#
# Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Processors and GPUs are declared
# (config_overrides), not there: SLURM_CPUS (8), SLURM_GPUS (4). SLURM_PORT (16817) and the next one.
set -euo pipefail

command=${1:?up or down}
dir=$(realpath -m "${2:?a directory}")
export SLURM_CONF=$dir/etc/slurm.conf
host=$(hostname -s)

wait_for() { # seconds, command...
  local tries=$(($1 * 10))
  shift
  while ! "$@" >/dev/null 2>&1; do
    [ $((tries -= 1)) -gt 0 ] || return 1
    sleep 0.1
  done
}

configure() {
  local cpus=${SLURM_CPUS:-8} gpus=${SLURM_GPUS:-4} port=${SLURM_PORT:-16817}
  mkdir -p "$dir"/{etc,state,spool,log}
  cat >"$SLURM_CONF" <<CONF
ClusterName=fisher_lab_tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for the credential of its first start to expire.
AuthInfo=cred_expire=10,socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
KillWait=5
# A busy machine: starting a job and answering may take a while; and tests ask for jobs of long ago.
BatchStartTimeout=60
MessageTimeout=60
MinJobAge=3600
MaxArraySize=${SLURM_MAX_ARRAY:-1001}
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=16000 Gres=gpu:$gpus State=UNKNOWN
PartitionName=debug Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  # A character device a GPU, another /dev/null each: with a mere count the node stays invalid.
  : >"$dir/etc/gres.conf"
  for i in $(seq 0 $((gpus - 1))); do
    [ -e "$dir/gpu$i" ] || mknod -m 666 "$dir/gpu$i" c 1 3
    echo "Name=gpu File=$dir/gpu$i" >>"$dir/etc/gres.conf"
  done
}

up() {
  configure
  # A munge of our own, with a key and a socket of its own.
  (umask 077; [ -s "$dir/munge.key" ] || head -c 1024 /dev/urandom >"$dir/munge.key")
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
  slurmctld -c -f "$SLURM_CONF"
  slurmd -N "$host" -f "$SLURM_CONF"
  # The node is known as idle before it can run anything; a job tells.
  if ! wait_for 60 bash -c '[ "$(sinfo -h -o %T)" = idle ]'; then
    sinfo -R >&2
    tail -n 20 "$dir"/log/*.log >&2
    return 1
  fi
  echo "$SLURM_CONF"
}

end() { # pid file
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "$pid" 2>/dev/null || true
  wait_for 15 bash -c "! kill -0 $pid" || kill -9 "$pid" 2>/dev/null || true
  rm -f "$1"
}

down() {
  if [ -f "$SLURM_CONF" ] && timeout 10 scontrol ping 2>/dev/null | grep -q UP; then
    # First the jobs, so that no step is left behind.
    timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel --full 2>/dev/null || true
    wait_for 15 bash -c '[ -z "$(squeue -h -t R,CG,PD)" ]' || true
  fi
  end "$dir/slurmd.pid"
  end "$dir/slurmctld.pid"
  end "$dir/munged.pid"
}

case $command in
up) up ;;
down) down ;;
*) echo "cluster.sh: up or down, not $command" >&2; exit 2 ;;
esac
