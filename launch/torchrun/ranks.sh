# shellcheck shell=bash
# Sourced by one_node.sh and many_nodes.sh:  start_ranks TORCHRUN_ARGUMENTS... -- VERB ARGUMENTS...
#
# Starts the ranks and waits. torchrun knows two ends only, 0 and 1, and on a signal ends its ranks within seconds. So
# signals go to the ranks, past it, and the exit code is the one that rank 0 wrote down: 75 means stopped by a signal
# with everything saved, to be started again.

start_ranks() {
    local launcher=() code=0 written
    while [[ $1 != -- ]]; do
        launcher+=("$1")
        shift
    done
    shift
    LOGS="${LOGS:-logs/$(date -u +%Y%m%d-%H%M%S)-$1}"
    # shellcheck source=/dev/null
    source launch/cluster_env.sh
    export SOLAR_MEGA_EXIT_FILE="$LOGS/exit_code"
    rm -f "$SOLAR_MEGA_EXIT_FILE"

    # Ranks ignore USR1 until their run listens; by default it would end them while they start.
    (
        trap '' USR1
        exec torchrun "${launcher[@]}" --log-dir "$LOGS" --tee 3 --local-ranks-filter "${SHOW_RANKS:-0}" \
            -m solar_mega "$@"
    ) &
    agent=$!
    trap 'to_ranks USR1' USR1
    trap 'to_ranks TERM' TERM
    trap 'to_ranks TERM' INT
    while kill -0 "$agent" 2> /dev/null; do
        code=0
        wait "$agent" || code=$?
    done
    trap - USR1 TERM INT

    written=$(cat "$SOLAR_MEGA_EXIT_FILE" 2> /dev/null || true)
    if ((code != 0)) && [[ "$written" =~ ^[0-9]+$ ]] && ((written != 0)); then code=$written; fi
    if ((code == 75)); then echo "stopped by a signal, everything saved: start the same command again to go on"; fi
    return "$code"
}

# to_ranks SIGNAL: to the ranks of this node. Every rank follows when one has it.
to_ranks() {
    local child
    for child in $(ps -o pid= --ppid "$agent"); do
        if grep -qz solar_mega "/proc/$child/cmdline" 2> /dev/null; then kill "-$1" "$child" 2> /dev/null || true; fi
    done
}
