#!/usr/bin/env bash
# Everything at once, for as long as you like: sessions that send, while Sent, the
# network and the server's processes fail at random.  Prints how many messages
# there were and which faults they survived; fails if one was lost or sent twice.
#
#   bash test/soak.sh MINUTES         SEED=N repeats the choices of a run
set -u
[[ ${1:-} =~ ^[0-9]+$ ]] || { echo "usage: $0 MINUTES" >&2; exit 2; }
export SENTDM_SOAK_SECONDS=$((60 * $1)) TAP_TESTS=test/t/050_soak.pl
exec bash "$(dirname "$0")/check.sh" tap
