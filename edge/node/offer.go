package node

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// DefaultMaxPods is how many pods a node runs at most, as the kubelet's.
const DefaultMaxPods = 110

// Offer says what of the host pods may have.
type Offer struct {
	// MaxPods is DefaultMaxPods where it is 0.
	MaxPods int
	// Data is a folder on the file system of ephemeral storage.
	Data string
	// Reserved is kept from pods: for the system, the agent, and the hard eviction
	// thresholds (evict.Reserve).
	Reserved []corev1.ResourceList
	Devices  []Device
}

// Resources gives what the host has and what pods may have of it, as the stock
// kubelet counts. An error says what could not be read; the rest is given.
func (o Offer) Resources() (capacity, allocatable corev1.ResourceList, err error) {
	n := Describe("")
	pods := o.MaxPods
	if pods == 0 {
		pods = DefaultMaxPods
	}
	capacity = corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewMilliQuantity(int64(n.CPUs)*1000, resource.DecimalSI),
		corev1.ResourceMemory: *resource.NewQuantity(int64(n.MemoryBytes), resource.BinarySI),
		corev1.ResourcePods:   *resource.NewQuantity(int64(pods), resource.DecimalSI),
	}
	var s unix.Statfs_t
	if e := unix.Statfs(o.Data, &s); e != nil {
		err = fmt.Errorf("size of the file system of %s: %w", o.Data, e)
	} else {
		size := int64(s.Blocks) * int64(s.Bsize) //nolint:unconvert // an int32 on 32-bit ARM
		capacity[corev1.ResourceEphemeralStorage] = *resource.NewQuantity(size, resource.DecimalSI)
	}
	for _, p := range HugePages() {
		q := resource.NewQuantity(p.Size, resource.BinarySI)
		capacity[corev1.ResourceName(corev1.ResourceHugePagesPrefix+q.String())] = *resource.NewQuantity(p.Size*p.Count, resource.BinarySI)
	}
	for _, d := range o.Devices {
		q := capacity[d.Resource()]
		if d.Host() != "" {
			q.Add(*resource.NewQuantity(1, resource.DecimalSI))
		}
		capacity[d.Resource()] = q // 0 too: the resource is known, but not there
	}
	return capacity, allocate(capacity, o.Reserved), err
}

// allocate takes what is reserved off the capacity.
func allocate(capacity corev1.ResourceList, reserved []corev1.ResourceList) corev1.ResourceList {
	out := capacity.DeepCopy()
	take := func(name corev1.ResourceName, q resource.Quantity) {
		a, ok := out[name]
		if !ok {
			return
		}
		if a.Sub(q); a.Sign() < 0 {
			a.Set(0)
		}
		out[name] = a
	}
	for _, r := range reserved {
		for name, q := range r {
			take(name, q)
		}
	}
	for name, q := range capacity {
		// Memory that is set aside as huge pages is no other memory.
		if strings.HasPrefix(string(name), corev1.ResourceHugePagesPrefix) {
			take(corev1.ResourceMemory, q)
		}
	}
	return out
}

// HugePage is one size of huge pages.
type HugePage struct {
	Size  int64 // bytes
	Count int64 // pages set aside
}

// HugePages are the sizes that the kernel offers.
func HugePages() []HugePage {
	const dir = "/sys/kernel/mm/hugepages"
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var out []HugePage
	for _, e := range entries {
		kb, ok := strings.CutSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB")
		n, err := strconv.ParseInt(kb, 10, 64)
		if !ok || err != nil {
			continue
		}
		count, _ := strconv.ParseInt(first(dir+"/"+e.Name()+"/nr_hugepages"), 10, 64)
		out = append(out, HugePage{n << 10, count})
	}
	return out
}

// ParseReserved reads a reservation such as cpu=500m,memory=256Mi.
func ParseReserved(s string) (corev1.ResourceList, error) {
	r := corev1.ResourceList{}
	for part := range strings.SplitSeq(s, ",") {
		if part == "" {
			continue
		}
		name, v, ok := strings.Cut(part, "=")
		q, err := resource.ParseQuantity(v)
		if !ok || err != nil || q.Sign() < 0 {
			return nil, fmt.Errorf("reservation %q: want such as cpu=500m,memory=256Mi", part)
		}
		switch n := corev1.ResourceName(name); n {
		case corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage, "pid":
			r[n] = q
		default:
			return nil, fmt.Errorf("reservation of %q: want cpu, memory, ephemeral-storage or pid", name)
		}
	}
	return r, nil
}
