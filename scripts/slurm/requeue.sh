# For the scripts beside it: run a command as the work of a Slurm job and put the job back into the queue when it was
# told to stop. `requeueing COMMAND …` passes SIGUSR1, SIGUSR2 and SIGTERM, which only this shell may get, on to the
# command. Exit code 75 (of train.py and evaluate.py: stopped by a signal, everything kept, run me again) puts the job
# back, MAX_REQUEUES times (default 100). So does any end after a signal but 0 and 2 (bad input): one that comes while
# Python starts or imports kills it or fails it in some other way.

child="" told=""

pass_on() {
    told=$1 interrupted=yes
    [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null
}

requeueing() {
    local code signal
    for signal in USR1 USR2 TERM; do
        # shellcheck disable=SC2064
        trap "pass_on $signal" "$signal"
    done
    "$@" &
    child=$!
    [ -z "$told" ] || kill -s "$told" "$child"
    while :; do
        interrupted=""
        wait "$child"
        code=$?
        [ -n "$interrupted" ] || break # else `wait` ended for the signal, not for the child
    done
    if [ "$code" = 75 ] || { [ -n "$told" ] && [ "$code" != 0 ] && [ "$code" != 2 ]; }; then
        put_back
        exit 75 # of no consequence for a job that was put back
    fi
    exit "$code"
}

put_back() {
    local times=${SLURM_RESTART_COUNT:-0} remedy="what was finished is kept; submit it again (train.sbatch: with resume=auto)"
    if ! command -v scontrol >/dev/null; then
        echo "error: scontrol is not on PATH, so job $SLURM_JOB_ID cannot put itself back into the queue; $remedy" >&2
    elif ! scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        # Cancelled, which must not bring it back, or preempted, and then Slurm puts it back.
        echo "job $SLURM_JOB_ID was told to stop because Slurm is ending it"
    elif [ "$times" -ge "${MAX_REQUEUES:-100}" ]; then
        echo "error: job $SLURM_JOB_ID was put back $times times, MAX_REQUEUES allows no more; $remedy" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID was told to stop and is put back into the queue, time $((times + 1))"
    else
        echo "error: scontrol could not put job $SLURM_JOB_ID back into the queue; $remedy" >&2
    fi
}
