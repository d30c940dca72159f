#!/usr/bin/env bash
# ensure.sh PACKAGE=WHAT-NEEDS-IT...
#
# Makes sure of Debian packages. Where they are missing and this is root on a
# machine with apt they are installed, without starting or enabling any service
# they bring. Otherwise each missing one is named, with what will be skipped,
# in a line that starts with SKIP, which is what .ci/run collects.
#
#	tools/ensure.sh 'mosquitto-clients=the end-to-end tests' 'gcc=the race detector'
#
# Quiet when all is present. A package that cannot be had is not an error: the
# exit status is 0, and the tests that need it say so again where they skip.
set -u
here=$(cd "$(dirname "$0")" && pwd)

# present PACKAGE: whether what the package is for works, wherever it came from.
present() {
	case $1 in
	mosquitto) [ -x /usr/sbin/mosquitto ] || command -v mosquitto >/dev/null ;;
	mosquitto-clients) command -v mosquitto_sub >/dev/null && command -v mosquitto_pub >/dev/null ;;
	# The module belongs to Debian's interpreter: a pyenv or conda python3
	# earlier in PATH does not see it.
	python3-pymodbus) /usr/bin/python3 -c 'import pymodbus' 2>/dev/null ;;
	iproute2) command -v ip >/dev/null && command -v ss >/dev/null ;;
	containerd | runc) command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] ;;
	containernetworking-plugins) [ -x /usr/lib/cni/bridge ] ;;
	gcc) command -v "${CC:-gcc}" >/dev/null ;;
	libc6-dev) [ -e /usr/include/stdio.h ] ;;
	git) command -v git >/dev/null ;;
	*) [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ] ;;
	esac
}

missing=()
needs=()
for argument; do
	package=${argument%%=*}
	if [ "$package" = "$argument" ]; then
		echo "usage: ensure.sh PACKAGE=WHAT-NEEDS-IT..., got '$argument'" >&2
		exit 2
	fi
	present "$package" && continue
	missing+=("$package")
	needs+=("${argument#*=}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

# skip REASON: one line for each package that is still missing.
skip() {
	for i in "${!missing[@]}"; do
		present "${missing[$i]}" && continue
		echo "SKIP ${needs[$i]}: ${missing[$i]} is missing ($1)"
	done
}

if ! command -v apt-get >/dev/null; then
	skip "no apt-get on this machine: install its equivalent by hand"
	exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
	skip "not root; install it with: sudo apt-get install ${missing[*]}"
	exit 0
fi

export DEBIAN_FRONTEND=noninteractive
# apt MESSAGE ARGUMENT...: apt-get under a progress line, its output in $log.
apt() {
	local message=$1
	shift
	"$here/progress.sh" "$message" apt-get -q -y -o DPkg::Lock::Timeout=120 "$@" >"$log"
}

# Debian starts a service as soon as its package is unpacked, unless a
# policy-rc.d says no (see invoke-rc.d(8)). Ours stands only while apt runs.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
	trap 'rm -f $policy' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	printf '#!/bin/sh\nexit 101\n' >$policy
	chmod 755 $policy
fi

log=$(mktemp) || exit 1
install() { apt "installing ${missing[*]}" install --no-install-recommends "${missing[@]}"; }
update() { apt "refreshing apt's package lists" update; }

# The lists are fetched only where the machine does not know the packages yet,
# or knows versions that the mirror has replaced since.
known=yes
for package in "${missing[@]}"; do
	apt-cache policy "$package" 2>/dev/null | grep -q 'Candidate: [^(]' || known=
done
if [ -n "$known" ]; then
	install || { update && install; }
else
	update && install
fi
status=$?

if [ $status -ne 0 ]; then
	reason=$(grep -E '^(E|Err)[: ]' "$log" | tail -n 1)
	skip "apt-get failed: ${reason:-exit status $status}"
else
	echo "installed ${missing[*]}"
	for package in "${missing[@]}"; do
		# Wanted as a program, not as a service at the next boot.
		case $package in
		mosquitto | containerd)
			[ -d /run/systemd/system ] &&
				systemctl disable --quiet --now "$package.service" &&
				echo "$package.service is disabled: only the program is needed"
			;;
		esac
	done
	skip "apt-get installed it, yet it does not work"
fi
rm -f "$log"
exit 0
