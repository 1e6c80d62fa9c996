#!/usr/bin/env bash
# Download the big data sets and the base model's files, and check what arrived: ./prepare.sh --help
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

usage() {
    cat <<'END'
Download the big data sets and the base model's files, and check what arrived.

    ./prepare.sh [--only STAGE]... [--hub HUB] [--to DIR]
    ./prepare.sh --list [--only STAGE]...
    ./prepare.sh --check [--only STAGE]... [--to DIR]

    --list        print what goes where and how much, and stop; uses no network
    --check       only check what is there; uses no network
    --only STAGE  pt, sft, dpo or model; may be given several times (default: all)
    --hub HUB     modelscope or huggingface (default: modelscope)
    --to DIR      folder that gets data/ and models/ (default: the folder of this script)
    --help        print this

Stopped or cut off? Run the same command again: complete files are not fetched twice.
END
}

# One item a line: stage, kind of repository, repository, folder there ("/": anywhere), files there (patterns with
# commas), how many of them by name, folder here, columns that training reads ("-": no table), then as published:
# size of these files, size of the whole folder there, rows.
items() {
    local taken whole folder many
    while read -r taken whole folder; do
        many=all
        # Five English folders are far larger than the rest; three files keep the mixture near 16 billion tokens.
        [[ "$taken" == "$whole" ]] || many=3
        echo "pt dataset BAAI/IndustryCorpus2 $folder *.parquet $many data/pt/$folder text $taken $whole -"
    done <<'END'
172M 172M mathematics_statistics/chinese/high
267M 267M artificial_intelligence_machine_learning/chinese/high
273M 273M computer_programming_code/chinese/high
319M 319M news_media/chinese/high
371M 371M accommodation_catering_hotel/chinese/high
512M 512M computer_programming_code/english/high
718M 718M accommodation_catering_hotel/english/high
1.6G 1.6G artificial_intelligence_machine_learning/english/high
1.9G 1.9G tourism_geography/chinese/high
2.2G 2.2G film_entertainment/chinese/high
3.1G 3.1G news_media/english/high
3.1G 3.1G tourism_geography/english/high
4.5G 4.5G literature_emotion/chinese/high
5.1G 5.1G computer_communication/chinese/high
8.7G 8.7G current_affairs_government_administration/chinese/high
1.7G 8.9G film_entertainment/english/high
1.5G 12G literature_emotion/english/high
1.5G 13G computer_communication/english/high
1.6G 35G current_affairs_government_administration/english/high
1.4G 42G mathematics_statistics/english/high
END
    cat <<'END'
sft dataset BAAI/Infinity-Instruct 7M *.parquet all data/sft/7M conversations 5.7G 5.7G 7,449,106
sft dataset BAAI/Infinity-Instruct Gen *.parquet all data/sft/Gen conversations 2.7G 2.7G 1,456,927
dpo dataset BAAI/Infinity-Preference / train-*.parquet all data/dpo chosen,rejected 206M 206M 59,338
dpo dataset BAAI/Infinity-Preference / test-*.parquet all data/dpo chosen,rejected 350K 350K 100
END
    local names=config.json,generation_config.json,tokenizer.json,tokenizer_config.json,vocab.json,merges.txt
    echo "model model Qwen/Qwen2.5-0.5B-Instruct / $names all models/Qwen2.5-0.5B-Instruct - 11M 11M -"
}

# The items of the stages that were asked for, in the order above.
chosen_items() {
    local stage rest
    while read -r stage rest; do
        [[ "$stages" == *" $stage "* ]] && echo "$stage $rest"
    done < <(items)
    return 0
}

# From items on standard input: a table, and the sum of every stage.
print_list() {
    awk '
        function megabytes(size) {
            return substr(size, 1, length(size) - 1) * (size ~ /G$/ ? 1024 : size ~ /M$/ ? 1 : 1 / 1024)
        }
        BEGIN {
            format = "%-5s  %-26s  %-16s  %-66s  %5s  %s\n"
            printf format, "stage", "from", "files", "to", "size", "rows"
        }
        {
            names = split($5, name, ",")
            files = $6 != "all" ? "first " $6 " of " $10 : names > 1 ? names " files" : name[1]
            printf format, $1, $3, files, $7, $9, $11
            if (!($1 in items)) order[++stages] = $1
            items[$1]++
            total[$1] += megabytes($9)
        }
        END {
            for (i = 1; i <= stages; i++) {
                size = total[order[i]]
                printf format, order[i], "", "", items[order[i]] " in all", \
                    size < 1024 ? int(size) "M" : sprintf("%.1fG", size / 1024), ""
            }
        }'
}

# Say what is wrong with the command line and stop.
wrong_usage() {
    echo "prepare.sh: $1. ./prepare.sh --help shows what there is." >&2
    exit 2
}

action=download
hub=modelscope
package=modelscope
to="$root"
stages=" "
while (($#)); do
    case "$1" in
        --help | -h)
            usage
            exit 0
            ;;
        --list | --check)
            [[ "$action" == download || "$action" == "${1#--}" ]] || wrong_usage "take --list or --check, not both"
            action="${1#--}"
            ;;
        --only | --hub | --to)
            (($# > 1)) || wrong_usage "$1 needs a value"
            case "$1 $2" in
                "--only pt" | "--only sft" | "--only dpo" | "--only model") stages+="$2 " ;;
                "--hub modelscope") hub="$2" package=modelscope ;;
                "--hub huggingface") hub="$2" package=huggingface_hub ;;
                "--only "*) wrong_usage "--only takes pt, sft, dpo or model, not '$2'" ;;
                "--hub "*) wrong_usage "--hub takes modelscope or huggingface, not '$2'" ;;
                *) to="$2" ;;
            esac
            shift
            ;;
        *) wrong_usage "unknown option '$1'" ;;
    esac
    shift
done
[[ "$stages" != " " ]] || stages=" pt sft dpo model "

if [[ "$action" == list ]]; then
    chosen_items | print_list
    exit 0
fi

python="$root/.venv/bin/python"
[[ -x "$python" ]] || python="$(command -v python3 || true)"
if [[ -z "$python" ]] || ! "$python" -c 'import sys, pyarrow; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "prepare.sh needs Python 3.11 or newer with pyarrow; ${python:-no python3} does not have it. Make one with" \
        "\`python3.11 -m venv .venv && .venv/bin/pip install pyarrow $package\` in $root and run this again." >&2
    exit 1
fi

if [[ "$action" == download ]]; then
    if ! reason="$("$python" -c "import $package" 2>&1)"; then
        echo "prepare.sh: the client of the $hub hub does not load (${reason##*$'\n'}). Install it with" \
            "\`${python%/*}/pip install $package\`, or take the other hub with --hub." >&2
        exit 1
    fi
    mkdir -p "$to"
    export HF_HUB_DISABLE_TELEMETRY=1
fi

chosen_items | "$python" "$root/utils/prepare_data.py" "$action" "$hub" "$to"
