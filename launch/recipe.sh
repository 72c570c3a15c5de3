#!/usr/bin/env bash
# The paper from the base model to the tables, one line per stage.
#
#     bash launch/recipe.sh tiny                    all of it on a laptop's CPU, in some minutes
#     bash launch/recipe.sh tiny --dry-run          check and plan every stage, run none
#     bash launch/recipe.sh solar_10_7b --dry-run   the same for the 10.7B model: needs no GPU, weights or data
#     bash launch/recipe.sh solar_10_7b             on this machine's GPUs
#     bash launch/recipe.sh solar_10_7b --slurm     as SLURM jobs, each after the one before
#     bash launch/recipe.sh tiny --from 3_sft       begin there (--only 3_sft: that one alone)
#
# A stage is a configuration, configs/NAME/STAGE.toml. One whose output is there and complete is skipped, so the
# same command goes on after an interruption (exit code 75: saved and stopped by a signal).
#
#     GPUS=64    size of the cluster, of --slurm and --dry-run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Both recipes go the paper's way: depthwise scaling and continued pretraining (section 2), Synth. Math and what
# overlaps the benchmarks (section 3.2), tables 3 to 7, appendix C, and H6 of every model.
#
#     leaves         configuration  ranks  verb           starts from            more flags
recipe_tiny() {
    map=dus:2
    local l=runs/tiny/lessons
    local alpaca="alpaca $l/alpaca_gpt4.json rows=0:340" openorca="openorca runs/tiny/openorca/openorca.jsonl"
    local math="plain runs/tiny/synth_math/instruct.jsonl" math_pairs="plain runs/tiny/synth_math/alignment.jsonl"
    local orca_dpo="orca_dpo_pairs $l/orca_dpo.jsonl" ultra="ultrafeedback_allenai $l/ultrafeedback.jsonl rows=0:180"
    local sft=(--data.valid "alpaca $l/alpaca_gpt4.json rows=340:" --train.log_interval 50 --train.threads 1 --data.train)
    local sdpo=(--data.valid "ultrafeedback_allenai $l/ultrafeedback.jsonl rows=180:" --train.log_interval 50 --train.threads 1 --ladder.chunks)

    text
    lessons
    stage 0_base         0_base           2  pretrain       runs/quickstart/model
    stage 1_upscale      1_upscale        1  convert        0_base/hf
    stage 2_pretrain     2_pretrain       2  pretrain       1_upscale              --model.layer_map identity
    stage openorca       -                1  decontaminate  $l/openorca.jsonl      --against runs/tiny/tasks
    stage synth_math     -                1  synthesize     $l/math.jsonl          --backend replay --replay $l/math_replay.jsonl

    stage 3_sft_v1       3_sft            1  sft            2_pretrain/hf          "${sft[@]}" "$alpaca"
    stage 3_sft_v2       3_sft            1  sft            2_pretrain/hf          "${sft[@]}" "$alpaca" "$openorca"
    stage 3_sft_v3       3_sft            1  sft            2_pretrain/hf          "${sft[@]}" "$alpaca" "$openorca" "$math"
    stage 3_sft_v4       3_sft            1  sft            2_pretrain/hf          "${sft[@]}" "$alpaca" "$math"
    stage 3_sft_v3+v4    -                1  merge          "3_sft_v3/hf 3_sft_v4/hf"          --method linear

    stage 4_sdpo_v1      4_sdpo           1  dpo            3_sft_v3/hf            "${sdpo[@]}" "$orca_dpo" "$ultra"
    stage 4_sdpo_v2      4_sdpo           1  dpo            3_sft_v3/hf            "${sdpo[@]}" "$orca_dpo" "$ultra + $math_pairs"
    stage 4_sdpo_v1+v2   -                1  merge          "4_sdpo_v1/hf 4_sdpo_v2/hf"        --method linear
    stage 4_sdpo_v3      4_sdpo           1  dpo            3_sft_v3+v4            "${sdpo[@]}" "$orca_dpo" "$ultra + $math_pairs"
    stage 4_sdpo_cand1   4_sdpo           1  dpo            3_sft_v3/hf            --loss.beta 0.2 "${sdpo[@]}" "$orca_dpo" "$ultra + $math_pairs"
    stage 4_sdpo_cand2   4_sdpo           1  dpo            3_sft_v3+v4            --optimizer.lr 2e-4 "${sdpo[@]}" "$orca_dpo" "$ultra + $math_pairs"
    merges

    stage 6_contamination 6_contamination 1  contamination  5_merge_v1             --reference runs/tiny/0_base/hf
    stage 7_evaluate     7_evaluate       2  evaluate       "0_base/hf 1_upscale 2_pretrain/hf $tuned"
    stage tables         -                1  tables         7_evaluate             \
        --note "ours: models of 3M parameters on self-made data; only the way is the same"
}

recipe_solar_10_7b() {
    map=dus:8
    stage 1_upscale      1_upscale        1  convert        models/Mistral-7B-v0.1
    stage 2_pretrain     2_pretrain     all  pretrain       1_upscale

    stage 3_sft_v1       3_sft_v1         8  sft            2_pretrain/hf
    stage 3_sft_v2       3_sft_v2         8  sft            2_pretrain/hf
    stage 3_sft_v3       3_sft_v3         8  sft            2_pretrain/hf
    stage 3_sft_v4       3_sft_v4         8  sft            2_pretrain/hf
    stage 3_sft_v3+v4    -                1  merge          "3_sft_v3/hf 3_sft_v4/hf"          --method linear

    stage 4_sdpo_v1      4_sdpo_v1        8  dpo            3_sft_v3/hf
    stage 4_sdpo_v2      4_sdpo_v2        8  dpo            3_sft_v3/hf
    stage 4_sdpo_v1+v2   -                1  merge          "4_sdpo_v1/hf 4_sdpo_v2/hf"        --method linear
    stage 4_sdpo_v3      4_sdpo_v3        8  dpo            3_sft_v3+v4
    stage 4_sdpo_cand1   4_sdpo_cand1     8  dpo            3_sft_v3/hf
    stage 4_sdpo_cand2   4_sdpo_cand2     8  dpo            3_sft_v3+v4
    merges

    stage 6_contamination 6_contamination 8  contamination  5_merge_v1
    stage 7_evaluate     7_evaluate       8  evaluate       "models/Mistral-7B-v0.1 1_upscale 2_pretrain/hf $tuned"
    stage tables         -                1  tables         7_evaluate             --note "ours: this recipe's models"
}

# Table 7; Merge v1 is SOLAR 10.7B-Instruct.
merges() {
    local candidates="4_sdpo_cand1/hf 4_sdpo_cand2/hf"
    stage 5_merge_v1     -                1  merge          "$candidates"          --method linear --weights 0.5 0.5
    stage 5_merge_v2     -                1  merge          "$candidates"          --method linear --weights 0.4 0.6
    stage 5_merge_v3     -                1  merge          "$candidates"          --method linear --weights 0.6 0.4
    stage 5_merge_v4     -                1  merge          "$candidates"          --method slerp --t 0.5
}

tuned="3_sft_v1/hf 3_sft_v2/hf 3_sft_v3/hf 3_sft_v4/hf 3_sft_v3+v4 4_sdpo_v1/hf 4_sdpo_v2/hf 4_sdpo_v1+v2 4_sdpo_v3/hf"
tuned+=" 4_sdpo_cand1/hf 4_sdpo_cand2/hf 5_merge_v1 5_merge_v2 5_merge_v3 5_merge_v4"

# ------------------------------------------------------------------------------------------------ stages

# stage NAME CONFIGURATION RANKS VERB FROM FLAGS...: leaves runs/RECIPE/NAME. CONFIGURATION "-": flags alone.
# FROM: one directory or several, in runs/RECIPE unless they have a place of their own.
stage() {
    local name=$1 config=configs/$recipe/$2.toml ranks=$3 verb=$4 words=() sources=() leaves=runs/$recipe/$1 place
    chosen "$name" || return 0
    for place in $5; do
        case $place in
            runs/* | models/*) sources+=("$place") ;;
            *) sources+=("runs/$recipe/$place") ;;
        esac
    done
    if [[ $2 != - ]]; then words=(--config "$config"); fi
    shift 5
    case $verb in
        convert) words+=("${sources[0]}" "$leaves" "$@") ;;
        pretrain | sft | dpo)
            words+=(--model.path "${sources[0]}" --output.dir "$leaves" "$@")
            leaves=$leaves/hf
            ;;
        merge) words+=(--models "${sources[@]}" --out "$leaves" "$@") ;;
        contamination)
            words=("${sources[0]}" "${words[@]}" --out "$leaves.json" "$@")
            leaves=$leaves.json
            ;;
        evaluate)
            words=("${sources[@]}" "${words[@]}" --out "$leaves" "$@")
            leaves=$leaves/results.json
            ;;
        tables)
            leaves=runs/$recipe/tables.md
            words=(--results "${sources[0]}/results.json" --root "runs/$recipe" --out "$leaves" "$@")
            ;;
        decontaminate) words=("${sources[0]}" --output "$leaves" "$@") ;;
        synthesize)
            words=("${sources[0]}" --output "$leaves" "$@")
            leaves=$leaves/report.json
            ;;
    esac
    printf '\n== %s: %s -> %s\n' "$name" "$verb ${sources[*]}" "$leaves"
    if [[ $mode == dry-run ]]; then
        dry_run "$verb" "$ranks" "$config" "${sources[0]}" "${words[@]}"
    elif complete "$leaves"; then
        echo "complete: $leaves"
    elif [[ $mode == slurm ]]; then
        submit "$name" "$ranks" "$config" "$verb" "${words[@]}"
    else
        run "$ranks" "$config" "$verb" "${words[@]}"
        complete "$leaves" ||
            fail "$name ended well, but $leaves is not complete: solar-mega inspect $leaves"
        if [[ $verb == convert ]]; then solar-mega verify "${sources[0]}" "$leaves" --layer-map "$map"; fi
    fi
}

chosen() {
    if [[ -n "$only" ]]; then
        [[ $1 == "$only" ]] || return 1
    elif [[ -n "$from" ]]; then
        [[ $1 == "$from" ]] || return 1
        from=""
    fi
    known=1
}

# complete PLACE: headers, sizes and lineage of a model are as they should be; a file is there, and data with its report.
complete() { [[ -f "$1" || -f "$1/report.json" ]] || { [[ -d "$1" ]] && solar-mega inspect "$1" > /dev/null 2>&1; }; }

# run RANKS CONFIGURATION VERB WORDS...
run() {
    local ranks=$1 config=$2 code=0
    shift 2
    if [[ $ranks == 1 ]]; then
        solar-mega "$@" || code=$?
    elif [[ $ranks == all ]]; then
        # shellcheck disable=SC2046 # several words
        bash launch/torchrun/one_node.sh "$@" $(cluster_flags "$config" "$(nvidia-smi -L | wc -l)") || code=$?
    else
        NPROC=$ranks bash launch/torchrun/one_node.sh "$@" || code=$?
    fi
    if ((code == 75)); then
        echo "stopped by a signal, everything saved: start the same command again"
        exit 75
    fi
    ((code == 0)) || fail "$* ended with $code" "$code"
}

# submit NAME RANKS CONFIGURATION VERB WORDS...: a job that waits for the last one.
submit() {
    local name=$1 ranks=$2 config=$3 size
    shift 3
    case $ranks in
        1) size=(--nodes=1 --ntasks-per-node=1 --gres=none) ;;
        all) size=(--nodes=$(((GPUS + 7) / 8)) --ntasks-per-node=$((GPUS < 8 ? GPUS : 8))) ;;
        *) size=(--nodes=1 "--ntasks-per-node=$ranks" "--gres=gpu:$ranks") ;;
    esac
    if [[ $recipe == tiny ]]; then size=(--nodes=1 "--ntasks-per-node=$ranks" --cpus-per-task=1 --gres=none); fi
    if [[ $ranks == all ]]; then
        # shellcheck disable=SC2046 # several words
        set -- "$@" $(cluster_flags "$config" "$GPUS")
    fi
    # shellcheck disable=SC2086 # SBATCH_FLAGS is several words
    last=$(sbatch --parsable --job-name="$recipe-$name" ${last:+--dependency=afterok:$last --kill-on-invalid-dep=yes} \
        "${size[@]}" ${SBATCH_FLAGS:-} launch/slurm/run.sbatch "$@")
    last=${last%%;*}
    echo "job $last"
}

# cluster_flags FILE N: what the file's comment says for N GPUs ("#     256 GPUs: --parallel.vpp 12").
cluster_flags() { sed -n "s/^# *$2 GPUs: *\(--.*\)/\1/p" "$1"; }

# dry_run VERB RANKS CONFIGURATION SOURCE WORDS...: read, plan, and where its source exists the verb's own dry run.
dry_run() {
    local verb=$1 ranks=$2 config=$3 source=$4 more=()
    shift 4
    case $verb in
        pretrain | sft | dpo)
            if [[ ! -e $source ]]; then
                echo "($source is not there yet: planned in the shape it will have)"
                more=(--model.path "configs/$recipe/model")
                if [[ $config != */0_* ]]; then more+=(--model.layer_map "$map"); fi
            fi
            if [[ $ranks == all ]]; then
                # shellcheck disable=SC2207 # several words
                more+=(--gpus "$GPUS" $(cluster_flags "$config" "$GPUS"))
            else
                more+=(--gpus "$ranks")
            fi
            solar-mega plan "$@" "${more[@]}"
            if [[ -e $source ]]; then solar-mega "$verb" "$@" --dry-run; fi
            ;;
        *)
            if [[ -f $config ]]; then solar-mega plan --config "$config"; fi
            echo "solar-mega $verb $*"
            ;;
    esac
}

fail() {
    echo "recipe: $1" >&2
    exit "${2:-1}"
}

# ------------------------------------------------------------------------------------------------ tiny's data

text() {
    local runs=runs/quickstart
    chosen text || return 0
    printf '\n== text: the standard library of Python, and a tokenizer -> %s\n' "$runs/data"
    if [[ $mode == dry-run ]]; then return; fi
    if [[ -f $runs/data/valid.idx && -f $runs/model/config.json ]]; then
        echo "complete: $runs/data"
        return
    fi
    solar-mega quickstart prepare --root "$runs"
    local name
    for name in train valid; do
        solar-mega tokenize "$runs/text/$name.jsonl" --tokenizer "$runs/model" --output "$runs/data/$name" --overwrite
    done
}

lessons() {
    chosen lessons || return 0
    printf '\n== lessons: the data sets of Table 1 and the benchmarks, small and self-made -> runs/tiny\n'
    if [[ $mode == dry-run ]]; then return; fi
    if [[ -f runs/tiny/tasks/gsm8k/test.jsonl ]]; then
        echo "complete: runs/tiny/lessons, runs/tiny/tasks"
        return
    fi
    solar-mega quickstart lessons --root runs/tiny
}

# ------------------------------------------------------------------------------------------------ command line

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

recipe=${1:-} mode=run from="" only="" known="" last=""
shift || usage
declare -F "recipe_$recipe" > /dev/null || usage
while (($# > 0)); do
    case $1 in
        --dry-run | --slurm) mode=${1#--} ;;
        --from | --only)
            if (($# < 2)); then usage; fi
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        *) usage ;;
    esac
    shift
done
GPUS=${GPUS:-64}
wanted=$from$only
# shellcheck source=/dev/null
[[ -n "${VIRTUAL_ENV:-}" || -n "${SOLAR_MEGA_CONTAINER:-}" ]] || source launch/env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # per process; train.threads decides in a training
"recipe_$recipe"
[[ -n "$known" ]] || fail "no stage $wanted in the recipe $recipe" 2
printf '\nrecipe %s: done\n' "$recipe"
