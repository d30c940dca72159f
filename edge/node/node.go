// Package node tells the cloud what the edge node is: the payload of
// fl/<node>/reported/node, read from the host.
package node

import (
	"bufio"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

// Describe reads the host. What cannot be read stays empty: a node without a
// machine id is still a node.
func Describe(agent string) payload.Node {
	n := payload.Node{
		Agent: agent, OS: runtime.GOOS, Arch: runtime.GOARCH, CPUs: runtime.NumCPU(),
		MachineID: first("/etc/machine-id", "/var/lib/dbus/machine-id"),
		BootID:    first("/proc/sys/kernel/random/boot_id"),
		Kernel:    first("/proc/sys/kernel/osrelease"),
		OSImage:   osRelease("PRETTY_NAME"),
	}
	n.Hostname, _ = os.Hostname()
	var si syscall.Sysinfo_t
	if syscall.Sysinfo(&si) == nil {
		n.MemoryBytes = uint64(si.Totalram) * uint64(si.Unit) //nolint:unconvert // a uint32 on 32-bit ARM
	}
	n.InternalAddress = address()
	return n
}

func first(paths ...string) string {
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil {
			return strings.TrimSpace(string(b))
		}
	}
	return ""
}

func osRelease(key string) string {
	f, err := os.Open("/etc/os-release")
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		if v, ok := strings.CutPrefix(s.Text(), key+"="); ok {
			if u, err := strconv.Unquote(v); err == nil {
				return u
			}
			return strings.Trim(v, "'")
		}
	}
	return ""
}

// address is the first global address of an interface that is up.
func address() string {
	ifs, err := net.Interfaces()
	if err != nil {
		return ""
	}
	for _, i := range ifs {
		if i.Flags&(net.FlagUp|net.FlagLoopback) != net.FlagUp {
			continue
		}
		as, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range as {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				return n.IP.String()
			}
		}
	}
	return ""
}
