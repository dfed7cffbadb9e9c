#!/usr/bin/env bash
# What a container of this project runs: a recipe or tool by its name, overrides of the main job, or any other command. Ends in exec, so
# that the signals by which Docker and Slurm ask a run to save and stop reach it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

names() { # the programs of a folder, without .py
    find "$root/$1" -maxdepth 1 -name '*.py' -printf '%f\n' | sort | sed 's/\.py$//' | tr '\n' ' '
}

# A user id without an entry in /etc/passwd has neither a home nor a name, and torch asks for both.
if [[ ! -w ${HOME:-/nonexistent} ]]; then
    HOME=$(mktemp -d)
    export HOME
fi
export USER=${USER:-user$(id -u)} LOGNAME=${LOGNAME:-user$(id -u)}

first=${1:-help}
case $first in
    help | -h | --help)
        echo "usage: [RECIPE | TOOL | key=value] ...    or any other command"
        echo "  recipes: $(names recipes)"
        echo "  tools:   $(names tools)"
        echo "  key=value and +experiment=NAME start the main job, recipes/extend.py, in the working directory"
        exit 0
        ;;
    +* | [a-z]*=*) command=(python "$root/recipes/extend.py" "$@") ;;
    *)
        command=("$@")
        for folder in recipes tools; do
            if [[ $first != */* && -f $root/$folder/$first.py ]]; then
                command=(python "$root/$folder/$first.py" "${@:2}")
            fi
        done
        ;;
esac

# NVIDIA's own entry point sets up the CUDA libraries for drivers that are older than the image.
nvidia=/opt/nvidia/nvidia_entrypoint.sh
if [[ -x $nvidia ]]; then exec "$nvidia" "${command[@]}"; fi
exec "${command[@]}"
