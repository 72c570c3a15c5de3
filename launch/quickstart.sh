#!/usr/bin/env bash
# The paper's idea in five minutes on a laptop, with the cluster's code: train a small base, grow it by depth
# across two pipeline stages, continue pretraining, and compare with growing it in other ways.
#
#     bash launch/quickstart.sh            run; after an interruption, go on where it stopped
#     bash launch/quickstart.sh --fresh    start over
#
# Everything lands in runs/quickstart: report.json, loss.png, and the grown model in grown/hf.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root=runs/quickstart
case "${1:-}" in
    "") ;;
    --fresh) rm -rf "$root" ;;
    *)
        echo "usage: bash launch/quickstart.sh [--fresh]" >&2
        exit 2
        ;;
esac

source launch/env.sh
export OMP_NUM_THREADS=1 # per process, until train.threads says otherwise

mkdir -p "$root"
stages=8 number=0

# stage NAME WHAT COMMAND...: runs COMMAND unless the stage is marked done, and counts its seconds.
stage() {
    local name=$1 what=$2 began=$SECONDS
    shift 2
    number=$((number + 1))
    if [[ -f "$root/.done-$name" ]]; then
        printf '\n[%s/%s] %s: done before\n' "$number" "$stages" "$what"
        return
    fi
    printf '\n[%s/%s] %s\n' "$number" "$stages" "$what"
    "$@"
    echo $((SECONDS - began)) > "$root/.done-$name"
}

ranks() { torchrun --standalone --nproc-per-node 2 -m solar_mega "$@"; }

prepare() {
    solar-mega quickstart prepare --root "$root"
    solar-mega tokenize "$root/text/train.jsonl" --tokenizer "$root/model" --output "$root/data/train" --overwrite
    solar-mega tokenize "$root/text/valid.jsonl" --tokenizer "$root/model" --output "$root/data/valid" --overwrite
}

grow() {
    rm -rf "$root/grown_untrained"
    solar-mega convert "$root/base/hf" "$root/grown_untrained" --layer-map dus:2
    solar-mega verify "$root/base/hf" "$root/grown_untrained" --layer-map dus:2
}

report() {
    local total=0 file
    for file in "$root"/.done-*; do total=$((total + $(< "$file"))); done
    solar-mega quickstart report --root "$root" --seconds "$total"
}

pretrain="pretrain --config configs/tiny/2_pretrain.toml"

stage text "text and tokenizer" prepare
stage base "the base: 8 layers from scratch, two data-parallel processes" \
    ranks pretrain --config configs/tiny/0_base.toml
stage grow "grow it on disk: drop the last 2 layers, and the first 2 of the copy; prove it bit for bit" grow
# shellcheck disable=SC2086 # $pretrain is several words
{
    stage grown "the paper: grow across two pipeline stages (dus:2, 12 layers) and continue pretraining" \
        ranks $pretrain
    stage stack "control: plain doubling (stack:2, 16 layers)" \
        ranks $pretrain --model.layer_map stack:2 --output.dir "$root/stack"
    stage continued "control: the 8-layer base simply trained on" \
        ranks $pretrain --model.layer_map identity --output.dir "$root/continued"
    stage scratch "control: 12 layers from scratch" \
        ranks $pretrain --model.weights random --output.dir "$root/scratch"
}
rm -f "$root/.done-report"
stage report "compare" report

cat << END

Next: talk to the numbers yourself, for instance

    source launch/env.sh
    solar-mega inspect $root/grown/hf
    solar-mega pretrain --config configs/tiny/2_pretrain.toml --model.layer_map dus:3 --output.dir runs/dus3 --dry-run
END
