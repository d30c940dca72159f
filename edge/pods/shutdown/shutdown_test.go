package shutdown

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func mkpod(name string, priority int32, grace int64) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", Generation: 2},
		Spec:       corev1.PodSpec{Priority: &priority, TerminationGracePeriodSeconds: &grace},
	}
}

// diary notes what happens, and when.
type diary struct {
	sync.Mutex
	start time.Time
	lines []string
}

func (d *diary) note(format string, args ...any) {
	d.Lock()
	defer d.Unlock()
	d.lines = append(d.lines, fmt.Sprintf("%s ", time.Since(d.start))+fmt.Sprintf(format, args...))
}

func (d *diary) String() string {
	d.Lock()
	defer d.Unlock()
	return strings.Join(d.lines, "\n")
}

func TestTerminate(t *testing.T) {
	tests := []struct {
		name    string
		periods []Period
		pods    []*corev1.Pod
		takes   map[string]time.Duration // how long a pod needs to end
		want    string
	}{
		{
			"critical pods last; the grace is the shorter of the pod's and the period",
			periods(t, 30*time.Second, 10*time.Second),
			[]*corev1.Pod{mkpod("dns", 2_000_001_000, 60), mkpod("quick", 0, 5), mkpod("slow", 10, 60)},
			map[string]time.Duration{"dns": 3 * time.Second, "quick": time.Second, "slow": 2 * time.Second},
			"0s quick 5\n0s slow 20\n1s quick has ended\n2s slow has ended\n2s dns 10\n5s dns has ended\n5s done",
		},
		{
			"the next group does not wait for a pod that hangs",
			periods(t, 30*time.Second, 10*time.Second),
			[]*corev1.Pod{mkpod("hangs", 0, 60), mkpod("dns", 2_000_000_000, 60)},
			map[string]time.Duration{"hangs": 25 * time.Second, "dns": time.Second},
			"0s hangs 20\n20s dns 10\n21s dns has ended\n21s done\n25s hangs has ended",
		},
		{
			"by priority: between two periods is the lower, below all is the lowest",
			[]Period{{1000, 3 * time.Second}, {-10, 2 * time.Second}, {100, time.Second}},
			[]*corev1.Pod{mkpod("a", -500, 9), mkpod("b", -10, 9), mkpod("c", 99, 9), mkpod("d", 100, 9), mkpod("e", 5000, 9)},
			nil,
			"0s a 2\n0s a has ended\n0s b 2\n0s b has ended\n0s c 2\n0s c has ended\n0s d 1\n0s d has ended\n0s e 3\n0s e has ended\n0s done",
		},
		{"no pods, no wait", periods(t, 30*time.Second, 10*time.Second), nil, nil, "0s done"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &diary{start: time.Now()}
				m := New(Config{
					Periods: tt.periods, Pods: func() []*corev1.Pod { return tt.pods },
					Kill: func(_ context.Context, k Termination) error {
						if k.Reason != "Terminated" || k.Message != "Pod was terminated in response to imminent node shutdown." ||
							k.Condition.Type != corev1.DisruptionTarget || k.Condition.Reason != "TerminationByKubelet" || k.Condition.ObservedGeneration != 2 {
							t.Errorf("termination %+v", k)
						}
						d.note("%s %d", k.Pod.Name, k.Grace)
						time.Sleep(tt.takes[k.Pod.Name])
						d.note("%s has ended", k.Pod.Name)
						return nil
					},
				})
				m.Terminate(t.Context())
				d.note("done")
				m.kills.Wait()
				if tt.takes == nil { // at the same time: in any order
					for _, l := range strings.Split(tt.want, "\n") {
						if !strings.Contains(d.String(), l) {
							t.Errorf("%q is missing in\n%s", l, d)
						}
					}
				} else if got := sortSame(d.String()); got != sortSame(tt.want) {
					t.Errorf("got\n%s\nwant\n%s", d, tt.want)
				}
			})
		})
	}
}

// sortSame puts the two kills of one moment in one order.
func sortSame(s string) string {
	return strings.Replace(s, "0s slow 20\n0s quick 5", "0s quick 5\n0s slow 20", 1)
}

func periods(t *testing.T, total, critical time.Duration) []Period {
	t.Helper()
	p, err := Periods(total, critical)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPeriods(t *testing.T) {
	if p, err := Periods(0, 0); err != nil || p != nil {
		t.Errorf("off: %v, %v", p, err)
	}
	for _, bad := range [][2]time.Duration{{10, 20}, {-1, 0}, {0, -1}, {0, 5}} {
		if p, err := Periods(bad[0], bad[1]); err == nil {
			t.Errorf("%v was taken: %v", bad, p)
		}
	}
}
