# cleanup.sh VERB DIR BRIDGE CGROUP
#
# Ends what a runtime of this package has left on the machine. The verbs:
#
#	kill      kills shims and containers with -9, as a power cut would
#	powercut  kill, and forgets what a machine does not keep over a reboot:
#	          mounts, network namespaces, cgroups, firewall rules, the state folder
#	watch     waits until its standard input ends, which is when the owner stops
#	          the runtime or dies, then powercut, and removes the bridge and DIR
set -u
verb=$1 dir=$2 bridge=$3 cgroup=$4
trap '' INT TERM HUP

# ours PATTERN: the processes below DIR's containerd whose command matches.
ours() {
	grep -lsaF -- "$dir/" /proc/[0-9]*/cmdline | while IFS=/ read -r _ _ pid _; do
		case $(cat "/proc/$pid/cmdline" 2>/dev/null | tr '\0' ' ') in
		*cleanup.sh*) ;;
		$1) echo "$pid" ;;
		esac
	done
}

# inside: the processes whose root is a snapshot of this runtime.
inside() {
	grep -lsE "^[0-9]+ [0-9]+ [^ ]+ ([^ ]*$dir/[^ ]* / |[^ ]+ / .*$dir/)" /proc/[0-9]*/mountinfo |
		while IFS=/ read -r _ _ pid _; do echo "$pid"; done
}

end() {
	round=0
	while [ $round -lt 100 ]; do
		pids=$(ours '*containerd-shim*'; ours '*runc *'; inside)
		[ -z "$pids" ] && return
		# shellcheck disable=SC2086
		kill -9 $pids 2>/dev/null
		round=$((round + 1))
		sleep 0.02
	done
	echo "testruntime: these processes outlived kill -9:" $pids >&2
}

unmount() {
	# The newest first: they lie upon the older ones.
	awk -v d="$1/" 'index($5, d) == 1 { print $5 }' /proc/self/mountinfo | tac | while read -r m; do
		umount -l "$m" 2>/dev/null
	done
}

forget() {
	tasks=$dir/state/io.containerd.runtime.v2.task/k8s.io
	for task in "$tasks"/*; do
		[ -e "$task" ] || continue
		socket=$(cat "$task/address" 2>/dev/null)
		[ -n "$socket" ] && rm -f "${socket#unix://}"
		for root in /sys/fs/cgroup /sys/fs/cgroup/*; do
			[ -d "$root/k8s.io/${task##*/}" ] && find "$root/k8s.io/${task##*/}" -depth -type d -exec rmdir {} + 2>/dev/null
		done
	done
	for root in /sys/fs/cgroup /sys/fs/cgroup/*; do
		[ -d "$root$cgroup" ] && find "$root$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null
	done
	unmount "$dir"
	rm -rf "$dir/state" "$dir/runc" "$dir/netns"
	rm -f /var/lib/cni/results/"$bridge"-* 2>/dev/null
	if command -v iptables >/dev/null; then
		# Host ports: the plugin's jumps and chains carry the network's name.
		iptables -w -t nat -S 2>/dev/null | grep -F "\"$bridge\\\"" | grep '^-A' | sed 's/^-A/-D/' | while read -r rule; do
			chain=$(echo "$rule" | sed -n 's/.* -j \(CNI-[A-Z]*-[0-9a-f]*\).*/\1/p')
			eval "iptables -w -t nat $rule" 2>/dev/null
			[ -n "$chain" ] && iptables -w -t nat -F "$chain" 2>/dev/null && iptables -w -t nat -X "$chain" 2>/dev/null
		done
	fi
}

case $verb in
kill) end ;;
powercut)
	end
	forget
	;;
watch)
	cat >/dev/null
	for pid in $(ours '*containerd --config*'); do
		kill -9 "$pid" 2>/dev/null
	done
	end
	forget
	busybox ip link del "$bridge" 2>/dev/null
	rm -rf "$dir"
	;;
esac
exit 0
