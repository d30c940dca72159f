package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// resources are a cgroup's values in the units of version 1. What is 0 or nil
// stays as it is.
type resources struct {
	// Shares is the weight against siblings, 2 to 262144.
	Shares uint64
	// Quota is the time in µs that may be used per Period; -1 is no bound.
	Quota  int64
	Period uint64
	// Memory is the limit in bytes; -1 is none.
	Memory int64
	// PIDs bounds the processes and threads; -1 is no bound.
	PIDs int64
	// HugePages bounds huge pages in bytes, by size in the kernel's spelling, such as 2MB.
	HugePages map[string]uint64
}

const (
	minShares = 2
	maxShares = 262144
)

// weight is what version 2 has in place of shares, as the stock kubelet maps it.
func weight(shares uint64) uint64 {
	s := min(max(shares, minShares), maxShares)
	return 1 + (s-2)*9999/262142
}

// ofPod gives a pod's values. Huge pages of sizes that it does not ask for it gets none.
func ofPod(p spec.PodCgroup) resources {
	r := resources{Shares: p.CPUShares, HugePages: map[string]uint64{}}
	if p.CPUQuota != nil {
		r.Quota = *p.CPUQuota
	}
	if p.CPUPeriod != nil {
		r.Period = *p.CPUPeriod
	}
	if p.Memory != nil {
		r.Memory = *p.Memory
	}
	if p.PIDs != nil {
		r.PIDs = *p.PIDs
	}
	for _, s := range hugePageSizes() {
		r.HugePages[s] = 0
	}
	for size, n := range p.HugePages {
		r.HugePages[pageSize(uint64(size))] = uint64(n)
	}
	return r
}

type value struct{ controller, file, value string }

// values gives what to write, in this order.
func (r resources) values(version int) []value {
	var vs []value
	add := func(c, f, v string) { vs = append(vs, value{c, f, v}) }
	limit := func(n int64) string {
		if n < 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	if version == 2 {
		if r.Shares != 0 {
			add("cpu", "cpu.weight", strconv.FormatUint(weight(r.Shares), 10))
		}
		if r.Quota != 0 {
			add("cpu", "cpu.max", limit(r.Quota)+" "+strconv.FormatUint(r.period(), 10))
		}
		if r.Memory != 0 {
			add("memory", "memory.max", limit(r.Memory))
		}
		if r.PIDs != 0 {
			add("pids", "pids.max", limit(r.PIDs))
		}
		for size, n := range r.HugePages {
			add("hugetlb", "hugetlb."+size+".max", strconv.FormatUint(n, 10))
		}
		return vs
	}
	if r.Shares != 0 {
		add("cpu", "cpu.shares", strconv.FormatUint(r.Shares, 10))
	}
	if r.Quota != 0 {
		// The old quota may not fit the new period, so that it goes first.
		add("cpu", "cpu.cfs_quota_us", "-1")
		add("cpu", "cpu.cfs_period_us", strconv.FormatUint(r.period(), 10))
		if r.Quota > 0 {
			add("cpu", "cpu.cfs_quota_us", strconv.FormatInt(r.Quota, 10))
		}
	}
	if r.Memory != 0 {
		add("memory", "memory.limit_in_bytes", strconv.FormatInt(r.Memory, 10))
	}
	if r.PIDs != 0 {
		add("pids", "pids.max", limit(r.PIDs))
	}
	for size, n := range r.HugePages {
		add("hugetlb", "hugetlb."+size+".limit_in_bytes", strconv.FormatUint(n, 10))
	}
	return vs
}

func (r resources) period() uint64 {
	if r.Period == 0 {
		return 100_000
	}
	return r.Period
}

// write sets the values of a cgroup. What the host has no controller for is left
// out: Open has told of it.
func (t *Tree) write(ctx context.Context, n name, r resources) error {
	var errs []error
	if t.units != nil {
		errs = append(errs, t.units.set(ctx, n, r))
	}
	for _, v := range r.values(t.version) {
		dir, ok := t.dir(v.controller, n)
		if !ok {
			continue
		}
		err := writeFile(filepath.Join(dir, v.file), v.value)
		if errors.Is(err, syscall.EBUSY) && v.controller == "memory" {
			use, _ := t.usage(n)
			err = fmt.Errorf("%w: %d bytes are in use", err, use.MemoryUsage)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// hugePageSizes are the kernel's, in the spelling of the cgroup files.
func hugePageSizes() []string {
	entries, err := os.ReadDir("/sys/kernel/mm/hugepages")
	if err != nil {
		return nil
	}
	var sizes []string
	for _, e := range entries {
		s, _ := strings.CutPrefix(e.Name(), "hugepages-")
		if s, ok := strings.CutSuffix(s, "kB"); ok {
			if kb, err := strconv.ParseUint(s, 10, 64); err == nil {
				sizes = append(sizes, pageSize(kb<<10))
			}
		}
	}
	return sizes
}

// pageSize spells a size as the hugetlb controller does: 64KB, 2MB, 1GB.
func pageSize(n uint64) string {
	units := []string{"B", "KB", "MB", "GB"}
	i := 0
	for ; n >= 1024 && i < len(units)-1; i++ {
		n >>= 10
	}
	return strconv.FormatUint(n, 10) + units[i]
}
