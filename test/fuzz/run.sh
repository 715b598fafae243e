#!/usr/bin/env bash
# Build one fuzz target and run it for some seconds, starting from its corpus.
#
#   bash test/fuzz/run.sh test/fuzz/NAME_fuzz.c SECONDS
#
# FUZZ_KEEP names a directory for inputs that fail.
set -eu
cd "$(dirname "$0")/../.."
name=$(basename "$1" _fuzz.c)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
parts=$(sed -n 's/^ \* parts: //p' "$1")
flags=$(sed -n 's/^ \* flags: //p' "$1")
libs=$(sed -n 's/^ \* libs: //p' "$1")
: "${PG_CONFIG:=pg_config}"
# shellcheck disable=SC2086,SC2046
clang -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -Wno-ignored-attributes -Isrc -I"$("$PG_CONFIG" --includedir-server)" \
	-L"$("$PG_CONFIG" --pkglibdir)" $flags "$1" $(for part in $parts; do echo "src/$part.c"; done) $libs -o "$work/$name"
mkdir "$work/corpus"
cp "test/fuzz/corpus/$name"/* "$work/corpus"
"$work/$name" -max_total_time="$2" -timeout=10 -print_final_stats=1 -artifact_prefix="$work/" "$work/corpus" 2>"$work/log" || {
	tail -40 "$work/log"
	[[ ! ${FUZZ_KEEP:-} ]] || cp "$work"/*-* "$FUZZ_KEEP"
	exit 1
}
echo "fuzz $name: $(awk '/number_of_executed_units/ {print $2}' "$work/log") executions, no finding"
