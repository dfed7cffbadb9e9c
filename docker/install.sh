#!/usr/bin/env bash
# The one way this project is installed: `make venv` on a bare machine, docker/Dockerfile and docker/Dockerfile.cpu all run this script, so
# that what the images do is what the tests ran on.
#
#   docker/install.sh --venv DIR [--python PYTHON] [--extras dev,eval] [--with REQUIREMENT]... [--system-site-packages]
#
# --system-site-packages is for an image that brings its own builds of torch, Transformer Engine and apex: the environment sees them, their
# versions become constraints, and the script fails if one of them is another afterwards.
set -euo pipefail

fail() {
    echo "docker/install.sh: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv='' python=python3 extras='' requirements=() inherit=false
while (($#)); do
    case $1 in
        --venv | --python | --extras | --with)
            (($# > 1)) || fail "$1 needs a value."
            case $1 in
                --venv) venv=$2 ;;
                --python) python=$2 ;;
                --extras) extras=$2 ;;
                --with) requirements+=("$2") ;;
            esac
            shift 2
            ;;
        --system-site-packages)
            inherit=true
            shift
            ;;
        *) fail "$1 is no option; they are --venv, --python, --extras, --with and --system-site-packages." ;;
    esac
done
[[ -n $venv ]] || fail "--venv DIR is missing: where to make the environment."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is no Python 3.11 or later. Name one, for example --python python3.12 (make PYTHON=python3.12)."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# What an interpreter sees of the packages that an image builds for itself, as name==version.
kernel_packages() {
    "$1" - <<'EOF'
import re
from importlib import metadata

KEPT = re.compile(r"torch|torchvision|torchaudio|(pytorch.)?triton|transformer.engine.*|apex|flash.attn|nvidia.(cublas|cuda|cudnn|nccl).*", re.I)
for name in sorted({str(found.metadata["Name"]) for found in metadata.distributions()}, key=str.lower):
    if KEPT.fullmatch(name):
        print(f"{name}=={metadata.version(name)}")
EOF
}

if $inherit; then
    "$python" -m venv --system-site-packages --without-pip "$venv" # the image's own pip is visible from there
    kernel_packages "$python" >"$scratch/before"
    # the image's torchrun would start the image's interpreter, which does not see what is installed here
    printf '#!/bin/sh\nexec "%s/bin/python" -m torch.distributed.run "$@"\n' "$(cd "$venv" && pwd)" >"$venv/bin/torchrun"
    chmod 755 "$venv/bin/torchrun"
else
    "$python" -m venv "$venv"
    : >"$scratch/before"
fi

# Our pins, but for what is there already: two pins of one package would be a conflict.
while IFS= read -r line; do
    grep -qi "^${line%%[=<>!~; ]*}==" "$scratch/before" || echo "$line"
done <"$root/constraints.txt" >"$scratch/constraints.txt"
cat "$scratch/before" >>"$scratch/constraints.txt"

# pip wants to keep the wheels that it builds; where the home is none that can be written it builds them and keeps nothing
if [[ -z ${PIP_CACHE_DIR-} && ! (-d ${HOME-} && -w ${HOME-}) ]]; then export PIP_NO_CACHE_DIR=1; fi
# NVIDIA's images set PIP_CONSTRAINT to a list of everything in them; of that only what is in $scratch/before must stay as it is.
PIP_CONSTRAINT='' "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$scratch/constraints.txt" \
    --editable "$root${extras:+[$extras]}" ${requirements[@]+"${requirements[@]}"} ||
    fail "pip could not install the project, see above; held at the image's versions: $(paste -sd ' ' "$scratch/before")"

kernel_packages "$venv/bin/python" >"$scratch/after"
while IFS= read -r kept; do
    grep -qxF "$kept" "$scratch/after" ||
        fail "the image has $kept, the environment now sees $(grep -i "^${kept%%==*}==" "$scratch/after" || echo none). \
Leave out the requirement that replaced it."
done <"$scratch/before"
