#!/usr/bin/env bash
# Build the Debian packages into a directory, for the server of pg_config ($PG_CONFIG):
#
#	packaging/build-deb.sh DIRECTORY
#
# Works on a copy of the sources, because Debian wants its files in debian/.
set -eu
sources=$(cd "$(dirname "$0")/.." && pwd)
packages=$(cd "$1" && pwd)
version=$("${PG_CONFIG:-pg_config}" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

mkdir "$scratch/sentdm"
tar -C "$sources" -cf - --exclude=.git --exclude='*.o' --exclude='*.bc' --exclude='*.so' --exclude=./build \
	--exclude=./tmp_check . | tar -C "$scratch/sentdm" -xf -
cd "$scratch/sentdm"
cp -r packaging/debian debian
sed "s/PGVERSION/$version/g" debian/control.in >debian/control
dpkg-buildpackage --build=binary --no-sign
cp ../*.deb "$packages/"
