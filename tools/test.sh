#!/usr/bin/env bash
# test.sh NAME [-C DIR] GO-TEST-ARGUMENT...
#
# Runs go test under gotestsum (pinned in tools/lint/go.mod) and keeps the
# events of go test -json in bin/test/NAME.json, which is what .ci/run counts.
# It shows a line per package (FAIRLEAD_TEST_FORMAT=testname: per test); the
# output of a failed test appears where it fails and again at the end.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)

if [ $# -lt 2 ]; then
	echo "usage: test.sh NAME [-C DIR] GO-TEST-ARGUMENT..." >&2
	exit 2
fi
name=$1
shift
if [ "$1" = -C ]; then
	cd "$root/$2" || exit 2
	shift 2
else
	cd "$root" || exit 2
fi

# The race detector is the one thing here that needs cgo, and so a C compiler.
arguments=()
for argument; do
	if [ "$argument" = -race ] && ! command -v "${CC:-gcc}" >/dev/null; then
		echo "SKIP the race detector: no C compiler (install gcc and libc6-dev)"
		continue
	fi
	arguments+=("$argument")
done

events=$root/bin/test/$name.json
mkdir -p "$root/bin/test"
rm -f "$events"

# The tool is built here rather than by `go tool` below, because that one would
# take the test's own flags (GOFLAGS, CGO_ENABLED) for the tool's.
gotestsum=$("$root/tools/progress.sh" "building gotestsum" \
	env -u GOFLAGS -u CGO_ENABLED go tool -modfile="$root/tools/lint/go.mod" -n gotestsum) || {
	printf '%s\n' "$gotestsum"
	exit 1
}
exec "$gotestsum" \
	--format "${FAIRLEAD_TEST_FORMAT:-pkgname}" --format-hide-empty-pkg --format-icons text \
	--hide-summary=skipped --jsonfile "$events" -- "${arguments[@]}"
