#!/usr/bin/env bash
# Install what tests/integration/test_slurm.py needs (Debian, Ubuntu; root): a real Slurm, never started as a service of this machine.
set -euo pipefail
missing=()
for package in munge slurmctld slurmd slurm-client iproute2; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
policy=/usr/sbin/policy-rc.d # asked by package scripts before they start a service
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${missing[@]}" >/dev/null
