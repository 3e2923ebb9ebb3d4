#!/bin/sh
# The cargo runner on Apple silicon (.cargo/config.toml). A program may use the hypervisor only if
# it is signed with an entitlement. On the machine that built it, an ad hoc signature is
# sufficient, which needs no certificate.
set -eu

program=$1
entitlements=$(dirname "$0")/hypervisor.entitlements

# A program with the entitlement is not signed again, because it may be running.
if ! codesign --display --entitlements - "$program" 2>/dev/null | grep -q com.apple.security.hypervisor; then
    if ! output=$(codesign --sign - --force --entitlements "$entitlements" "$program" 2>&1); then
        echo "$0: failed to sign $program: $output" >&2
        exit 1
    fi
fi
exec "$@"
