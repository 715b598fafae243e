# What test/demo.sh and test/check.sh share: get what is missing, pick a user
# that PostgreSQL accepts, and make a server of our own that leaves no trace in
# the system's.  To be sourced by bash; nothing runs until it is called.
#
#   die TEXT...               say so and end with status 1
#   wait_until SECONDS CMD... run CMD until it succeeds; false when time is up
#   find_pg_config            set PG_CONFIG to a server that can be built for
#   install_missing [PKG...]  what the build needs, by apt, and the packages named
#   choose_user               set RUN_AS: who runs the server; never root
#   as_user CMD...            run CMD as that user, with an environment of its own;
#                             "${AS_USER[@]}" CMD... & leaves CMD's pid in $!
#   make_scratch NAME         set SCRATCH: a new directory, owned by that user,
#                             who has it as home; the caller removes it
#   fetch_node_modules PKG... set NODE_MODULES: npm packages, under SCRATCH; false:
#                             they cannot be had.  Tests and measurements only
#   build_private_server      set PG_BIN: a copy of the server with our build in
#                             it, under SCRATCH; our sources are in SCRATCH/src
#   build_failpoint_server    set FAILPOINT_BIN: the same server with a library
#                             that tests can make fail

SOURCE_TREE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
	printf '%s: %s\n' "$(basename "$0")" "$*" >&2
	exit 1
}

wait_until() {
	local deadline=$((SECONDS + $1))
	shift
	until "$@"; do
		((SECONDS < deadline)) || return 1
		sleep 0.05
	done
}

# A server of version 15 or later, with the files that extensions are built with.
is_buildable() {
	local version
	version=$("$1" --version 2>/dev/null) || return 1
	version=${version#PostgreSQL }
	# Debian's client has the makefiles, but not the headers.
	[[ ${version%%[!0-9]*} -ge 15 && -f $("$1" --pgxs) && -f $("$1" --includedir-server)/postgres.h &&
		-x $("$1" --bindir)/postgres ]]
}

# The one that PG_CONFIG names, or the newest there is.
find_pg_config() {
	local candidate
	if [[ ${PG_CONFIG:-} ]]; then
		is_buildable "$PG_CONFIG" || die "PG_CONFIG names no PostgreSQL 15 or later with server and headers"
		return
	fi
	for candidate in $(ls -d /usr/lib/postgresql/*/bin/pg_config 2>/dev/null | sort -rV) pg_config; do
		if is_buildable "$candidate"; then
			PG_CONFIG=$candidate
			return
		fi
	done
	return 1
}

as_root() {
	if ((EUID == 0)); then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		die "installing packages needs root, or sudo"
	fi
}

has_header() {
	echo "#include <$1>" | gcc -E -x c - >/dev/null 2>&1
}

# Packages for what is not there, however it got there.
missing_packages() {
	find_pg_config || echo postgresql-15 postgresql-server-dev-15
	command -v gcc >/dev/null && has_header stdio.h || echo gcc libc6-dev
	command -v make >/dev/null || echo make
	command -v python3 >/dev/null || echo python3
	has_header curl/curl.h || echo libcurl4-openssl-dev
	has_header openssl/hmac.h || echo libssl-dev
}

# The server's package makes a cluster and starts it, and others with it: not
# here.  A process of its own runs this as root; it puts back what it changes, at
# its end, when local variables would be gone.
apt_install() {
	export DEBIAN_FRONTEND=noninteractive
	defaults=/etc/postgresql-common/createcluster.conf
	policy=/usr/sbin/policy-rc.d
	updated=

	# Nor does a server that is there become a newer one.
	get() {
		local install="apt-get install -y -q --no-install-recommends --no-upgrade"
		$install "$@" && return
		[[ ! $updated ]] || return 1
		updated=yes
		apt-get update -q && $install "$@"
	}
	put_back() {
		[[ ! $policy ]] || rm -f "$policy"
		[[ ! -f $defaults.saved ]] || mv "$defaults.saved" "$defaults"
	}
	trap put_back EXIT
	trap 'exit 1' HUP INT TERM
	if [[ -e $policy ]]; then
		policy=
	else
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	if [[ " $* " == *" postgresql-15 "* ]]; then
		get postgresql-common || return 1
		cp -p "$defaults" "$defaults.saved"
		echo 'create_main_cluster = false' >>"$defaults"
	fi
	get "$@"
}

install_missing() {
	local package log
	local -a wanted
	wanted=($(missing_packages))
	for package in "$@"; do
		dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || wanted+=("$package")
	done
	((${#wanted[@]})) || return 0
	command -v apt-get >/dev/null || die "missing (Debian's names): ${wanted[*]}"
	echo "Installing ${wanted[*]}"
	log=$(as_root bash -c "$(declare -f apt_install); apt_install \"\$@\"" apt_install "${wanted[@]}" 2>&1 </dev/null) || {
		printf '%s\n' "$log" >&2
		die "could not install ${wanted[*]}"
	}
}

choose_user() {
	AS_USER=()
	RUN_AS=$(id -un)
	if ((EUID == 0)); then
		for RUN_AS in postgres nobody ''; do
			id -u "$RUN_AS" >/dev/null 2>&1 && break
		done
		[[ $RUN_AS ]] || die "found no user to run the server as: start this as an ordinary user"
		AS_USER=(setpriv "--reuid=$RUN_AS" "--regid=$(id -gn "$RUN_AS")" --init-groups)
	fi
	# Nothing of the caller's settings reaches the server or its clients.
	AS_USER+=(env -i "PATH=$PATH" LC_ALL=C.UTF-8)
}

as_user() {
	"${AS_USER[@]}" "$@"
}

make_scratch() {
	SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/$1.XXXXXX")
	chmod 755 "$SCRATCH"
	((EUID != 0)) || chown "$RUN_AS:" "$SCRATCH"
	AS_USER+=("HOME=$SCRATCH" "TMPDIR=$SCRATCH")
	as_user test -w "$SCRATCH" || die "user $RUN_AS cannot write to $SCRATCH: set TMPDIR to a directory for all"
	((${#SCRATCH} < 80)) || die "the name of $SCRATCH is too long for a socket: set TMPDIR to a shorter one"
}

# As the caller, who knows the way to the registry: proxy, certificates, mirror.
fetch_node_modules() {
	NODE_MODULES=$SCRATCH/node/node_modules
	command -v npm >/dev/null || install_missing nodejs npm
	mkdir -p "$SCRATCH/node"
	# Node has authorities of its own; those of the system are there for a reason.
	[[ ! -r /etc/ssl/certs/ca-certificates.crt ]] ||
		export NODE_EXTRA_CA_CERTS=${NODE_EXTRA_CA_CERTS:-/etc/ssl/certs/ca-certificates.crt}
	npm install --prefix "$SCRATCH/node" --cache "$SCRATCH/node/cache" --no-audit --no-fund --no-update-notifier \
		"$@" >"$SCRATCH/npm.log" 2>&1 </dev/null || {
		tail -n 20 "$SCRATCH/npm.log" >&2
		return 1
	}
	chmod -R a+rX "$SCRATCH/node"
}

# The sources as they are, without what an earlier build left there.
copy_sources() {
	mkdir "$SCRATCH/src"
	tar -C "$SOURCE_TREE" -cf - --exclude=.git --exclude='*.o' --exclude='*.bc' --exclude='*.so' \
		--exclude=./build --exclude=./results --exclude=./tmp_check --exclude=./log . |
		tar -C "$SCRATCH/src" -xf - --no-same-owner
	((EUID != 0)) || chown -R "$RUN_AS:" "$SCRATCH/src"
}

# PostgreSQL finds its directories relative to its programs.  So copies of the
# programs, in a tree of the same shape whose other files are links into the
# original, make a server that takes our files too.
copy_server() {
	local bin share lib
	bin=$("$PG_CONFIG" --bindir) share=$("$PG_CONFIG" --sharedir) lib=$("$PG_CONFIG" --pkglibdir)
	PG_BIN=$SCRATCH/server$bin
	as_user mkdir -p "$PG_BIN" "$SCRATCH/server$share" "$SCRATCH/server$lib"
	as_user cp -rs "$share/." "$SCRATCH/server$share"
	as_user cp -rs "$lib/." "$SCRATCH/server$lib"
	as_user cp "$bin"/* "$PG_BIN"
	as_user find "$SCRATCH/server" -name 'sentdm*' -type l -delete
}

build_private_server() {
	copy_sources
	copy_server
	as_user make -s -j "$(nproc)" -C "$SCRATCH/src" PG_CONFIG="$PG_CONFIG" with_llvm=no \
		DESTDIR="$SCRATCH/server" all install >"$SCRATCH/build.log" 2>&1 </dev/null || {
		cat "$SCRATCH/build.log" >&2
		die "the build failed"
	}
}

# Links to the files of the first one, but for the library.
build_failpoint_server() {
	local library
	library=$("$PG_CONFIG" --pkglibdir)/sentdm.so
	FAILPOINT_BIN=$SCRATCH/failpoints$("$PG_CONFIG" --bindir)
	as_user make -s -C "$SCRATCH/src" PG_CONFIG="$PG_CONFIG" with_llvm=no failpoints >"$SCRATCH/build.log" 2>&1 </dev/null || {
		cat "$SCRATCH/build.log" >&2
		die "the build with failpoints failed"
	}
	as_user cp -al "$SCRATCH/server" "$SCRATCH/failpoints"
	as_user cp --remove-destination "$SCRATCH/src/build/failpoints/sentdm.so" "$SCRATCH/failpoints$library"
}
