#!/usr/bin/env bash
# progress.sh MESSAGE COMMAND [ARGUMENT...]
#
# Runs a command that is silent for long and shows that it is alive: after two
# seconds the message with the elapsed time, on a terminal one line that
# rewrites itself, elsewhere a line every 60 s. A command that ends within two
# seconds shows nothing.
#
# What the command prints (both streams) appears once it has ended, without
# Go's "go: downloading" lines unless it failed. The exit status is the
# command's. Progress goes to stderr, the command's output to stdout.
set -u

if [ $# -lt 2 ]; then
	echo "usage: progress.sh MESSAGE COMMAND [ARGUMENT...]" >&2
	exit 2
fi
message=$1
shift

output=$(mktemp "${TMPDIR:-/tmp}/fairlead-progress.XXXXXX") || exit 1
ticker=
# The command stays in the foreground, so that Ctrl-C reaches it as usual; the
# ticker is ours to stop, and looks for itself whether we are still there.
cleanup() {
	[ "$BASHPID" = $$ ] || return # a ticker stopped before it dropped our traps
	[ -n "$ticker" ] && kill "$ticker" 2>/dev/null && wait "$ticker" 2>/dev/null
	rm -f "$output"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

terminal=
[ -t 2 ] && [ "${TERM:-dumb}" != dumb ] && terminal=yes

elapsed() {
	local s=$((SECONDS - start))
	if [ $s -ge 60 ]; then printf '%dm%02ds' $((s / 60)) $((s % 60)); else printf '%ds' $s; fi
}

tick() {
	# The last thing the command said is worth more than a spinner.
	local columns line last next=60
	while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
		[ $((SECONDS - start)) -lt 2 ] && continue
		if [ -n "$terminal" ]; then
			columns=$(stty size <&2 2>/dev/null | cut -d' ' -f2)
			last=$(tail -n 1 "$output" 2>/dev/null | tr -d '\000-\037')
			[ "${columns:-0}" -gt 20 ] || columns=80
			line="$message $(elapsed)${last:+  $last}"
			printf '\r\033[K%s' "${line:0:$((columns - 1))}" >&2
		elif [ -z "${told:-}" ]; then
			told=yes
			printf '%s\n' "$message" >&2
		elif [ $((SECONDS - start)) -ge $next ]; then
			next=$((next + 60))
			printf '%s %s\n' "$message" "$(elapsed)" >&2
		fi
	done
}

start=$SECONDS
tick &
ticker=$!

"$@" >"$output" 2>&1 </dev/null
status=$?

kill "$ticker" 2>/dev/null
wait "$ticker" 2>/dev/null
ticker=
[ -n "$terminal" ] && printf '\r\033[K' >&2
if [ $((SECONDS - start)) -ge 2 ]; then
	if [ $status -eq 0 ]; then
		printf '%s done in %s\n' "$message" "$(elapsed)" >&2
	else
		printf '%s FAILED after %s (exit status %d)\n' "$message" "$(elapsed)" $status >&2
	fi
fi
if [ $status -eq 0 ]; then
	grep -v '^go: downloading ' "$output"
else
	cat "$output"
fi
exit $status
