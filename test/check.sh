#!/usr/bin/env bash
# Runs every check of this project on a fresh Debian: lint, unit tests, simulator,
# fuzzers, pg_regress, and the end-to-end tests against a server of its own.
# Installs by apt what is missing, touches no cluster, leaves nothing behind.
#
#   bash test/check.sh [STAGE...]     all stages, or only the ones named
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
source test/lib.sh

STAGES="lint unit simulator fuzz regress tap receiver package"
WARNINGS="-Wall -Wextra -Werror -Wno-unused-parameter -Wno-sign-compare"
SANITIZE="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
PURE="request drain signature"
failed=()

run_stage() {
	local name=$1 start=$SECONDS status
	[[ " $wanted " == *" $name "* ]] || return 0
	printf '\n== %s\n' "$name"
	(set -e; cd "$SCRATCH/src"; "stage_$name")
	status=$?
	((status == 0)) || failed+=("$name")
	printf -- '-- %s: %s in %d s\n' "$name" "$( ((status == 0)) && echo ok || echo FAILED)" $((SECONDS - start))
}

# Both compilers, all warnings; the layout that PostgreSQL's own tool gives.
stage_lint() {
	local include
	include=$("$PG_CONFIG" --includedir-server)
	for compiler in gcc clang; do
		for file in src/*.c; do
			as_user "$compiler" -std=gnu11 -O2 $WARNINGS -D_GNU_SOURCE -isystem "$include" -Isrc -fsyntax-only "$file"
		done
		for file in $(grep -l failpoint.h src/*.c); do
			as_user "$compiler" -std=gnu11 -O2 $WARNINGS -D_GNU_SOURCE -DSENTDM_FAILPOINTS -isystem "$include" -Isrc -fsyntax-only "$file"
		done
		for file in src/receiver/*.c; do
			as_user "$compiler" -std=gnu11 -O2 $WARNINGS -D_GNU_SOURCE '-DSENTDM_VERSION=""' \
				-isystem "$("$PG_CONFIG" --includedir)" -fsyntax-only "$file"
		done
	done
	as_user bash test/indent.sh --check
	echo "warnings: none; layout: as it should be"
}

# The pure parts, alone and under sanitizers.
stage_unit() {
	as_user mkdir -p build/unit
	for name in $PURE; do
		as_user gcc -std=gnu11 $SANITIZE -Isrc -Itest/unit "test/unit/${name}_test.c" \
			$(for part in $PURE; do echo "src/$part.c"; done) -o "build/unit/$name" -lcrypto -lm
	done
	as_user prove --exec '' $(for name in $PURE; do echo "build/unit/$name"; done)
	check_http_thread
}

# Memory by the sanitizers; by helgrind that nothing is touched by two threads at once.
check_http_thread() {
	local sources="test/unit/http_thread_test.c src/http_thread.c src/http.c src/sockets.c" program=build/unit/http_thread
	as_user gcc -std=gnu11 $SANITIZE -Isrc -Itest/unit $sources -o "$program" -lcurl -lmicrohttpd
	as_user gcc -std=gnu11 -g -O1 -Isrc -Itest/unit $sources -o "$program-plain" -lcurl -lmicrohttpd
	as_user prove --exec '' "$program"
	as_user prove --exec "valgrind --quiet --tool=helgrind --error-exitcode=9 --suppressions=test/unit/helgrind.supp" "$program-plain"
}

stage_simulator() {
	as_user mkdir -p build
	as_user gcc -std=gnu11 $SANITIZE -Isrc test/sim/drain_sim.c src/drain.c src/request.c -o build/drain_sim -lm
	as_user build/drain_sim --self-test
	as_user build/drain_sim --schedules 20000 --seed "${SEED:-1}"
}

# A short run over the corpus and a little beyond it.
stage_fuzz() {
	for target in test/fuzz/*_fuzz.c; do
		as_user env PG_CONFIG="$PG_CONFIG" bash test/fuzz/run.sh "$target" "${FUZZ_SECONDS:-8}"
	done
}

stage_regress() {
	as_user "$PG_REGRESS" --temp-instance="$SCRATCH/regress" --bindir="$PG_BIN" --inputdir=test \
		--load-extension=sentdm --encoding=UTF8 $(cd test/sql && ls ./*.sql | sed 's,^\./,,; s,\.sql$,,') || {
		cat regression.diffs
		return 1
	}
}

# The end of what a TAP test that failed left behind: its own log, and the last one
# of each of its servers and programs.
show_logs() {
	local name=$1 log
	for log in "tmp_check/log/regress_log_$name" $(ls -t tmp_check/log/*"$name"?*.log 2>/dev/null | head -3); do
		printf '\n==> %s\n' "$log"
		tail -n 60 "$log" | cut -c -300
	done
}

# test/t/SentdmTest.pm says what these tests need.
run_tap() {
	local name
	as_user env PATH="$PG_BIN:$PATH" PG_REGRESS="$PG_REGRESS" TESTDIR="$SCRATCH/src" \
		TESTDATADIR="$SCRATCH/src/tmp_check" TESTLOGDIR="$SCRATCH/src/tmp_check/log" \
		SENTDM_FAILPOINT_BIN="$FAILPOINT_BIN" SENTDM_NODE_MODULES="${NODE_MODULES:-}" \
		SENTDM_SOAK_SECONDS="${SENTDM_SOAK_SECONDS:-}" SEED="${SEED:-}" \
		prove -j 2 --timer -I "$PG_PERL" -I test/t "$@" 2>&1 | tee "$SCRATCH/prove.log" && return
	for name in $(sed -n 's,^test/t/\(.*\)\.pl *(Wstat: .*,\1,p' "$SCRATCH/prove.log"); do
		show_logs "$name"
	done
	grep -E '^#|Wstat' "$SCRATCH/prove.log" | cut -c -300 | tail -n 60 >>"$SCRATCH/failures"
	return 1
}

stage_tap() {
	has_no_failpoints
	run_tap ${TAP_TESTS:-$(ls test/t/0*.pl | grep -v test/t/02)}
}

# What is for tests only must not be in what people install.
has_no_failpoints() {
	local library
	library=$("$PG_CONFIG" --pkglibdir)/sentdm.so
	grep -q 'sentdm.failpoint' "$SCRATCH/failpoints$library" && ! grep -q 'sentdm.failpoint' "$SCRATCH/server$library"
}

# With the receiver under sanitizers; what they find ends it, or is in its log.
stage_receiver() {
	fetch_node_modules standardwebhooks@1.0.0 pg@8 || {
		NODE_MODULES=
		echo "LEFT OUT: what needs the packages standardwebhooks and pg, because npm could not fetch them"
	}
	as_user make -s PG_CONFIG="$PG_CONFIG" with_llvm=no RECEIVER_CFLAGS="$SANITIZE" RECEIVER_LDFLAGS="$SANITIZE" receiver
	run_tap test/t/02*.pl
}

# The Debian packages, unpacked to where dpkg would put them, work.  The last stage,
# because they take the place of what was built before.
stage_package() {
	local bin=$SCRATCH/server/usr/bin/sentdm-receiver
	as_user mkdir "$SCRATCH/packages"
	as_user env PG_CONFIG="$PG_CONFIG" bash packaging/build-deb.sh "$SCRATCH/packages" >"$SCRATCH/package.log" 2>&1 </dev/null || {
		tail -n 40 "$SCRATCH/package.log"
		return 1
	}
	as_user find "$SCRATCH/server" -name 'sentdm*' -exec rm -rf {} +
	for package in "$SCRATCH"/packages/*.deb; do
		as_user dpkg-deb -x "$package" "$SCRATCH/server"
	done
	as_user "$bin" --version
	as_user grep -q "ExecStart=${bin#"$SCRATCH/server"}$" "$SCRATCH/server/lib/systemd/system/sentdm-receiver.service"
	run_tap test/t/001_send.pl
}

clean_up() {
	[[ -z ${SCRATCH:-} ]] || rm -rf "$SCRATCH"
}

wanted=${*:-$STAGES}
install_missing clang libclang-rt-14-dev pg-bsd-indent binutils perl libipc-run-perl openssl valgrind libmicrohttpd-dev libpq-dev nginx-light \
	prometheus prometheus-sql-exporter python3-psycopg2 python3-sqlalchemy \
	python3-flask python3-psycopg python3-psycopg-pool build-essential debhelper
find_pg_config || die "found no PostgreSQL to build for"
install_missing "postgresql-$("$PG_CONFIG" --version | sed 's/^[^0-9]*\([0-9]*\).*/\1/')-pgtap"
choose_user
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
make_scratch sentdm-check
build_private_server
build_failpoint_server
PG_PERL=$(dirname "$("$PG_CONFIG" --pgxs)")/../../src/test/perl
PG_REGRESS=$(dirname "$("$PG_CONFIG" --pgxs)")/../../src/test/regress/pg_regress
for stage in $STAGES; do
	run_stage "$stage"
done
# Once more where it is looked for, and where a log that is cut still has it.
[[ ! -s $SCRATCH/failures ]] || cat "$SCRATCH/failures"
printf '\n%d passed, %d failed\n' $(($(wc -w <<<"$wanted") - ${#failed[@]})) "${#failed[@]}"
((${#failed[@]} == 0))
