// Package node knows the host: what it is, what it offers to pods, how it is
// reached and whether it is well. Its words go to fl/<node>/reported/node.
//
//	n := node.Describe(version)
//	offer := node.Offer{Data: dir, Reserved: …, Devices: devices}
//	capacity, allocatable, err := offer.Resources()
package node

import (
	"bufio"
	"net/netip"
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
		Agent: agent, OS: runtime.GOOS, Arch: runtime.GOARCH, CPUs: CPUs(),
		MachineID:  first("/etc/machine-id", "/var/lib/dbus/machine-id"),
		BootID:     first("/proc/sys/kernel/random/boot_id"),
		Kernel:     first("/proc/sys/kernel/osrelease"),
		OSImage:    osRelease("PRETTY_NAME"),
		SystemUUID: SystemUUID(),
	}
	n.Hostname, _ = os.Hostname()
	var si syscall.Sysinfo_t
	if syscall.Sysinfo(&si) == nil {
		n.MemoryBytes = uint64(si.Totalram) * uint64(si.Unit) //nolint:unconvert // a uint32 on 32-bit ARM
		n.SwapBytes = uint64(si.Totalswap) * uint64(si.Unit)  //nolint:unconvert // a uint32 on 32-bit ARM
	}
	if a := address(netip.Addr.Is4); a.IsValid() {
		n.InternalAddress = a.String()
	} else if a := address(netip.Addr.Is6); a.IsValid() {
		n.InternalAddress = a.String()
	}
	return n
}

// CPUs is the number of the host's logical CPUs that are online; those that the
// agent itself may use are perhaps fewer.
func CPUs() int {
	n := 0
	for r := range strings.SplitSeq(first("/sys/devices/system/cpu/online"), ",") { // 0-3,6
		a, b, ok := strings.Cut(r, "-")
		if !ok {
			b = a
		}
		lo, err1 := strconv.Atoi(a)
		hi, err2 := strconv.Atoi(b)
		if err1 != nil || err2 != nil || hi < lo {
			return runtime.NumCPU()
		}
		n += hi - lo + 1
	}
	return n
}

// SystemUUID is the machine's, from its firmware; the machine id where that has none.
func SystemUUID() string {
	return first("/sys/class/dmi/id/product_uuid", "/proc/device-tree/system-id", "/proc/device-tree/vm,uuid", "/etc/machine-id")
}

// KernelVersion reads the first two numbers of a release such as 6.18.44-v7; 0.0 if
// it has none.
func KernelVersion(release string) (major, minor int) {
	a, rest, _ := strings.Cut(release, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err := strconv.Atoi(a)
	if err != nil {
		return 0, 0
	}
	if minor, err = strconv.Atoi(rest[:end]); err != nil {
		return 0, 0
	}
	return major, minor
}

// AppArmor tells whether the kernel confines with AppArmor.
func AppArmor() bool {
	return strings.HasPrefix(first("/sys/module/apparmor/parameters/enabled"), "Y")
}

func first(paths ...string) string {
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil {
			return strings.Trim(string(b), " \t\n\x00") // a device tree ends strings with 0
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
