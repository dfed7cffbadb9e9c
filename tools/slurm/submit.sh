#!/usr/bin/env bash
# Submit a run of recipes/extend.py to Slurm:
#
#   tools/slurm/submit.sh [options] -- +experiment=NAME [key=value ...]
#
# Defaults are in parentheses.
#
#   --nodes N             number of nodes (1)
#   --gpus-per-node N     number of GPUs per node, with one task per GPU (8); 0 trains on CPUs
#   --ntasks-per-node N   number of tasks per node; only with --gpus-per-node 0 (1)
#   --cpus-per-task N     number of CPU cores per task (8; 1 without GPUs)
#   --container KIND      pyxis | apptainer | none (none)
#   --image IMAGE         image file, or image name: REGISTRY#NAME:TAG for pyxis, docker://... for apptainer
#   --mounts A:B[,...]    additional directories for the container. The checkout, the working directory, the parent of the output directory,
#                         HF_HOME, and absolute data.directory and model.hf_path are always mounted.
#   --mpi KIND            none | pmi2 | pmix: MPI plugin of srun (none; training does not use MPI)
#   --time LIMIT          time limit in a format of sbatch: minutes, HH:MM:SS, D-HH:MM:SS (time limit of the partition)
#   --partition NAME      partition of the job
#   --account NAME        account of the job
#   --signal-seconds N    seconds between the stop signal and the time limit; one step and one save must fit (300)
#   --max-requeues N      maximum number of starts after the first (50)
#   --python COMMAND      Python interpreter, inside the container if there is one (python3)
#   --shared DIRECTORY    treat DIRECTORY as visible to every node, even if its path looks local; may be repeated
#   --local DIRECTORY     local directory of each node for temporary files and compiled kernels (/tmp)
#   --log-dir DIRECTORY   directory of the log NAME-JOB.out (slurm/ next to the output directory)
#   --sbatch OPTION       additional option for sbatch, for example --sbatch --qos=high; may be repeated
#   --srun OPTION         additional option for srun; may be repeated
#   --dry-run             print the batch script and do not submit it; needs no Slurm
#
# Before its time limit, the job receives a signal, saves, and requeues itself until the run is finished. See README.md in this directory.
# The exit status is 0 if the job was submitted, and 2 if the command is wrong and nothing was submitted. Otherwise it is that of sbatch.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(cd "$here/../.." && pwd)

problems=()
problem() { problems+=("$*"); }
stop_at_problems() {
    if [[ ${#problems[@]} -gt 0 ]]; then
        printf 'submit.sh: %s\n' "${problems[@]}" >&2
        exit 2
    fi
}

# ------------------------------------------------------------------ arguments
nodes=1 gpus_per_node=8 tasks_per_node="" cpus_per_task="" container=none image="" mounts="" mpi=none time="" partition="" account=""
signal_seconds=300 max_requeues=50 python=python3 local_directory=/tmp log_directory="" dry_run=0
shared=() sbatch_options=() srun_options=() overrides=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --) shift && overrides=("$@") && break ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0 ;;
        --dry-run) dry_run=1 && shift && continue ;;
        --sbatch | --srun) [[ $# -gt 1 ]] && option=$1 value=$2 && shift ;; # the next word is the whole value, which may contain =
        --*=*) option=${1%%=*} value=${1#*=} ;;
        --*) option=$1 value=${2-} && if [[ $# -gt 1 ]]; then shift; fi ;;
        *) problem "$1 is no option. Settings of the run (key=value) go after --." && shift && continue ;;
    esac
    shift
    if [[ -z $value || $value == -- ]]; then
        problem "$option needs a value."
        [[ $value == -- ]] && set -- -- "$@"
        continue
    fi
    case $option in
        --nodes) nodes=$value ;;
        --gpus-per-node) gpus_per_node=$value ;;
        --ntasks-per-node) tasks_per_node=$value ;;
        --cpus-per-task) cpus_per_task=$value ;;
        --container) container=$value ;;
        --image) image=$value ;;
        --mounts) mounts+=${mounts:+,}$value ;;
        --mpi) mpi=$value ;;
        --time) time=$value ;;
        --partition) partition=$value ;;
        --account) account=$value ;;
        --signal-seconds) signal_seconds=$value ;;
        --max-requeues) max_requeues=$value ;;
        --python) python=$value ;;
        --shared) shared+=("$value") ;;
        --local) local_directory=$value ;;
        --log-dir) log_directory=$value ;;
        --sbatch) sbatch_options+=("$value") ;;
        --srun) srun_options+=("$value") ;;
        *) problem "$option is no option; --help lists them." ;;
    esac
done

# ------------------------------------------------------------------ experiment and output directory of the run
override() { # KEY: print the last value of the key in the overrides
    local word found=""
    for word in ${overrides[@]+"${overrides[@]}"}; do
        word=${word#+} && word=${word#+}
        if [[ $word == "$1="* ]]; then found=${word#*=}; fi
    done
    echo "$found"
}
absolute() { if [[ $1 == /* ]]; then echo "$1"; else echo "$PWD/${1#./}"; fi; }

experiment=$(override experiment)
known=$(cd "$checkout/conf/experiment" && for file in *.yaml; do printf '%s ' "${file%.yaml}"; done)
recipe=$checkout/conf/experiment/$experiment.yaml
output_dir=$(override output_dir)
if [[ -z $experiment ]]; then
    problem "no experiment: end the command with -- +experiment=NAME; NAME is one of ${known% }."
elif [[ ! -f $recipe ]]; then
    problem "+experiment=$experiment is unknown: choose one of ${known% }."
elif [[ " ${overrides[*]} " == *" experiment=$experiment "* ]]; then # the config has no default experiment, so Hydra needs the +
    problem "experiment=$experiment: write +experiment=$experiment."
elif [[ -z $output_dir ]]; then
    name=$(override name)
    name=${name:-$(sed -n 's/^name: *//p' "$recipe")}
    if [[ -z $name || $name == *'$'* ]]; then # only Hydra can compose the name, and a login node may not have Hydra
        problem "+experiment=$experiment composes the name of its output directory. Choose one: output_dir=outputs/NAME."
    fi
    output_dir=outputs/$name
fi
output_dir=$(absolute "${output_dir:-outputs/unknown}")
output_dir=${output_dir%/}
if [[ -z $log_directory ]]; then log_directory=$(dirname "$output_dir")/slurm; fi
log_directory=$(absolute "$log_directory")

# ------------------------------------------------------------------ rules
whole() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; } # no leading zero, because bash reads 08 as octal
at_least() { # OPTION VALUE SMALLEST
    if ! whole "$2" || [[ $2 -lt $3 ]]; then problem "$1 $2: must be a whole number, $3 or more."; fi
}
one_of() { # OPTION VALUE CHOICE...
    local option=$1 value=$2 choice
    shift 2
    for choice in "$@"; do if [[ $value == "$choice" ]]; then return; fi; done
    problem "$option $value: choose one of $*."
}
seconds_of() { # LIMIT: print a time limit of sbatch in seconds; print nothing for an invalid limit
    local days=0 left=$1 fields
    if [[ ! $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]]; then return; fi
    if [[ $1 == *-* ]]; then days=${1%%-*} left=${1#*-}; fi
    IFS=: read -ra fields <<<"$left"
    if [[ $1 == *-* || ${#fields[@]} -eq 3 ]]; then # [D-]H[:M[:S]]
        echo $((((10#$days * 24 + 10#${fields[0]}) * 60 + 10#${fields[1]:-0}) * 60 + 10#${fields[2]:-0}))
    else # M[:S]
        echo $((10#${fields[0]} * 60 + 10#${fields[1]:-0}))
    fi
}
seen_by_every_node() { # LABEL DIRECTORY: report a directory that looks local to one node
    local known_shared
    for known_shared in ${shared[@]+"${shared[@]}"}; do
        if [[ $2/ == "${known_shared%/}"/* ]]; then return; fi
    done
    if [[ $2/ =~ ^(/tmp|/var/tmp|/dev/shm|/run|/var/run)/ || (-n ${TMPDIR-} && $2/ == "${TMPDIR%/}"/*) ]]; then
        problem "$1 $2 is on a disk of one node, and other nodes and later starts of the job do not see it." \
            "Use a directory on a shared file system, or pass --shared DIRECTORY if this file system is shared."
    fi
}
plain() { # LABEL DIRECTORY: report a character that Slurm or a container runtime does not accept in a path
    if [[ $2 =~ [^A-Za-z0-9_./@+=-] ]]; then
        problem "$1 $2: neither Slurm's options nor container mounts take a '${BASH_REMATCH[0]}' in a path. Use another directory."
    fi
}

at_least --nodes "$nodes" 1
at_least --gpus-per-node "$gpus_per_node" 0
at_least --signal-seconds "$signal_seconds" 1
at_least --max-requeues "$max_requeues" 0
if [[ $gpus_per_node == 0 ]]; then
    tasks_per_node=${tasks_per_node:-1} cpus_per_task=${cpus_per_task:-1}
elif [[ -n $tasks_per_node && $tasks_per_node != "$gpus_per_node" ]]; then
    problem "--ntasks-per-node $tasks_per_node with --gpus-per-node $gpus_per_node: there is one task a GPU. Leave --ntasks-per-node out."
fi
tasks_per_node=${tasks_per_node:-$gpus_per_node} cpus_per_task=${cpus_per_task:-8}
at_least --ntasks-per-node "$tasks_per_node" 1
at_least --cpus-per-task "$cpus_per_task" 1
one_of --container "$container" pyxis apptainer none
one_of --mpi "$mpi" none pmi2 pmix
if [[ -n $time ]] && whole "$signal_seconds"; then
    limit=$(seconds_of "$time")
    if [[ -z $limit ]]; then
        problem "--time $time: sbatch takes minutes, HH:MM:SS or D-HH:MM:SS."
    elif [[ $limit -lt $((2 * signal_seconds)) ]]; then
        problem "--time $time is less than twice --signal-seconds $signal_seconds: the job would have to stop before it made progress." \
            "Set a longer --time, or a shorter --signal-seconds in which a step and a save still fit."
    fi
fi

# The following functions read the layout of the run from the files in conf/, because a login node may have no Python.
# tests/unit/tools/test_slurm_scripts.py compares the result with Hydra's.
built_on() { # GROUP FILE: print the file of the same group that FILE extends; print nothing if FILE extends none
    local name
    while IFS= read -r name; do
        if [[ -f $checkout/conf/$1/$name.yaml ]]; then echo "$checkout/conf/$1/$name.yaml"; fi
    done < <(sed -n 's/^ *- \([A-Za-z0-9_]*\)$/\1/p' "$2")
}
parallel_group() {
    local chosen file=$recipe
    chosen=$(override parallel)
    while [[ -z $chosen && -f $file ]]; do
        chosen=$(sed -n 's|^ *- override /parallel: *\([A-Za-z0-9_]*\).*|\1|p' "$file")
        file=$(built_on experiment "$file")
    done
    echo "${chosen:-single}"
}
size_of() { # NAME: print the parallel size of the run for NAME = tensor, pipeline or context
    local value file
    value=$(override "parallel.$1_model_parallel_size")
    if [[ $1 == context ]]; then value=$(override parallel.context_parallel_size); fi
    file=$checkout/conf/parallel/$(parallel_group).yaml
    while [[ -z $value && -f $file ]]; do
        value=$(sed -n "s/^$1\(_model\)\{0,1\}_parallel_size: *\([0-9]*\).*/\2/p" "$file")
        file=$(built_on parallel "$file")
    done
    echo "${value:-1}"
}
if [[ -f $recipe ]] && whole "$nodes" && whole "$tasks_per_node"; then
    tensor=$(size_of tensor) pipeline=$(size_of pipeline) context=$(size_of context)
    if whole "$tensor" && whole "$pipeline" && whole "$context"; then
        of_a_model=$((tensor * pipeline * context)) ranks=$((nodes * tasks_per_node))
        if [[ $of_a_model -gt 0 && $((ranks % of_a_model)) -ne 0 ]]; then
            advice="Set parallel=NAME (conf/parallel) to a layout of fewer ranks."
            if [[ $tasks_per_node -gt 0 && $((of_a_model % tasks_per_node)) -eq 0 ]]; then
                advice="Ask for --nodes $((of_a_model / tasks_per_node)) or a multiple, or set parallel=NAME (conf/parallel)."
            fi
            problem "--nodes $nodes with $tasks_per_node tasks a node: $ranks ranks, but +experiment=$experiment lays a model over" \
                "TP $tensor x PP $pipeline x CP $context = $of_a_model ranks, and their number must be a multiple of that. $advice"
        fi
    fi
fi
plain "the checkout" "$checkout"
plain "the working directory" "$PWD"
plain "output_dir" "$output_dir"
plain "--log-dir" "$log_directory"
plain "--local" "$local_directory"
seen_by_every_node "the checkout" "$checkout"
seen_by_every_node "the working directory" "$PWD"
seen_by_every_node "output_dir" "$output_dir"
if [[ $local_directory != /* ]]; then problem "--local $local_directory: must be an absolute path."; fi
huggingface=${HF_HOME:-$HOME/.cache/huggingface}
if [[ $container == none ]]; then
    if [[ -n $image ]]; then problem "--image $image with --container none: choose pyxis or apptainer, or leave --image out."; fi
    if [[ -n $mounts ]]; then problem "--mounts $mounts with --container none: there is no container. Leave --mounts out."; fi
elif [[ -z $image && $container =~ ^(pyxis|apptainer)$ ]]; then
    problem "--container $container needs --image: a file, or REGISTRY#NAME:TAG (pyxis) or docker://NAME:TAG (apptainer)."
elif [[ -e $image ]]; then
    image=$(absolute "$image")
    plain "--image" "$image"
    seen_by_every_node "--image" "$image"
elif [[ $image == [./~]* || $image =~ \.(sqsh|squashfs|sif|img)$ ]]; then
    problem "--image $image: no such file (looked for $(absolute "$image"))."
elif [[ $container == apptainer && $image != *://* ]]; then
    problem "--image $image: no such file. The name of an image for apptainer starts with docker://, library:// or oras://."
elif [[ $container == pyxis && ${image#*://} =~ ^[A-Za-z0-9-]+\.[A-Za-z0-9.-]+(:[0-9]+)?/ && $image != *'#'* ]]; then
    problem "--image $image: pyxis needs a # after the name of the registry: --image '${image/\//#}'."
fi

# ------------------------------------------------------------------ mounts of the container
bound=()
bind() { # DIRECTORY: mount it, unless a mounted directory contains it
    local other
    for other in ${bound[@]+"${bound[@]}"}; do
        if [[ $1/ == "$other"/* ]]; then return; fi
    done
    bound+=("$1")
}
bind "$checkout"
bind "$PWD"
bind "$(dirname "$output_dir")"
bind "$huggingface"
for key in data.directory model.hf_path; do
    value=$(override "$key")
    if [[ $value == /* ]]; then bind "${value%/}"; fi
done
binds=""
for directory in "${bound[@]}"; do binds+=${binds:+,}$directory:$directory; done
if [[ -n $mounts ]]; then
    IFS=, read -ra wanted <<<"$mounts"
    for mount in "${wanted[@]}"; do
        if [[ ! $mount =~ ^/[^:]*:/[^:]*(:[^:]+)?$ ]]; then
            problem "--mounts $mount: write ABSOLUTE_PATH:ABSOLUTE_PATH_IN_CONTAINER, and append :ro for a read-only mount."
        fi
        binds+=,$mount
    done
fi
stop_at_problems

# ------------------------------------------------------------------ batch script
quoted() { # WORD...: print one quoted word per line
    local word
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:@%+=#-]+$ ]]; then printf '    %s\n' "$word"; else printf '    %s\n' "${word@Q}"; fi
    done
}

sbatch_lines=()
if [[ $gpus_per_node -gt 0 ]]; then sbatch_lines+=("--gpus-per-node=$gpus_per_node"); fi
if [[ -n $time ]]; then sbatch_lines+=("--time=$time"); fi
if [[ -n $partition ]]; then sbatch_lines+=("--partition=$partition"); fi
if [[ -n $account ]]; then sbatch_lines+=("--account=$account"); fi
sbatch_lines+=(${sbatch_options[@]+"${sbatch_options[@]}"})
exports=()
# shellcheck disable=SC2016 # the job expands these variables
if [[ $gpus_per_node -gt 0 ]]; then
    # one queue to the device keeps communication and computation in the order in which Megatron issues them
    exports+=('export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}' 'export NCCL_DEBUG=${NCCL_DEBUG:-WARN}')
fi
in_container=()
if [[ $container == pyxis ]]; then
    srun_options+=("--container-image=$image" "--container-mounts=$binds" "--container-workdir=$PWD" --no-container-mount-home)
elif [[ $container == apptainer ]]; then
    in_container=(apptainer exec)
    if [[ $gpus_per_node -gt 0 ]]; then in_container+=(--nv); fi
    in_container+=(--bind "$binds" --pwd "$PWD" "$image")
fi
if [[ $container != none ]]; then exports+=('export PYTHONNOUSERSITE=1 # ~/.local was installed for another Python'); fi
command=("$python" -W ignore "$checkout/recipes/extend.py" "${overrides[@]}")
if [[ $((nodes * tasks_per_node)) -eq 1 ]]; then command+=(launch.nproc_per_node=1); fi # else extend.py starts one process per GPU

declare -A values=(
    [TASK_IS_A]=$(if [[ $gpus_per_node -gt 0 ]]; then echo GPU; else echo "CPU process"; fi)
    [JOB_NAME]=$(basename "$output_dir")
    [NODES]=$nodes
    [TASKS_PER_NODE]=$tasks_per_node
    [CPUS_PER_TASK]=$cpus_per_task
    [WORKING_DIRECTORY]=$PWD
    [LOG_DIRECTORY]=$log_directory
    [SIGNAL_SECONDS]=$signal_seconds
    [MAX_REQUEUES]=$max_requeues
    [OUTPUT_DIR]=$output_dir
    [LOCAL_DIRECTORY]=${local_directory%/}
    [HF_HOME]=$huggingface
    [MPI]=$mpi
    [SBATCH_LINES]=$(if [[ ${#sbatch_lines[@]} -gt 0 ]]; then printf '#SBATCH %s\n' "${sbatch_lines[@]}"; fi)
    [EXPORTS]=$(if [[ ${#exports[@]} -gt 0 ]]; then printf '%s\n' "${exports[@]}"; fi)
    [SRUN_OPTIONS]=$(quoted ${srun_options[@]+"${srun_options[@]}"})
    [CONTAINER]=$(quoted ${in_container[@]+"${in_container[@]}"})
    [COMMAND]=$(quoted "${command[@]}")
)
render() { # fill in the template in one pass, so that a placeholder inside a value is not replaced
    local line rest only
    while IFS= read -r line; do
        only=$line rest=""
        while [[ $line =~ ^(.*)__([A-Z]+(_[A-Z]+)*)__ ]]; do
            rest=${values[${BASH_REMATCH[2]}]}${line:${#BASH_REMATCH[0]}}$rest
            line=${BASH_REMATCH[1]}
        done
        line+=$rest
        if [[ -n $line || -z $only ]]; then printf '%s\n' "$line"; fi # a placeholder with an empty value leaves no empty line
    done <"$here/extend.sbatch"
}
script=$(render)
if [[ $dry_run -eq 1 ]]; then
    printf '%s\n' "$script"
    exit 0
fi

# ------------------------------------------------------------------ submission
if ! command -v sbatch >/dev/null; then
    problem "sbatch is not here: run this command on a login node of the cluster, or print the script with --dry-run."
    stop_at_problems
fi
mkdir -p "$log_directory" "$(dirname "$output_dir")" "$huggingface" # the sources of mounts must exist
job=$(sbatch --parsable <<<"$script")
job=${job%%;*}
cat <<TOLD
submitted as job $job
  log     $log_directory/$(basename "$output_dir")-$job.out
  output  $output_dir
  save and requeue: scancel --batch --signal=USR1 $job    end: scancel $job
TOLD
