#!/usr/bin/env bash
# The whole paper, stage by stage:
#
#     bash launch/recipe.sh tiny                      on a CPU, in minutes, on small self-made data
#     bash launch/recipe.sh solar_10_7b --dry-run     check and plan every stage; needs no GPU, model or data
#     bash launch/recipe.sh solar_10_7b               submit every stage to SLURM, each after those it needs
#     bash launch/recipe.sh tiny --only 5_merge_v1    one stage (--list: their names)
#
# A stage that has its product is skipped: products appear only when they are complete, and a training that was
# stopped goes on where it was. The list of stages is the table of contents; settings are in configs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ------------------------------------------------------------------------------------------------------ contents
#
#   stage NAME after STAGE... -- COMMAND...         COMMAND makes the stage's product in $runs/NAME
#
# In a COMMAND, `train` runs a verb on all ranks (a SLURM job over GPUs), `alone` in one process.

contents() {
    if [[ $recipe == tiny ]]; then
        # The other recipe takes its base from models/ and its data from data/.
        stage text -- make_text
        stage 0_base after text -- pretrain 0_base --model.path "$runs/model"
    fi

    # Section 2: depthwise scaling, continued pretraining.
    stage 1_upscale after 0_base -- alone convert "$base" "$runs/1_upscale" --layer-map "$layer_map"
    stage 2_pretrain after 1_upscale -- pretrain 2_pretrain --model.path "$runs/1_upscale" --model.layer_map identity

    # Section 3.2: OpenOrca without what the benchmarks ask; Synth. Math-Instruct and -Alignment.
    stage openorca after text -- clean_openorca
    stage synth_math after text -- synthesize_math

    # Table 3: instruction tuning on more and more data.
    stage 3_sft_v1 after 2_pretrain -- sft 3_sft_v1 alpaca
    stage 3_sft_v2 after 2_pretrain openorca -- sft 3_sft_v2 alpaca openorca
    stage 3_sft_v3 after 2_pretrain openorca synth_math -- sft 3_sft_v3 alpaca openorca math
    stage 3_sft_v4 after 2_pretrain synth_math -- sft 3_sft_v4 alpaca math
    stage 3_sft_v3+v4 after 3_sft_v3 3_sft_v4 -- average 3_sft_v3 3_sft_v4 0.5 0.5 3_sft_v3+v4

    # Tables 4 to 6: stepwise DPO, from either base.
    stage 4_sdpo_v1 after 3_sft_v3 -- sdpo 4_sdpo_v1 3_sft_v3 ultrafeedback
    stage 4_sdpo_v2 after 3_sft_v3 synth_math -- sdpo 4_sdpo_v2 3_sft_v3 ultrafeedback math
    stage 4_sdpo_v1+v2 after 4_sdpo_v1 4_sdpo_v2 -- average 4_sdpo_v1 4_sdpo_v2 0.5 0.5 4_sdpo_v1+v2
    stage 4_sdpo_v3 after 3_sft_v3+v4 synth_math -- sdpo 4_sdpo_v3 3_sft_v3+v4 ultrafeedback math
    stage 4_sdpo_cand1 after 3_sft_v3 synth_math -- sdpo 4_sdpo_cand1 3_sft_v3 ultrafeedback math
    stage 4_sdpo_cand2 after 3_sft_v3+v4 synth_math -- sdpo 4_sdpo_cand2 3_sft_v3+v4 ultrafeedback math

    # Table 7: merging. Merge v1 is SOLAR 10.7B-Instruct.
    stage 5_merge_v1 after 4_sdpo_cand1 4_sdpo_cand2 -- average 4_sdpo_cand1 4_sdpo_cand2 0.5 0.5 5_merge_v1
    stage 5_merge_v2 after 4_sdpo_cand1 4_sdpo_cand2 -- average 4_sdpo_cand1 4_sdpo_cand2 0.4 0.6 5_merge_v2
    stage 5_merge_v3 after 4_sdpo_cand1 4_sdpo_cand2 -- average 4_sdpo_cand1 4_sdpo_cand2 0.6 0.4 5_merge_v3
    stage 5_merge_v4 after 4_sdpo_cand1 4_sdpo_cand2 -- slerp 4_sdpo_cand1 4_sdpo_cand2 5_merge_v4

    # Appendix C; H6 of every model; the paper's tables with our numbers beside the published ones.
    stage 6_contamination after 5_merge_v1 text -- contamination 5_merge_v1
    stage 7_evaluate after "${models[@]}" -- evaluate "${models[@]}"
    stage tables after 7_evaluate -- alone tables --results "$runs/7_evaluate/results.json" --root "$runs" \
        --note "$note" --out "$runs/tables.md"
}

models=(0_base 1_upscale 2_pretrain 3_sft_v{1,2,3,4,3+v4} 4_sdpo_v{1,2,1+v2,3} 4_sdpo_cand{1,2} 5_merge_v{1,2,3,4})

# -------------------------------------------------------------------------------------------------------- stages

pretrain() {
    local name=$1 corpora=()
    shift
    [[ $recipe != tiny ]] || corpora=(--data.train "$runs/data/train" --data.valid "$runs/data/valid")
    train pretrain --config "$(config "$name")" --output.dir "$runs/$name" "${corpora[@]}" "$@"
}

sft() {
    local name=$1 sets=()
    shift
    if [[ $recipe == tiny ]]; then
        sets=(--data.valid "alpaca $lessons/alpaca_gpt4.json rows=340:" --data.train)
        [[ " $* " != *" alpaca "* ]] || sets+=("alpaca $lessons/alpaca_gpt4.json rows=0:340")
        [[ " $* " != *" openorca "* ]] || sets+=("openorca $runs/openorca/openorca.jsonl")
        [[ " $* " != *" math "* ]] || sets+=("plain $runs/synth_math/instruct.jsonl")
    fi
    train sft --config "$(config "$name")" --model.path "$(model 2_pretrain)" --output.dir "$runs/$name" "${sets[@]}"
}

sdpo() {
    local name=$1 start=$2 sets=()
    shift 2
    if [[ $recipe == tiny ]]; then
        sets=(--data.valid "orca_dpo_pairs $lessons/orca_dpo.jsonl rows=80:" --ladder.chunks)
        sets+=("orca_dpo_pairs $lessons/orca_dpo.jsonl rows=0:80")
        if [[ " $* " == *" math "* ]]; then
            sets+=("ultrafeedback_allenai $lessons/ultrafeedback.jsonl + plain $runs/synth_math/alignment.jsonl")
        else
            sets+=("ultrafeedback_allenai $lessons/ultrafeedback.jsonl")
        fi
    fi
    train dpo --config "$(config "$name")" --model.path "$(model "$start")" --output.dir "$runs/$name" "${sets[@]}"
}

average() {
    alone merge --method linear --models "$(model "$1")" "$(model "$2")" --weights "$3" "$4" --out "$runs/$5"
}

slerp() {
    alone merge --method slerp --t 0.5 --models "$(model "$1")" "$(model "$2")" --out "$runs/$3"
}

contamination() {
    local data=()
    [[ $recipe != tiny ]] || data=(--data "$runs/tasks")
    train contamination "$(model "$1")" --config "$(config 6_contamination)" --reference "$base" "${data[@]}" \
        --out "$runs/6_contamination.json"
}

evaluate() {
    local paths=() data=() name
    for name in "$@"; do paths+=("$(model "$name")"); done
    [[ $recipe != tiny ]] || data=(--data "$runs/tasks")
    train evaluate "${paths[@]}" --config "$(config 7_evaluate)" "${data[@]}" --out "$runs/7_evaluate"
}

make_text() {
    alone quickstart prepare --root "$runs"
    alone quickstart lessons --root "$runs"
    local part
    for part in train valid; do
        alone tokenize "$runs/text/$part.jsonl" --tokenizer "$runs/model" --output "$runs/data/$part" --overwrite
    done
}

clean_openorca() {
    if [[ $recipe == tiny ]]; then
        alone decontaminate "$lessons/openorca.jsonl" --against "$runs/tasks" --output "$runs/openorca"
    else
        alone decontaminate data/solar_10_7b/OpenOrca --against data/benchmarks --flan data/flan \
            --output data/solar_10_7b/openorca_clean
    fi
}

synthesize_math() {
    if [[ $recipe == tiny ]]; then
        alone synthesize "$lessons/math.jsonl" --backend replay --replay "$lessons/math_replay.jsonl" \
            --output "$runs/synth_math"
    else
        train synthesize data/solar_10_7b/MATH --backend vllm --model "$SYNTHESIS_MODEL" \
            --output data/solar_10_7b/synth_math
    fi
}

# -------------------------------------------------------------------------------------------------------- places

# model STAGE: the Hugging Face directory that a stage makes.
model() {
    case $1 in
        0_base) echo "$base" ;;
        2_pretrain | 3_sft_v[1-4] | 4_sdpo_v[1-3] | 4_sdpo_cand[12]) echo "$runs/$1/hf" ;;
        *) echo "$runs/$1" ;;
    esac
}

# product STAGE: what is there when the stage is complete, and not before.
product() {
    case $1 in
        text) echo "$runs/data/valid.idx" ;;
        openorca) [[ $recipe == tiny ]] && echo "$runs/openorca" || echo data/solar_10_7b/openorca_clean ;;
        synth_math) [[ $recipe == tiny ]] && echo "$runs/synth_math/report.json" || echo data/solar_10_7b/synth_math/report.json ;;
        6_contamination) echo "$runs/6_contamination.json" ;;
        7_evaluate) echo "$runs/7_evaluate/results.json" ;;
        tables) echo "$runs/tables.md" ;;
        *) model "$1" ;;
    esac
}

# config STAGE: its own in configs/<recipe>/ or configs/ablations/, or the one of its kind (3_sft, 4_sdpo).
config() {
    local kind=${1%_v[0-9]*} place
    for place in "configs/$recipe/$1" "configs/$recipe/${kind%_cand*}" "configs/ablations/$1"; do
        if [[ -f $place.toml ]]; then
            echo "$place.toml"
            return
        fi
    done
    echo "recipe.sh: no configuration for $1 in configs/$recipe or configs/ablations" >&2
    return 1
}

# -------------------------------------------------------------------------------------------------------- engine

# stage NAME [after STAGE...] -- COMMAND...
stage() {
    local name=$1 needs=()
    shift
    while [[ $1 != -- ]]; do
        [[ $1 == after ]] || needs+=("$1")
        shift
    done
    shift
    [[ -z $only || $only == "$name" ]] || return 0
    if [[ $mode == list ]]; then
        printf '%-16s after %s\n' "$name" "${needs[*]:-nothing}"
        return
    fi
    number=$((number + 1))
    if [[ $mode != plan && -e $(product "$name") ]]; then
        printf '[%s] %s: complete, %s\n' "$number" "$name" "$(product "$name")"
        return
    fi
    printf '\n[%s] %s\n' "$number" "$name"
    after=()
    local need
    for need in "${needs[@]}"; do
        [[ -z ${jobs[$need]:-} ]] || after+=("${jobs[$need]}")
    done
    current=$name
    local began=$SECONDS
    "$@"
    if [[ $mode == run ]]; then
        [[ -e $(product "$name") ]] || fail "$name ended without its product $(product "$name")"
        printf '[%s] %s: done in %s s\n' "$number" "$name" $((SECONDS - began))
    fi
}

# train VERB ...: on all ranks. alone VERB ...: in one process.
train() { start "${train_ranks:-}" "$@"; }
alone() { start "" "$@"; }

start() {
    local ranks=$1
    shift
    case $mode in
        run)
            if [[ -n $ranks ]]; then
                NPROC=$ranks LOGS="$runs/logs/$current" bash launch/torchrun/one_node.sh "$@"
            else
                python -m solar_mega "$@"
            fi
            ;;
        slurm)
            local size=() id
            [[ ${FUNCNAME[1]} == train ]] || size=(--nodes=1 --ntasks-per-node=1 --gres=none)
            ((${#after[@]} == 0)) || size+=("--dependency=afterok:$(IFS=:; echo "${after[*]}")")
            id=$(LOGS="$runs/logs" sbatch --parsable "--job-name=$current" "${size[@]}" launch/slurm/run.sbatch "$@")
            printf 'job %s: %s\n' "$id" "$*"
            after=("$id")
            jobs[$current]=$id
            ;;
        plan) plan "$@" ;;
    esac
}

# plan VERB ...: the command, and for a training what it takes, on the shape of the grown model.
plan() {
    printf 'solar-mega'
    printf ' %q' "$@"
    echo
    case $1 in
        pretrain | sft | dpo)
            shift
            python -m solar_mega plan --gpus "$gpus" "$@" --model.path "configs/$recipe/model" \
                --model.layer_map "$layer_map"
            ;;
    esac
}

fail() {
    echo "recipe.sh: $*" >&2
    exit 1
}

# ------------------------------------------------------------------------------------------------------ arguments

recipe=${1:-}
mode=run only="" number=0 current="" after=()
declare -A jobs=()
case $recipe in
    tiny)
        runs=${RUNS:-runs/tiny} base=${RUNS:-runs/tiny}/0_base/hf layer_map=dus:2 gpus=2
        note="ours: a model of 3 million parameters on self-made data; only the path is the same"
        ;;
    solar_10_7b)
        runs=${RUNS:-runs/solar_10_7b} base=models/Mistral-7B-v0.1 layer_map=dus:8 gpus=${GPUS:-64} mode=slurm
        note="ours: this recipe's models"
        ;;
    *)
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
lessons=$runs/lessons
shift
while (($#)); do
    case $1 in
        --dry-run) mode=plan ;;
        --list) mode=list ;;
        --here) mode=run train_ranks=${NPROC:-8} ;;
        --only) only=${2:?--only needs the name of a stage} && shift ;;
        *) fail "unknown argument $1; allowed: --dry-run, --list, --only STAGE, --here (without SLURM)" ;;
    esac
    shift
done

[[ $mode == list || -n ${VIRTUAL_ENV:-} ]] || source launch/env.sh
contents
