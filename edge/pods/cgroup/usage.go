package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Usage is what the processes of a cgroup and of those below it use. What the host
// has no controller for is 0.
type Usage struct {
	// Memory is the working set in bytes: MemoryUsage less the page cache that was not
	// used lately. Evictions go by it.
	Memory int64
	// MemoryUsage is all that is charged, in bytes.
	MemoryUsage int64
	// CPU is the time used since the cgroup was made, in ns.
	CPU int64
	// PIDs are processes and threads.
	PIDs int64
}

// PodUsage reads a pod's usage. An error wraps fs.ErrNotExist where the pod has no cgroup.
func (t *Tree) PodUsage(uid types.UID, qos corev1.PodQOSClass) (Usage, error) {
	if err := checkUID(uid); err != nil {
		return Usage{}, err
	}
	return t.usage(t.pod(uid, qos))
}

// PodsUsage reads what all pods use together.
func (t *Tree) PodsUsage() (Usage, error) { return t.usage(t.kubepods()) }

// NodeUsage reads what the whole host uses; only its memory is told.
func (t *Tree) NodeUsage() (Usage, error) {
	h := t.at("memory")
	if h == nil || t.version == 2 {
		// Version 2 has no usage at its root.
		return t.hostMemory(h)
	}
	return memory(h.mount, t.version)
}

func (t *Tree) usage(n name) (u Usage, err error) {
	var errs []error
	if dir, ok := t.dir("memory", n); ok {
		u, err = memory(dir, t.version)
		errs = append(errs, err)
	}
	if dir, ok := t.dir("pids", n); ok {
		u.PIDs, err = number(filepath.Join(dir, "pids.current"))
		errs = append(errs, err)
	}
	if t.version == 2 {
		if dir, ok := t.dir("cpu", n); ok {
			u.CPU, err = field(filepath.Join(dir, "cpu.stat"), "usage_usec")
			u.CPU *= 1000
			errs = append(errs, err)
		}
	} else if dir, ok := t.dir("cpuacct", n); ok {
		u.CPU, err = number(filepath.Join(dir, "cpuacct.usage"))
		errs = append(errs, err)
	}
	return u, errors.Join(errs...)
}

func memory(dir string, version int) (u Usage, err error) {
	usage, inactive := "memory.usage_in_bytes", "total_inactive_file"
	if version == 2 {
		usage, inactive = "memory.current", "inactive_file"
	}
	if u.MemoryUsage, err = number(filepath.Join(dir, usage)); err != nil {
		return u, err
	}
	cold, err := field(filepath.Join(dir, "memory.stat"), inactive)
	u.Memory = max(u.MemoryUsage-cold, 0)
	return u, err
}

// hostMemory is the host's usage by /proc/meminfo.
func (t *Tree) hostMemory(h *hierarchy) (u Usage, err error) {
	var m [3]int64
	for i, key := range []string{"MemTotal:", "MemFree:", "Inactive(file):"} {
		if m[i], err = field("/proc/meminfo", key); err != nil {
			return u, err
		}
		m[i] <<= 10
	}
	if h != nil {
		if cold, err := field(filepath.Join(h.mount, "memory.stat"), "inactive_file"); err == nil {
			m[2] = cold
		}
	}
	u.MemoryUsage = m[0] - m[1]
	u.Memory = max(u.MemoryUsage-m[2], 0)
	return u, nil
}

func number(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	return n, nil
}

// field reads the number after a key of a file of "key number" lines.
func field(file, key string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) >= 2 && f[0] == key {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", file, err)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, key)
}

// MemoryFolders are the folders of the memory controller for the whole host and
// for all pods; empty where there is none. Version 1 tells by an eventfd when the
// memory.usage_in_bytes of one crosses a value.
func (t *Tree) MemoryFolders() (host, pods string) {
	h := t.at("memory")
	if h == nil {
		return "", ""
	}
	pods, _ = t.dir("memory", t.kubepods())
	return h.mount, pods
}

// Swap tells whether the kernel accounts swap to cgroups, so that containers can be
// kept from it. On version 2 it is known once Setup is done.
func (t *Tree) Swap() bool {
	h := t.at("memory")
	if h == nil {
		return false
	}
	if t.version == 1 {
		return exists(filepath.Join(h.mount, "memory.memsw.limit_in_bytes"))
	}
	return exists(filepath.Join(h.mount, t.Path(), "memory.swap.max"))
}
