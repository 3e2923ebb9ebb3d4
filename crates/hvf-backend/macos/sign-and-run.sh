#!/bin/sh
# Cargo's runner on Apple silicon (.cargo/config.toml): a program may use the hypervisor once it is signed with an entitlement to. An ad hoc
# signature, which needs no certificate, is enough on the machine that made it.
set -eu

program=$1
entitlements=$(dirname "$0")/hypervisor.entitlements

# A program that has it is left as it is: it may be running.
if ! codesign --display --entitlements - "$program" 2>/dev/null | grep -q com.apple.security.hypervisor; then
    if ! said=$(codesign --sign - --force --entitlements "$entitlements" "$program" 2>&1); then
        echo "$0: can't sign $program: $said" >&2
        exit 1
    fi
fi
exec "$@"
