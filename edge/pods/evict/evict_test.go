package evict

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
)

// world is a node whose signals the test sets. It is used inside a synctest bubble.
type world struct {
	*Manager
	o         Observations
	dedicated bool
	pods      []*corev1.Pod
	use       map[types.UID]PodUsage
	asked     []What
	evicted   []Eviction
	fail      error
	events    []string
	changed   int
	freed     []string
	free      func()
	wake      chan struct{}
	handover  sync.Mutex
}

// run starts a manager in the bubble, which the test's end stops.
func run(t *testing.T, w *world, cfg Config) *world {
	t.Helper()
	w.wake = make(chan struct{}, 1)
	cfg.Observe = func() (Observations, bool, error) {
		w.handover.Lock()
		defer w.handover.Unlock()
		return maps.Clone(w.o), w.dedicated, nil
	}
	cfg.Pods = func() []*corev1.Pod { return slices.Clone(w.pods) }
	cfg.Usage = func(_ context.Context, ps []*corev1.Pod, what What) map[types.UID]PodUsage {
		w.asked = append(w.asked, what)
		out := map[types.UID]PodUsage{}
		for _, p := range ps {
			if u, ok := w.use[p.UID]; ok {
				out[p.UID] = u
			}
		}
		return out
	}
	cfg.Evict = func(_ context.Context, e Eviction) error {
		if w.fail != nil {
			return w.fail
		}
		w.evicted = append(w.evicted, e)
		w.pods = slices.DeleteFunc(w.pods, func(p *corev1.Pod) bool { return p.UID == e.Pod.UID })
		return nil
	}
	freed := func(what string) func(context.Context) error {
		return func(context.Context) error {
			w.freed = append(w.freed, what)
			if w.free != nil {
				w.free()
			}
			return nil
		}
	}
	cfg.FreeContainers, cfg.FreeImages = freed("containers"), freed("images")
	cfg.Event = func(_, reason, message string) { w.events = append(w.events, reason+": "+message) }
	cfg.Changed = func() { w.changed++ }
	cfg.Wake = w.wake
	w.Manager = New(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	synctest.Wait()
	return w
}

// after lets time pass. What the test set before, the manager sees after.
func (w *world) after(d time.Duration) {
	w.handover.Lock()
	w.handover.Unlock() //nolint:staticcheck // the edge is the point
	time.Sleep(d)
	synctest.Wait()
}

func (w *world) names() string {
	var out []string
	for _, e := range w.evicted {
		out = append(out, fmt.Sprintf("%s/%d", e.Pod.Name, e.Grace))
	}
	return strings.Join(out, " ")
}

func (w *world) status(kind corev1.NodeConditionType) (corev1.NodeCondition, time.Duration) {
	for _, c := range w.Conditions() {
		if c.Type == kind {
			return c, time.Since(c.LastTransitionTime.Time)
		}
	}
	return corev1.NodeCondition{}, 0
}

func thresholds(t *testing.T, hard, soft, grace, reclaim string) []Threshold {
	t.Helper()
	m := func(s string) map[string]string {
		out := map[string]string{}
		for kv := range strings.SplitSeq(s, ",") {
			if k, v, ok := strings.Cut(kv, "="); ok {
				out[k] = v
			}
		}
		return out
	}
	ts, err := Parse(m(hard), m(soft), m(grace), m(reclaim))
	if err != nil {
		t.Fatal(err)
	}
	return ts
}

const mi = 1 << 20

func TestHardMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		critical := mkpod("critical", 2_000_000_000, "")
		static := mkpod("static", 0, "")
		static.Annotations = map[string]string{"kubernetes.io/config.source": "file"}
		hog := mkpod("hog", 5, "memory=10Mi")
		hog.Generation = 3
		w := run(t, &world{
			o:    Observations{MemoryAvailable: {500 * mi, 1000 * mi}},
			pods: []*corev1.Pod{critical, static, hog, mkpod("good", 0, "memory=500Mi")},
			use: map[types.UID]PodUsage{
				"critical": {Memory: 400 * mi}, "static": {Memory: 300 * mi}, "good": {Memory: 100 * mi},
				"hog": {Memory: 200 * mi, Containers: map[string]ContainerUsage{"c": {Memory: 190 * mi}}},
			},
		}, Config{Thresholds: thresholds(t, "memory.available=100Mi", "", "", ""), Metrics: reg})
		w.after(time.Minute)
		if len(w.evicted) != 0 || len(w.asked) != 0 || w.changed != 0 {
			t.Fatalf("without pressure: evicted %s, measured %v, changed %d", w.names(), w.asked, w.changed)
		}
		start := time.Now()
		w.o[MemoryAvailable] = Observation{60 * mi, 1000 * mi}
		w.wake <- struct{}{} // the kernel says so: no waiting for the interval
		synctest.Wait()
		if time.Since(start) != 0 {
			t.Fatal("the test took time of its own")
		}
		// The next round finds the node still low: the good pod goes too. The critical ones stay.
		if got := w.names(); got != "hog/1 good/1" {
			t.Fatalf("evicted %s", got)
		}
		want := Eviction{
			Pod: hog, Reason: "Evicted", Grace: 1,
			Message:     "The node was low on resource: memory. Threshold quantity: 100Mi, available: 60Mi. Container c was using 190Mi, request is 10Mi, has larger consumption of memory. ",
			Annotations: map[string]string{"starved_resource": "memory", "offending_containers": "c", "offending_containers_usage": "190Mi"},
			Condition:   &corev1.PodCondition{Type: "DisruptionTarget", Status: "True", Reason: "TerminationByKubelet", ObservedGeneration: 3},
		}
		want.Condition.Message = want.Message
		if d := cmp.Diff(want, w.evicted[0]); d != "" {
			t.Error(d)
		}
		if c, _ := w.status(corev1.NodeMemoryPressure); c.Status != "True" || c.Reason != "KubeletHasInsufficientMemory" || c.Message != "kubelet has insufficient memory available" {
			t.Errorf("condition %+v", c)
		}
		if w.events[0] != "EvictionThresholdMet: Attempting to reclaim memory" {
			t.Errorf("events %v", w.events)
		}
		if ms, err := reg.Gather(); err != nil || len(ms) != 1 || ms[0].GetName() != "fairlead_pods_evictions_total" || ms[0].Metric[0].GetCounter().GetValue() != 2 {
			t.Errorf("counted %v, %v", ms, err)
		}

		// The condition stays 5 min after the last time that memory was short.
		w.o[MemoryAvailable] = Observation{500 * mi, 1000 * mi}
		w.after(4*time.Minute + 50*time.Second)
		if c, _ := w.status(corev1.NodeMemoryPressure); c.Status != "True" {
			t.Errorf("after 4:50: %+v", c)
		}
		w.after(20 * time.Second)
		c, age := w.status(corev1.NodeMemoryPressure)
		if c.Status != "False" || c.Reason != "KubeletHasSufficientMemory" || age > 20*time.Second || w.changed != 2 {
			t.Errorf("after 5:10: %+v, %s old, %d changes", c, age, w.changed)
		}
	})
}

func TestSoftThreshold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := run(t, &world{
			o:    Observations{MemoryAvailable: {200 * mi, 1000 * mi}},
			pods: []*corev1.Pod{mkpod("a", 0, "")}, use: map[types.UID]PodUsage{"a": {Memory: mi}},
		}, Config{Thresholds: thresholds(t, "", "memory.available=300Mi", "memory.available=90s", "memory.available=100Mi"), MaxGrace: 20})
		if c, _ := w.status(corev1.NodeMemoryPressure); c.Status != "True" {
			t.Errorf("pressure is told at once: %+v", c)
		}
		w.after(80 * time.Second)
		w.o[MemoryAvailable] = Observation{310 * mi, 1000 * mi} // over for a moment: the grace begins anew
		w.after(10 * time.Second)
		w.o[MemoryAvailable] = Observation{200 * mi, 1000 * mi}
		w.after(80 * time.Second)
		if w.names() != "" {
			t.Fatalf("evicted %s within the grace", w.names())
		}
		w.after(20 * time.Second)
		if w.names() != "a/20" {
			t.Fatalf("evicted %q", w.names())
		}
		// Above the threshold, but not by the minimum reclaim: it goes on.
		w.o[MemoryAvailable] = Observation{390 * mi, 1000 * mi}
		w.pods = []*corev1.Pod{mkpod("b", 0, "")}
		w.after(10 * time.Second)
		if w.names() != "a/20 b/20" {
			t.Errorf("evicted %q, want b for the minimum reclaim", w.names())
		}
		w.o[MemoryAvailable] = Observation{401 * mi, 1000 * mi}
		w.pods = []*corev1.Pod{mkpod("c", 0, "")}
		w.after(time.Minute)
		if w.names() != "a/20 b/20" {
			t.Errorf("evicted %q though enough is free", w.names())
		}
	})
}

func TestDisk(t *testing.T) {
	tests := []struct {
		name      string
		signal    Signal
		dedicated bool
		freeing   bool
		freed     string
		evicted   string
	}{
		{"what is unused is enough", NodeFSAvailable, false, true, "containers images", ""},
		{"what is unused is not enough", NodeFSAvailable, false, false, "containers images", "big/1"},
		{"images are elsewhere", NodeFSAvailable, true, true, "", "big/1"},
		{"where the images are", ImageFSAvailable, true, true, "containers images", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{
					o: Observations{NodeFSAvailable: {50, 100}, ImageFSAvailable: {50, 100}}, dedicated: tt.dedicated,
					pods: []*corev1.Pod{mkpod("small", 0, ""), mkpod("big", 0, "")},
					use: map[types.UID]PodUsage{
						"big":   {Containers: map[string]ContainerUsage{"c": {Logs: Files{20 * mi, 1}}}},
						"small": {Containers: map[string]ContainerUsage{"c": {Logs: Files{10 * mi, 1}}}},
					},
				}
				ok := w.o[tt.signal]
				w.free = func() {
					if tt.freeing {
						w.o[tt.signal] = ok
					}
				}
				w.o[tt.signal] = Observation{9, 100}
				cfg := Config{Thresholds: thresholds(t, "nodefs.available=10%,imagefs.available=15%", "", "", "")}
				run(t, w, cfg)
				if len(w.evicted) > 0 { // one at a time is what counts here
					w.evicted = w.evicted[:1]
				}
				if got := w.names(); got != tt.evicted {
					t.Errorf("evicted %q, want %q", got, tt.evicted)
				}
				if got := strings.Join(w.freed[:min(2, len(w.freed))], " "); got != tt.freed {
					t.Errorf("freed %q, want %q", got, tt.freed)
				}
				if c, _ := w.status(corev1.NodeDiskPressure); c.Status != "True" || c.Reason != "KubeletHasDiskPressure" {
					t.Errorf("condition %+v", c)
				}
			})
		})
	}
}

// Memory goes before all else, and a pod that cannot be killed does not stop the rest.
func TestOrderOfSignalsAndFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{
			o:    Observations{PIDAvailable: {1, 1000}, PodsMemoryAvailable: {mi, 100 * mi}, MemoryAvailable: {500 * mi, 500 * mi}},
			pods: []*corev1.Pod{mkpod("a", 0, "")}, use: map[types.UID]PodUsage{"a": {Memory: mi, PIDs: 9}},
			fail: errors.New("stuck"),
		}
		run(t, w, Config{Thresholds: thresholds(t, "pid.available=10%,memory.available=2Mi", "", "", "")})
		if !slices.Equal(w.asked, []What{Memory}) {
			t.Errorf("measured %v, want memory first", w.asked)
		}
		w.fail = nil
		w.after(10 * time.Second)
		if w.names() != "a/1" || !strings.HasPrefix(w.evicted[0].Message, "The node was low on resource: memory. Threshold quantity: 2Mi, available: 1Mi. ") {
			t.Errorf("evicted %q: %+v", w.names(), w.evicted)
		}
		w.o[PodsMemoryAvailable] = Observation{90 * mi, 100 * mi}
		w.pods = []*corev1.Pod{mkpod("b", 0, "")}
		w.after(10 * time.Second)
		if w.names() != "a/1 b/1" || w.evicted[1].Message != "The node was low on resource: pids. Threshold quantity: 100, available: 1. " {
			t.Errorf("evicted %q: %+v", w.names(), w.evicted[len(w.evicted)-1])
		}
	})
}

func TestLocalStorageLimits(t *testing.T) {
	emptyDir := func(p *corev1.Pod, limit string, medium corev1.StorageMedium) *corev1.Pod {
		q := resource.MustParse(limit)
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &q, Medium: medium}}}}
		return p
	}
	limit := func(p *corev1.Pod, l string) *corev1.Pod {
		p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse(l)}
		return p
	}
	container := func(root, logs int64) map[string]ContainerUsage {
		return map[string]ContainerUsage{"c": {Root: Files{Bytes: root}, Logs: Files{Bytes: logs}}}
	}
	pod := func() *corev1.Pod { return mkpod("p", 0, "") }
	two := limit(pod(), "1Mi")
	two.Spec.Containers = append(two.Spec.Containers, corev1.Container{Name: "d", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse("9Mi")}}})
	tests := []struct {
		name      string
		pod       *corev1.Pod
		use       PodUsage
		dedicated bool
		want      string
	}{
		{"emptyDir", emptyDir(pod(), "1Mi", ""), PodUsage{Volumes: map[string]Files{"v": {Bytes: mi + 1}}}, false, `Usage of EmptyDir volume "v" exceeds the limit "1Mi". `},
		{"emptyDir in memory", emptyDir(pod(), "1Mi", "Memory"), PodUsage{Volumes: map[string]Files{"v": {Bytes: mi + 1}}}, false, `Usage of EmptyDir volume "v" exceeds the limit "1Mi". `},
		{"emptyDir that fits", emptyDir(pod(), "1Mi", ""), PodUsage{Volumes: map[string]Files{"v": {Bytes: mi}}}, false, ""},
		{"pod: layer, logs, volumes and the rest", limit(pod(), "4Mi"), PodUsage{Containers: container(2*mi, mi), Other: Files{Bytes: mi + 1}}, false, "Pod ephemeral local storage usage exceeds the total limit of containers 4Mi. "},
		{"pod that fits", limit(pod(), "4Mi"), PodUsage{Containers: container(2*mi, mi), Other: Files{Bytes: mi}}, false, ""},
		{"container", two, PodUsage{Containers: container(mi, 1)}, false, `Container c exceeded its local ephemeral storage limit "1Mi". `},
		{"container with its layer elsewhere", two, PodUsage{Containers: container(mi, 1)}, true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, got := exceeded(tt.pod, tt.use, tt.dedicated); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		w := run(t, &world{
			pods: []*corev1.Pod{pod()}, use: map[types.UID]PodUsage{},
		}, Config{})
		w.after(5 * time.Minute)
		if len(w.asked) != 0 {
			t.Errorf("folders were walked %d times for pods without limits", len(w.asked))
		}
		w.pods = []*corev1.Pod{emptyDir(mkpod("full", 0, ""), "1Mi", "")}
		w.use = map[types.UID]PodUsage{"full": {}}
		w.after(3 * time.Minute)
		if !slices.Equal(w.asked, []What{Disk, Disk, Disk}) || w.names() != "" {
			t.Errorf("measured %v, evicted %q; want once a minute, nothing", w.asked, w.names())
		}
		w.use = map[types.UID]PodUsage{"full": {Volumes: map[string]Files{"v": {Bytes: 2 * mi}}}}
		w.after(time.Minute)
		if w.names() != "full/1" || w.evicted[0].Condition != nil || w.evicted[0].Reason != "Evicted" {
			t.Errorf("evicted %+v", w.evicted)
		}
		if c, _ := w.status(corev1.NodeDiskPressure); c.Status != "False" {
			t.Errorf("a pod's own limit is no pressure: %+v", c)
		}
	})
}

func TestAdmit(t *testing.T) {
	bestEffort, burstable, critical := mkpod("b", 0, ""), mkpod("m", 0, "memory=1Mi"), mkpod("c", 2_000_000_000, "")
	tolerant := mkpod("t", 0, "")
	tolerant.Spec.Tolerations = []corev1.Toleration{{Key: "node.kubernetes.io/memory-pressure", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}}
	all := mkpod("a", 0, "")
	all.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	other := mkpod("o", 0, "")
	other.Spec.Tolerations = []corev1.Toleration{{Key: "node.kubernetes.io/memory-pressure", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}, {Key: "x", Operator: corev1.TolerationOpExists}}
	memory := Observations{MemoryAvailable: {mi, 1000 * mi}}
	tests := []struct {
		name    string
		o       Observations
		admit   []*corev1.Pod
		refuse  []*corev1.Pod
		message string
	}{
		{"no pressure", nil, []*corev1.Pod{bestEffort, burstable, critical}, nil, ""},
		{"memory", memory, []*corev1.Pod{burstable, critical, tolerant, all}, []*corev1.Pod{bestEffort, other}, "The node had condition: [MemoryPressure]. "},
		{"disk", Observations{NodeFSAvailable: {1, 100}}, []*corev1.Pod{critical}, []*corev1.Pod{bestEffort, burstable, tolerant, all}, "The node had condition: [DiskPressure]. "},
		{"memory and process IDs", Observations{MemoryAvailable: {mi, 1000 * mi}, PIDAvailable: {1, 100}}, []*corev1.Pod{critical}, []*corev1.Pod{burstable, all}, "The node had condition: [MemoryPressure PIDPressure]. "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := run(t, &world{o: tt.o}, Config{Thresholds: thresholds(t, "memory.available=100Mi,nodefs.available=10%,pid.available=10%", "", "", "")})
				for _, p := range tt.admit {
					if r, m := w.Admit(p); r != "" {
						t.Errorf("%s refused: %s %s", p.Name, r, m)
					}
				}
				for _, p := range tt.refuse {
					if r, m := w.Admit(p); r != "Evicted" || m != tt.message {
						t.Errorf("%s: %q %q, want %q", p.Name, r, m, tt.message)
					}
				}
			})
		})
	}
}
