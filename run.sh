#!/usr/bin/env bash
# Every way to run mini_qwen. `bash run.sh help` lists them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'EOF'
bash run.sh demo                                   the whole road on mini_data: tokenizer, PT, SFT, DPO, eval
bash run.sh test [pytest arguments]                lint and tests; `test -m slow` runs the slow ones
bash run.sh tokenizer|pt|sft|dpo|eval [--key value ...]
                                                   one stage; without --config its full recipe in recipes/
bash run.sh all [--key value ...]                  pt, sft, dpo and eval, one after the other; the keys go to
                                                   the three training stages
bash run.sh serve CHECKPOINT [--key value ...]     an OpenAI-compatible API at 127.0.0.1, see docs/serving.md
bash run.sh web [CHECKPOINT|URL ...] [--key value ...]
                                                   a page to talk to models in, see docs/web.md; demo_results/dpo
                                                   when none is named and the demo has run
bash run.sh setup                                  only make .venv and install what is pinned

--background, behind a stage or `all`, leaves it running after you log out. Every stage logs to logs/.
Several GPUs: one process for each, by accelerate and DeepSpeed. One GPU or none: plain python.
CUDA_VISIBLE_DEVICES chooses among them.

Ctrl-C or `kill` ends a stage behind a checkpoint, with exit code 75; `--resume_from_checkpoint true` goes on.
It ends `serve` and `web` at once.
EOF
}

fail() {
    echo "run.sh: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

setup() {
    local wanted python
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python)
            [ -n "$python" ] || fail "Python 3.11 or newer is needed, and none was found. Install one, run this again."
            "$python" -m venv .venv || fail "could not make .venv. On Debian and Ubuntu install python3-venv."
        fi
        echo "installing the pinned packages into .venv (about two minutes the first time)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[test]" ||
            fail "the packages could not be installed, see above. Running this again continues."
        echo "$wanted" >.venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    [ "$(count_gpus)" -gt 0 ] || export DS_ACCELERATOR=cpu
}

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    else
        { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

forward_signals() { # command ...: run it so that a signal to this script reaches it; its exit code is this one's
    local child status signalled=true interrupted=false
    MINI_QWEN_LAUNCHER=$$ "$@" <&0 &
    child=$!
    trap 'signalled=true; kill -TERM $child 2>/dev/null' TERM HUP
    # A second Ctrl-C does not wait for the step border.
    trap 'signalled=true; if $interrupted; then kill -KILL $child; else kill -TERM $child; fi 2>/dev/null
        interrupted=true' INT
    while $signalled; do # a signal ends the wait, not the command
        signalled=false status=0
        wait $child || status=$?
    done
    trap - TERM INT HUP
    return $status
}

launch() { # stage, arguments of its script
    local stage=$1 num_gpus
    shift
    num_gpus=$(count_gpus)
    if [ "$num_gpus" -gt 1 ] && [[ "$stage" =~ ^(pt|sft|dpo)$ ]]; then
        # One process prepares the data while no other waits for it, then all open what it left in the cache.
        forward_signals python "mini_qwen_$stage.py" "$@" --prepare_only true || return $?
        forward_signals python -m mini_qwen.launch --num_processes "$num_gpus" "mini_qwen_$stage.py" "$@"
    else
        forward_signals python "mini_qwen_$stage.py" "$@"
    fi
}

demo() {
    local stage started=$SECONDS
    if [ "$(count_gpus)" -gt 1 ]; then # small enough for one
        CUDA_VISIBLE_DEVICES=$(cut -d, -f1 <<<"${CUDA_VISIBLE_DEVICES:-0}")
        export CUDA_VISIBLE_DEVICES
    fi
    rm -rf demo_results
    for stage in tokenizer pt sft dpo eval; do
        echo "== $stage"
        forward_signals python "mini_qwen_$stage.py" --config "recipes/demo/$stage.yaml"
    done
    printf '{"seconds": %d, "cores": %d}\n' $((SECONDS - started)) "$(python -c 'import os; print(os.cpu_count())')" \
        >demo_results/time.json
    echo "$((SECONDS - started)) seconds. The report is demo_results/report.html, or report.md."
    echo "Talk to your model: .venv/bin/python mini_qwen_eval.py --chat demo_results/dpo"
}

run_logged() { # name, command ...
    local log writer status=0
    log=logs/$1-$(date +%Y%m%d-%H%M%S).log
    shift
    echo "log: $log"
    # What writes the log goes on until the stage has said its last word, whatever signal ends it.
    exec 3> >(trap '' TERM INT HUP && exec tee "$log")
    writer=$!
    "$@" >&3 2>&1 || status=$?
    exec 3>&-
    wait $writer 2>/dev/null || true
    return $status
}

command=${1:-help}
[ $# -eq 0 ] || shift
arguments=()
background=false
for argument in "$@"; do
    if [ "$argument" = --background ]; then background=true; else arguments+=("$argument"); fi
done
set -- ${arguments[@]+"${arguments[@]}"}
if $background; then
    output=logs/$command-$(date +%Y%m%d-%H%M%S).out
    nohup bash run.sh "$command" "$@" >"$output" 2>&1 &
    echo "running in the background as process $!; output: $output"
    exit 0
fi

case $command in
demo)
    setup
    demo
    ;;
test)
    setup
    ruff check .
    ruff format --check .
    python -m pytest "$@"
    ;;
tokenizer | pt | sft | dpo | eval | serve | web)
    setup
    run_logged "$command" launch "$command" "$@"
    ;;
all)
    setup
    for stage in pt sft dpo; do run_logged "$stage" launch "$stage" "$@"; done
    run_logged eval launch eval
    ;;
setup) setup ;;
help | --help | -h) usage ;;
*)
    usage >&2
    fail "unknown command '$command'"
    ;;
esac
