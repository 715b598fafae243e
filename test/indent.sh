#!/usr/bin/env bash
# The layout of our C, by PostgreSQL's own tool.
#
#   bash test/indent.sh            lay out the files
#   bash test/indent.sh --check    say what differs, and fail
#
# The names of types come from the debug information of a finished build.
set -u
cd "$(dirname "$0")/.." || exit 1
OPTIONS="-bad -bap -bbb -bc -bl -cli1 -cp33 -cdb -nce -d0 -di12 -nfc1 -i4 -l79 -lp -lpl -nip -npro -sac -tpg -ts4"
types=$(mktemp)
trap 'rm -f "$types" "$types.c"' EXIT
status=0

for object in $(find . -name '*.o' -path '*src*'); do
	objdump -W "$object" 2>/dev/null
done | awk '/DW_TAG_typedef/ { named = 1; next } named && /DW_AT_name/ { print $NF; named = 0 }' | sort -u >"$types"
[[ -s $types ]] || { echo "$0: build first: the objects tell the names of types" >&2; exit 1; }

# Headers have no object: they are laid out with the directory's sources.
for file in $(find src -name '*.[ch]'); do
	ls "$(dirname "$file")"/*.o >/dev/null 2>&1 || continue
	pg_bsd_indent $OPTIONS -U"$types" <"$file" >"$types.c" || { status=1; continue; }
	cmp -s "$file" "$types.c" && continue
	if [[ ${1:-} == --check ]]; then
		diff -u "$file" "$types.c" | head -20
		status=1
	else
		cat "$types.c" >"$file"
	fi
done
exit $status
