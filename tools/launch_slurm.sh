#!/usr/bin/env bash
# Train on nodes of 8 MI300X under Slurm, one torchrun a node. Submit from the repository's root, on a file system all nodes share:
#
#     sbatch --nodes=16 tools/launch_slurm.sh recipes/zaya1_8b_pretrain1.toml [--section.key=value ...]
#
# The nodes meet at the first one (static rendezvous: rank order is Slurm's order of nodes, which follows its topology). Above each torchrun
# a supervisor starts it again when it fails, from the newest checkpoint, as long as that makes sense. Each node's output is
# LOGS/attempt-K/node-N.log; the exit code is the highest of the nodes', and a node that gives up ends the others. Two minutes before the
# time limit, or at preemption where Slurm sends the signal then (SlurmctldParameters=preempt_send_user_signal), every worker gets SIGTERM
# and the job is queued again; it goes on from its newest checkpoint (checkpoint.resume = "auto"). scancel ends it for good.
#
# Environment, all optional:
#   ZAYA_IMAGE         run in this image (docker build -t zaya .) instead of .venv, by $ZAYA_CONTAINER (docker; or podman)
#   ZAYA_LOGS          where logs go (runs/slurm-JOB)
#   ZAYA_MAX_REQUEUES  give up after so many (100)
#   ZAYA_SPARE_NODES   of the job's nodes so many wait (0): one takes the place of a node that is found unfit (exit code 4), and the run
#                      goes on from its newest checkpoint
#   NCCL_IB_HCA, NCCL_IB_GID_INDEX, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME ...: what your network needs; see docs/several_nodes.md
#
#SBATCH --job-name=zaya
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@120

set -euo pipefail

usage='sbatch --nodes=N tools/launch_slurm.sh RECIPE.toml [--section.key=value ...]'
say() { printf 'launch_slurm: %s\n' "$*" >&2; }

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    echo "usage: $usage"
    echo
    sed -n '2,/^#SBATCH/ { /^#SBATCH/d; s/^# \{0,1\}//p }' "$0" # the comment above
    exit 0
fi
if [[ $# -eq 0 || $1 == -* || -z ${SLURM_JOB_ID:-} || -z ${SLURM_JOB_NODELIST:-} ]]; then
    say "submit with sbatch and name a recipe: $usage"
    exit 2
fi

spares=${ZAYA_SPARE_NODES:-0}
if [[ ! $spares =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((spares >= SLURM_JOB_NUM_NODES)); then
    say "ZAYA_SPARE_NODES=$spares is not a number below the job's $SLURM_JOB_NUM_NODES nodes"
    exit 2
fi
nodes=$((SLURM_JOB_NUM_NODES - spares))
restarts=${SLURM_RESTART_COUNT:-0}
folder=${ZAYA_LOGS:-runs/slurm-$SLURM_JOB_ID}/attempt-$restarts
port=$((20000 + SLURM_JOB_ID % 10000)) # below 32768, where the kernel picks ports for others
mapfile -t fit < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # in Slurm's order, in which it numbers the tasks of a step, too
if ((${#fit[@]} < SLURM_JOB_NUM_NODES)); then
    say "scontrol names ${#fit[@]} of the job's $SLURM_JOB_NUM_NODES nodes"
    exit 1
fi

command=()
if [[ -n ${ZAYA_IMAGE:-} ]]; then
    # Host network and IPC, GPUs and RDMA devices, pinned memory without limit; the user's own files, the code of this directory.
    command=("${ZAYA_CONTAINER:-docker}" run --rm --network=host --ipc=host --ulimit memlock=-1 --security-opt seccomp=unconfined
        --device=/dev/kfd --device=/dev/dri --group-add "$(stat -c %g /dev/kfd)" --group-add video
        --user "$(id -u):$(id -g)" --env HOME=/tmp --volume "$PWD:$PWD" --workdir "$PWD")
    [[ -e /dev/infiniband ]] && command+=(--device=/dev/infiniband)
    while read -r name; do
        command+=(--env "$name")
    done < <(compgen -e | grep -E '^(ZAYA|NCCL|RCCL|GLOO|TORCH|PYTORCH|HSA|HIP|ROCR|GPU|TRITON|OMP|HF)_' || true)
    command+=("$ZAYA_IMAGE" /zaya/.venv/bin/python -m zaya.resilience.supervisor --report NODE_REPORT -- /zaya/.venv/bin/torchrun)
elif [[ -x .venv/bin/torchrun ]]; then
    command=("$PWD/.venv/bin/python" -m zaya.resilience.supervisor --report NODE_REPORT -- "$PWD/.venv/bin/torchrun")
else
    command=(python3 -m zaya.resilience.supervisor --report NODE_REPORT -- torchrun)
fi
step='' code=0 wants_requeue=0 was_signalled=0 is_over=0
# shellcheck disable=SC2329  # the traps call it
stop() {
    was_signalled=1 is_over=1
    [[ -z $step ]] || kill -TERM "$step" 2>/dev/null || true # srun passes it to each torchrun, that to its workers
}
trap 'wants_requeue=1; stop' USR1
trap 'stop' TERM

# Run the job on the first `nodes` of the fit ones, a task each; its exit code is `code`, and `logs` has what each node said and why it ended.
run() {
    mkdir -p "$logs"
    rm -f "$logs"/node-*.json # of another job with these ZAYA_LOGS
    # The words NODE_RANK and NODE_REPORT become each task's own. All CPUs for the one task and no binding: zaya.runtime binds each worker
    # beside its GPU.
    # shellcheck disable=SC2016  # $SLURM_PROCID is the task's, not ours
    srun --nodes="$nodes" --ntasks="$nodes" --nodelist="$(IFS=,; echo "${fit[*]:0:nodes}")" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none --kill-on-bad-exit=1 --output="$logs/node-%t.log" --open-mode=append \
        bash -c 'report=$1/node-$SLURM_PROCID.json; shift; set -- "${@/#NODE_RANK/$SLURM_PROCID}"; exec "${@/#NODE_REPORT/$report}"' \
        node "$logs" "${command[@]}" --nnodes "$nodes" --node-rank NODE_RANK --nproc-per-node 8 --master-addr "${fit[0]}" --master-port "$port" \
        -m zaya.train "$@" &
    step=$!
    ((was_signalled == 0)) || kill -TERM "$step"
    while true; do # a signal ends `wait` before the step ends: wait again
        was_signalled=0
        if wait "$step"; then code=0; else code=$?; fi
        ((was_signalled)) || break
    done
    step=''
}

# Take the nodes out of `fit` whose supervisors have ended with 4. Fails if there are none.
leave_out_unfit() {
    local rank cause status=1
    for ((rank = 0; rank < nodes; rank++)); do
        if grep -q '"code": 4,' "$logs/node-$rank.json" 2>/dev/null; then
            cause=$(sed -n 's/.*"cause": //; s/}$//p' "$logs/node-$rank.json")
            say "${fit[rank]} is unfit and left out: $cause"
            unset "fit[rank]"
            status=0
        fi
    done
    fit=("${fit[@]}")
    return "$status"
}

logs=$folder replaced=0
say "job $SLURM_JOB_ID, attempt $restarts: $nodes nodes of 8 GPUs, first ${fit[0]}:$port; follow with: tail -f $logs/node-0.log"
run "$@"
while ((code != 0 && is_over == 0)) && leave_out_unfit; do
    if ((${#fit[@]} < nodes)); then
        code=4
        say "${#fit[@]} fit nodes are left, $nodes are needed: see ZAYA_SPARE_NODES"
        break
    fi
    replaced=$((replaced + 1)) port=$((port + 1)) logs=$folder/replaced-$replaced
    say "going on with ${fit[*]:0:nodes}; follow with: tail -f $logs/node-0.log"
    run "$@"
done

if ((code == 0)); then
    say "done"
elif ((wants_requeue && restarts < ${ZAYA_MAX_REQUEUES:-100})); then
    say "stopped by Slurm (exit code $code); queued again"
    scontrol requeue "$SLURM_JOB_ID"
elif ((wants_requeue)); then
    say "stopped by Slurm (exit code $code) after $restarts restarts; not queued again: see ZAYA_MAX_REQUEUES"
else
    say "failed with exit code $code; the nodes' logs are $logs/node-*.log; what each said last:"
    for node in "$logs"/node-*.log; do
        { grep -n -H -E '^(\[[a-z]*[0-9]+\]: ?)?zaya\.(train|resilience\.supervisor): ' "$node" || grep -n -H Traceback "$node"; } | tail -n 2 >&2 ||
            say "nothing: see the last lines of $node"
    done
fi
exit "$code"
