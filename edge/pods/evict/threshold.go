package evict

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Signal is what is watched, by the kubelet's names.
type Signal string

// The signals. Their values are what is left, in bytes, inodes or process IDs.
const (
	MemoryAvailable Signal = "memory.available"
	// PodsMemoryAvailable is what is left of the memory that all pods may use together.
	// It follows the hard threshold of MemoryAvailable and is not set by itself.
	PodsMemoryAvailable Signal = "allocatableMemory.available"
	NodeFSAvailable     Signal = "nodefs.available" // where the agent's data is
	NodeFSInodes        Signal = "nodefs.inodesFree"
	ImageFSAvailable    Signal = "imagefs.available" // where the runtime's data is
	ImageFSInodes       Signal = "imagefs.inodesFree"
	PIDAvailable        Signal = "pid.available"
)

// Resources that are no resources of Kubernetes.
const (
	inodes corev1.ResourceName = "inodes"
	pids   corev1.ResourceName = "pids"
)

// signals holds what each signal means. Its order is that of parsed thresholds:
// memory is reclaimed before anything else.
var signals = []struct {
	signal    Signal
	condition corev1.NodeConditionType
	resource  corev1.ResourceName
}{
	{MemoryAvailable, corev1.NodeMemoryPressure, corev1.ResourceMemory},
	{PodsMemoryAvailable, corev1.NodeMemoryPressure, corev1.ResourceMemory},
	{NodeFSAvailable, corev1.NodeDiskPressure, corev1.ResourceEphemeralStorage},
	{NodeFSInodes, corev1.NodeDiskPressure, inodes},
	{ImageFSAvailable, corev1.NodeDiskPressure, corev1.ResourceEphemeralStorage},
	{ImageFSInodes, corev1.NodeDiskPressure, inodes},
	{PIDAvailable, corev1.NodePIDPressure, pids},
}

func (s Signal) index() int {
	for i := range signals {
		if signals[i].signal == s {
			return i
		}
	}
	return -1
}

func (s Signal) condition() corev1.NodeConditionType { return signals[s.index()].condition }
func (s Signal) resource() corev1.ResourceName       { return signals[s.index()].resource }

// Value is an amount, or a part of the capacity if Quantity is zero.
type Value struct {
	Quantity resource.Quantity
	Part     float32 // 0.1 is 10 %
}

// of is the amount, given the capacity.
func (v Value) of(capacity int64) resource.Quantity {
	if !v.Quantity.IsZero() {
		return v.Quantity.DeepCopy()
	}
	return *resource.NewQuantity(int64(float64(capacity)*float64(v.Part)), resource.BinarySI)
}

// Threshold is met when less than Value is left.
type Threshold struct {
	Signal Signal
	Value  Value
	// Grace is how long it has to be met before pods go; 0 is a hard threshold.
	Grace time.Duration
	// MinReclaim is what has to be free above Value before all is well again.
	MinReclaim Value
}

// DefaultHard are the kubelet's hard thresholds.
var DefaultHard = map[string]string{
	"memory.available":   "100Mi",
	"nodefs.available":   "10%",
	"nodefs.inodesFree":  "5%",
	"imagefs.available":  "15%",
	"imagefs.inodesFree": "5%",
}

// Parse reads thresholds as the kubelet's evictionHard, evictionSoft,
// evictionSoftGracePeriod and evictionMinimumReclaim write them: signal to
// quantity, percentage or duration.
func Parse(hard, soft, grace, reclaim map[string]string) ([]Threshold, error) {
	var ts []Threshold
	for _, m := range []map[string]string{hard, soft, grace, reclaim} {
		for k := range m {
			if i := Signal(k).index(); i < 0 || Signal(k) == PodsMemoryAvailable {
				return nil, fmt.Errorf("eviction signal %q: want one of %s", k, known())
			}
		}
	}
	for _, s := range signals {
		name := string(s.signal)
		if v, ok := hard[name]; ok {
			t, ok, err := parse(s.signal, v)
			if err != nil {
				return nil, err
			}
			if ok {
				ts = append(ts, t)
			}
		}
		if v, ok := soft[name]; ok {
			t, ok, err := parse(s.signal, v)
			if err != nil {
				return nil, err
			}
			g, has := grace[name]
			if !has {
				return nil, fmt.Errorf("soft eviction threshold %s has no grace period: say how long it may be met before pods go", name)
			}
			if t.Grace, err = time.ParseDuration(g); err != nil || t.Grace <= 0 {
				return nil, fmt.Errorf("grace period %q of soft eviction threshold %s: want a time above 0, such as 90s", g, name)
			}
			if ok {
				ts = append(ts, t)
			}
		}
	}
	for i := range ts {
		v, ok := reclaim[string(ts[i].Signal)]
		if !ok {
			continue
		}
		r, _, err := parse(ts[i].Signal, v)
		if err != nil {
			return nil, fmt.Errorf("minimum reclaim: %w", err)
		}
		ts[i].MinReclaim = r.Value
	}
	for _, t := range ts {
		if t.Signal == MemoryAvailable && t.Grace == 0 {
			ts = append(ts, Threshold{Signal: PodsMemoryAvailable, Value: t.Value, MinReclaim: t.MinReclaim})
			break
		}
	}
	return ts, nil
}

func known() string {
	var names []string
	for _, s := range signals {
		if s.signal != PodsMemoryAvailable {
			names = append(names, string(s.signal))
		}
	}
	return strings.Join(names, ", ")
}

// parse gives false for 0% and 100%, which switch a threshold off.
func parse(s Signal, v string) (Threshold, bool, error) {
	t := Threshold{Signal: s}
	if p, ok := strings.CutSuffix(v, "%"); ok {
		if p == "0" || p == "100" {
			return t, false, nil
		}
		f, err := strconv.ParseFloat(p, 32)
		if err != nil || !(f > 0 && f <= 100) {
			return t, false, fmt.Errorf("eviction threshold %s of %q: want 0%% to 100%%", s, v)
		}
		t.Value.Part = float32(f) / 100
		return t, true, nil
	}
	q, err := resource.ParseQuantity(v)
	if err != nil || q.Sign() <= 0 {
		return t, false, fmt.Errorf("eviction threshold %s of %q: want an amount above 0 such as 100Mi, or a percentage", s, v)
	}
	t.Value.Quantity = q
	return t, true, nil
}

// Reserve is what the hard thresholds take from the node's allocatable.
func Reserve(ts []Threshold, capacity corev1.ResourceList) corev1.ResourceList {
	r := corev1.ResourceList{}
	for _, t := range ts {
		var name corev1.ResourceName
		switch {
		case t.Grace > 0:
			continue
		case t.Signal == MemoryAvailable:
			name = corev1.ResourceMemory
		case t.Signal == NodeFSAvailable:
			name = corev1.ResourceEphemeralStorage
		default:
			continue
		}
		c := capacity[name]
		r[name] = t.Value.of(c.Value())
	}
	return r
}

// Observation is one signal's present value.
type Observation struct {
	Available, Capacity int64
}

// Observations are the signals that could be read.
type Observations map[Signal]Observation

// met are the thresholds that are crossed. With reclaim they are so until
// MinReclaim is free too.
func met(ts []Threshold, o Observations, reclaim bool) []Threshold {
	var out []Threshold
	for _, t := range ts {
		now, ok := o[t.Signal]
		if !ok {
			continue
		}
		q := t.Value.of(now.Capacity)
		if reclaim {
			q.Add(t.MinReclaim.of(now.Capacity))
		}
		if q.CmpInt64(now.Available) > 0 {
			out = append(out, t)
		}
	}
	return out
}

func (t Threshold) same(u Threshold) bool {
	return t.Signal == u.Signal && t.Grace == u.Grace && t.Value.Part == u.Value.Part && t.Value.Quantity.Cmp(u.Value.Quantity) == 0
}

func merge(a, b []Threshold) []Threshold {
	for _, t := range b {
		if !slices.ContainsFunc(a, t.same) {
			a = append(a, t)
		}
	}
	return a
}
