#!/usr/bin/env bash
# A Slurm cluster of virtual nodes, as the first process of namespaces of its own (cluster.py makes them): when it ends the kernel ends
# every daemon and task and removes every network and mount, so that nothing can stay behind.
#   cluster.sh DIRECTORY NODES
# Writes DIRECTORY/ready once the nodes are idle. Each node has its own host name, processes and network (no uplink, and another loopback),
# so that a rendezvous at 127.0.0.1 fails here as it does on a cluster, and DIRECTORY/disk for itself; all else is shared.
# `kill -KILL $(cat DIRECTORY/NODE.pid)` ends a node.
set -euo pipefail
directory=$1 count=$2
mkdir -p "$directory"/{state,spool,log,disk}

# the controller's side of the network, and one cable a node
mount -t tmpfs tmpfs /run # for ip netns, whose names would be the whole machine's
hostname controller
ip link set lo up
ip link add br0 type bridge
ip addr add 10.213.0.1/24 dev br0
ip link set br0 up
printf '127.0.0.1 localhost\n10.213.0.1 controller\n' >"$directory/hosts"
for ((node = 1; node <= count; node++)); do
    echo "10.213.0.$((10 + node)) node$node" >>"$directory/hosts"
    ip netns add "node$node"
    ip link add "v$node" type veth peer name eth0 netns "node$node"
    ip link set "v$node" master br0 up
    ip -n "node$node" link set lo up
    ip -n "node$node" addr add "10.213.0.$((10 + node))/24" dev eth0
    ip -n "node$node" link set eth0 up
done
mount --bind "$directory/hosts" /etc/hosts

# no cgroups, no accounting; a dead node is noticed, and a requeued job starts again, within seconds
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$directory/cgroup.conf" # read although no cgroup plugin is named
cat >"$directory/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=controller(10.213.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=5
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.%n.pid
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
MinJobAge=600
JobRequeue=1
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=15
MessageTimeout=20
TCPTimeout=5
SlurmdTimeout=20
InactiveLimit=0
CONF
for ((node = 1; node <= count; node++)); do
    echo "NodeName=node$node NodeAddr=10.213.0.$((10 + node)) CPUs=4 RealMemory=64000 State=UNKNOWN" # more than there is: nobody checks
done >>"$directory/slurm.conf"
cat >>"$directory/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
CONF
export SLURM_CONF=$directory/slurm.conf

(umask 077 && head -c 1024 /dev/urandom >"$directory/munge.key")
munged --foreground --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" --pid-file="$directory/munge.pid" \
    --seed-file="$directory/munge.seed" --log-file="$directory/log/munged.log" --num-threads=2 &
until munge --no-input --socket="$directory/munge.socket" >/dev/null 2>&1; do sleep 0.05; done
slurmctld -D -c &
for ((node = 1; node <= count; node++)); do
    mkdir -p "$directory/spool/node$node"
    # the shell is the node's first process: it reaps what others leave, and takes the node with it
    # shellcheck disable=SC2016 # expanded there
    boot='hostname "$1" && mount -t tmpfs tmpfs "$2" && { slurmd -D -N "$1" & while kill -0 $! 2>/dev/null; do wait; done; }'
    ip netns exec "node$node" unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc \
        bash -c "$boot" node "node$node" "$directory/disk" &
    echo $! >"$directory/node$node.pid"
done
until [[ $(sinfo --noheader --Node --partition=main --format=%t 2>/dev/null | grep -c idle) -eq $count ]]; do sleep 0.1; done
touch "$directory/ready"
while :; do
    sleep infinity &
    wait $!
done
