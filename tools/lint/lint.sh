#!/usr/bin/env bash
# lint.sh: golangci-lint and govulncheck, both pinned in tools/lint/go.mod.
# lint.sh fmt: rewrites the sources in the form that the linter asks for.
set -u
cd "$(dirname "$0")/../.." || exit 1

# path NAME: builds the tool if need be and prints where it is. `go tool` itself
# would pass our flags below on to the build of the tool.
path() {
	go tool -modfile=tools/lint/go.mod -n "$1"
}
export -f path
golangci=$(tools/progress.sh "building golangci-lint (about 4 minutes the first time)" bash -c 'path golangci-lint') &&
	govulncheck=$(tools/progress.sh "building govulncheck" bash -c 'path govulncheck') || {
	printf '%s\n' "${golangci:-}" "${govulncheck:-}"
	exit 1
}

# The flags of the binaries, so that lint and build share one set of compiled
# packages.
export CGO_ENABLED=0 GOFLAGS="${GOFLAGS:-} -trimpath"

if [ "${1:-}" = fmt ]; then
	exec "$golangci" fmt ./... tools/devcluster
fi

status=0
tools/progress.sh "golangci-lint" "$golangci" run ./... || status=1

# The control plane's own module: format only. Type-checking it would analyse
# all of Kubernetes from source, for a tool that no product links.
tools/progress.sh "golangci-lint fmt tools/devcluster" "$golangci" fmt --diff tools/devcluster || status=1

# govulncheck fails on a finding (exit status 3) and on anything else that goes
# wrong, but for one case: a machine that cannot reach the database.
vulnerabilities() {
	local found failed error
	found=$("$govulncheck" ./... 2>&1)
	failed=$?
	if [ $failed -ne 0 ] && error=$(grep -m 1 '^govulncheck: fetching vulnerabilities: ' <<<"$found"); then
		echo "SKIP govulncheck: vulnerability database not reachable: ${error#govulncheck: fetching vulnerabilities: }"
		return 0
	fi
	printf '%s\n' "$found"
	return $failed
}
export -f vulnerabilities
export govulncheck
tools/progress.sh "govulncheck" bash -c vulnerabilities || status=1
exit $status
