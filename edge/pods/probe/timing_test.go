package probe

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// answer is what the n-th run (from 1) of a command gives.
type answer func(ctx context.Context, n int) (string, int, error)

func code(c int) answer {
	return func(context.Context, int) (string, int, error) { return "said", c, nil }
}

// failUntil fails before the n-th run.
func failUntil(n int) answer {
	return func(_ context.Context, i int) (string, int, error) {
		if i < n {
			return "not yet", 1, nil
		}
		return "", 0, nil
	}
}

// rig is a Prober whose commands are answered by name.
type rig struct {
	*Prober
	reg     *prometheus.Registry
	answers map[string]answer

	mu      sync.Mutex
	zero    time.Time
	runs    map[string][]int // when each command ran, in seconds
	seen    map[string]int
	events  []string
	changes int
}

func newRig(t *testing.T, answers map[string]answer) *rig {
	t.Helper()
	r := &rig{answers: answers, zero: time.Now(), runs: map[string][]int{}, seen: map[string]int{}, reg: prometheus.NewRegistry()}
	var err error
	r.Prober, err = New(Config{Metrics: r.reg, Exec: r.exec,
		Changed: func(types.UID) { r.mu.Lock(); r.changes++; r.mu.Unlock() },
		Event: func(_ *corev1.Pod, container, reason, message string) {
			r.mu.Lock()
			r.events = append(r.events, container+" "+reason+" "+message)
			r.mu.Unlock()
		}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func (r *rig) exec(ctx context.Context, id string, cmd []string, _ time.Duration) ([]byte, int, error) {
	r.mu.Lock()
	r.runs[cmd[0]] = append(r.runs[cmd[0]], int(time.Since(r.zero)/time.Second))
	r.seen[cmd[0]+id]++
	n, a := r.seen[cmd[0]+id], r.answers[cmd[0]]
	r.mu.Unlock()
	out, c, err := a(ctx, n)
	return []byte(out), c, err
}

func (r *rig) ran(cmd string) []int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.runs[cmd])
}

// after lets the time pass until so many seconds after the beginning, and half a
// second more.
func (r *rig) after(seconds int) {
	time.Sleep(time.Until(r.zero.Add(time.Duration(seconds)*time.Second + 500*time.Millisecond)))
	synctest.Wait()
}

func exec(cmd string, p corev1.Probe) *corev1.Probe {
	p.Exec = &corev1.ExecAction{Command: []string{cmd}}
	if p.PeriodSeconds == 0 {
		p.PeriodSeconds = 10
	}
	return &p
}

func podWith(c corev1.Container) *corev1.Pod {
	c.Name = "web"
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "uid-1", Name: "web", Namespace: "default"}, Spec: corev1.PodSpec{Containers: []corev1.Container{c}}}
}

func running(id string) []Running { return []Running{{Name: "web", ID: id, Since: time.Now()}} }

func TestWhenProbesRun(t *testing.T) {
	for _, tc := range []struct {
		name string
		c    corev1.Container
		cmd  string
		want []int
	}{
		{"liveness waits one period", corev1.Container{LivenessProbe: exec("live", corev1.Probe{})}, "live", []int{10, 20, 30}},
		{"startup waits one period", corev1.Container{StartupProbe: exec("start", corev1.Probe{FailureThreshold: 30})}, "start", []int{10, 20, 30}},
		{"readiness runs at once", corev1.Container{ReadinessProbe: exec("ready", corev1.Probe{})}, "ready", []int{0, 10, 20, 30}},
		{"readiness after its delay", corev1.Container{ReadinessProbe: exec("ready", corev1.Probe{InitialDelaySeconds: 7})}, "ready", []int{7, 17, 27}},
		{"liveness at the first tick after its delay", corev1.Container{LivenessProbe: exec("live", corev1.Probe{InitialDelaySeconds: 12, PeriodSeconds: 5})}, "live", []int{15, 20, 25, 30}},
		{"a long period", corev1.Container{LivenessProbe: exec("live", corev1.Probe{PeriodSeconds: 20})}, "live", []int{20}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, map[string]answer{"live": code(0), "ready": code(0), "start": code(1)})
				r.Set(podWith(tc.c), "10.0.0.7", running("c1"))
				r.after(34)
				if got := r.ran(tc.cmd); !slices.Equal(got, tc.want) {
					t.Errorf("ran at %v, want %v", got, tc.want)
				}
			})
		})
	}
}

func TestStartupHoldsTheOthersBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"start": failUntil(3), "ready": code(0), "live": code(0)})
		r.Set(podWith(corev1.Container{
			StartupProbe:   exec("start", corev1.Probe{PeriodSeconds: 3, FailureThreshold: 5}),
			ReadinessProbe: exec("ready", corev1.Probe{PeriodSeconds: 4}), LivenessProbe: exec("live", corev1.Probe{PeriodSeconds: 10}),
		}), "", running("c1"))
		r.after(8)
		if started, known := r.Started("c1"); started || !known {
			t.Errorf("after 8 s: started %v, known %v", started, known)
		}
		if ready, known := r.Ready("c1"); ready || !known {
			t.Errorf("after 8 s: ready %v, known %v", ready, known)
		}
		r.after(9)
		if started, _ := r.Started("c1"); !started {
			t.Error("not started after the third run")
		}
		if ready, _ := r.Ready("c1"); !ready {
			t.Error("not ready at once after the start")
		}
		r.after(21)
		for cmd, want := range map[string][]int{"start": {3, 6, 9}, "ready": {9, 13, 17, 21}, "live": {10, 20}} {
			if got := r.ran(cmd); !slices.Equal(got, want) {
				t.Errorf("%s ran at %v, want %v", cmd, got, want)
			}
		}
	})
}

func TestThresholds(t *testing.T) {
	// The readiness of each run, by what the command gives (1 is a failure).
	for _, tc := range []struct {
		name             string
		success, failure int32
		codes            []int
		want             []bool
	}{
		{"one success is enough", 1, 3, []int{0, 1, 1, 0, 1, 1, 1, 0}, []bool{true, true, true, true, true, true, false, true}},
		{"two in a row", 2, 1, []int{0, 1, 0, 0, 1, 0, 0}, []bool{false, false, false, true, false, false, true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, map[string]answer{"ready": func(_ context.Context, n int) (string, int, error) { return "", tc.codes[n-1], nil }})
				r.Set(podWith(corev1.Container{ReadinessProbe: exec("ready", corev1.Probe{SuccessThreshold: tc.success, FailureThreshold: tc.failure})}), "", running("c1"))
				var got []bool
				for i := range tc.codes {
					r.after(10 * i)
					ready, _ := r.Ready("c1")
					got = append(got, ready)
				}
				if !slices.Equal(got, tc.want) {
					t.Errorf("ready %v, want %v", got, tc.want)
				}
				if want := changesOf(tc.want); r.changes != want {
					t.Errorf("told of %d changes, want %d", r.changes, want)
				}
			})
		})
	}
}

func changesOf(results []bool) (n int) {
	last := false
	for _, r := range results {
		if r != last {
			n++
		}
		last = r
	}
	return n
}

func TestLivenessFailsOncePerContainer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"live": code(3)})
		pod := podWith(corev1.Container{LivenessProbe: exec("live", corev1.Probe{FailureThreshold: 2})})
		r.Set(pod, "", running("c1"))
		r.after(10)
		if r.Live("c1") != Success || r.Failed("c1") != "" {
			t.Error("failed before its threshold")
		}
		if ready, known := r.Ready("c1"); !ready || !known { // it has no readiness probe
			t.Error("not ready")
		}
		r.after(60)
		if got := r.ran("live"); !slices.Equal(got, []int{10, 20}) {
			t.Errorf("ran at %v: it goes on after it has failed", got)
		}
		if r.Live("c1") != Failure || r.Failed("c1") != "LivenessProbe" {
			t.Errorf("live %v, failed %q", r.Live("c1"), r.Failed("c1"))
		}
		r.Set(pod, "", running("c2")) // restarted
		if r.Live("c1") != Unknown || r.Failed("c1") != "" || r.Live("c2") != Success {
			t.Error("the new container has the old one's result")
		}
		r.after(70)
		if r.Live("c2") != Success {
			t.Error("the old container's failures count for the new one")
		}
		r.after(80)
		if r.Failed("c2") != "LivenessProbe" {
			t.Error("the new container did not fail")
		}
		if want := "web Unhealthy Liveness probe failed: said"; len(r.events) != 4 || r.events[0] != want {
			t.Errorf("events %q, want 4 of %q", r.events, want)
		}
	})
}

func TestStartupFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"start": code(1), "live": code(1)})
		r.Set(podWith(corev1.Container{StartupProbe: exec("start", corev1.Probe{FailureThreshold: 2}), LivenessProbe: exec("live", corev1.Probe{})}), "", running("c1"))
		r.after(60)
		if r.Failed("c1") != "StartupProbe" {
			t.Errorf("failed %q", r.Failed("c1"))
		}
		if s, l := r.ran("start"), r.ran("live"); !slices.Equal(s, []int{10, 20}) || l != nil {
			t.Errorf("startup ran at %v, liveness at %v", s, l)
		}
	})
}

func TestAgentRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"start": code(1), "ready": code(1), "live": code(0)})
		r.Set(podWith(corev1.Container{
			StartupProbe: exec("start", corev1.Probe{}), ReadinessProbe: exec("ready", corev1.Probe{FailureThreshold: 1}), LivenessProbe: exec("live", corev1.Probe{}),
		}), "", []Running{{Name: "web", ID: "c1", Since: time.Now().Add(-time.Hour), Started: true}})
		if started, known := r.Started("c1"); !started || !known {
			t.Error("it has to start again")
		}
		if _, known := r.Ready("c1"); known {
			t.Error("readiness is known before the first run")
		}
		r.after(10)
		if s, l, rd := r.ran("start"), r.ran("live"), r.ran("ready"); s != nil || len(l) == 0 || len(rd) == 0 {
			t.Errorf("in the first period: startup ran at %v, liveness at %v, readiness at %v", s, l, rd)
		}
		if ready, known := r.Ready("c1"); ready || !known {
			t.Error("the first result does not count")
		}
	})
}

// The waits after a restart of the agent are spread over the period.
func TestAgentRestartSpreadsProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"live": code(0)})
		old := time.Now().Add(-time.Hour)
		for i := range 40 {
			pod := podWith(corev1.Container{LivenessProbe: exec("live", corev1.Probe{PeriodSeconds: 100})})
			pod.UID = types.UID(fmt.Sprint(i))
			r.Set(pod, "", []Running{{Name: "web", ID: fmt.Sprint(i), Since: old, Started: true}})
		}
		r.after(100)
		at := r.ran("live")
		if len(at) < 40 || at[0] > 50 || at[39] < 50 || len(slices.Compact(slices.Clone(at))) < 10 {
			t.Errorf("ran at %v", at)
		}
	})
}

func TestEnding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"ready": func(_ context.Context, n int) (string, int, error) { return "", min(n-1, 1), nil }, "live": code(1)})
		pod := podWith(corev1.Container{
			ReadinessProbe: exec("ready", corev1.Probe{FailureThreshold: 1}), LivenessProbe: exec("live", corev1.Probe{FailureThreshold: 1}),
		})
		r.Set(pod, "", running("c1"))
		r.after(5)
		if ready, _ := r.Ready("c1"); !ready {
			t.Fatal("not ready")
		}
		r.Ending(pod.UID)
		r.after(35)
		if ready, _ := r.Ready("c1"); ready || r.Failed("c1") != "" {
			t.Errorf("ready %v, failed %q", ready, r.Failed("c1"))
		}
		if got := r.ran("live"); got != nil {
			t.Errorf("liveness ran at %v", got)
		}
		r.Set(pod, "", nil) // the container has stopped
		r.after(60)
		if got := r.ran("ready"); !slices.Equal(got, []int{0, 10, 20, 30}) {
			t.Errorf("readiness ran at %v", got)
		}
		if _, known := r.Ready("c1"); known {
			t.Error("a stopped container has results")
		}
	})
}

func TestSetAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"live": code(0)})
		pod := podWith(corev1.Container{LivenessProbe: exec("live", corev1.Probe{})})
		now := running("c1")
		r.Set(pod, "", now)
		r.after(5)
		r.Set(pod, "10.0.0.7", now) // the same container, and the pod's address is known now
		r.after(25)
		if got := r.ran("live"); !slices.Equal(got, []int{10, 20}) {
			t.Errorf("ran at %v", got)
		}
		if ip := r.Prober.mu.byID["c1"].ip; ip != "10.0.0.7" {
			t.Errorf("asks %q", ip)
		}
		r.Close()
		r.Set(pod, "", running("c2"))
		r.after(60)
		if got := r.ran("live"); len(got) != 2 {
			t.Errorf("closed, it ran at %v", got)
		}
	})
}

// A pod may be ended before its containers are known here.
func TestEndingComesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"live": code(1)})
		pod := podWith(corev1.Container{LivenessProbe: exec("live", corev1.Probe{FailureThreshold: 1})})
		r.Ending(pod.UID)
		r.Set(pod, "", running("c1"))
		r.after(30)
		if got := r.ran("live"); got != nil || r.Failed("c1") != "" {
			t.Errorf("liveness ran at %v, failed %q", got, r.Failed("c1"))
		}
	})
}

func TestWarning(t *testing.T) {
	w := serve(t, false, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://localhost:1/")
		w.WriteHeader(http.StatusFound)
	})
	changed, events := make(chan types.UID, 1), make(chan string, 1)
	p, err := New(Config{
		Exec:    func(context.Context, string, []string, time.Duration) ([]byte, int, error) { return nil, 0, nil },
		Changed: func(uid types.UID) { changed <- uid },
		Event: func(pod *corev1.Pod, container, reason, message string) {
			events <- pod.Name + " " + container + " " + reason + " " + message
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	probe := &corev1.Probe{PeriodSeconds: 1000, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: w.port()}}}
	p.Set(podWith(corev1.Container{ReadinessProbe: probe}), "127.0.0.1", running("c1"))
	if got := <-events; got != "web web ProbeWarning Readiness probe warning: Probe terminated redirects, Response body: " {
		t.Errorf("event %q", got)
	}
	if uid := <-changed; uid != "uid-1" {
		t.Errorf("changed %q", uid)
	}
	if ready, _ := p.Ready("c1"); !ready { // a warning is a success
		t.Error("not ready")
	}
}

func TestDeletionEndsLiveness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"start": code(1)})
		pod := podWith(corev1.Container{StartupProbe: exec("start", corev1.Probe{FailureThreshold: 1})})
		now := metav1.Now()
		pod.DeletionTimestamp = &now
		r.Set(pod, "", running("c1"))
		r.after(30)
		if got := r.ran("start"); got != nil || r.Failed("c1") != "" {
			t.Errorf("startup ran at %v, failed %q", got, r.Failed("c1"))
		}
	})
}

func TestExecVerdicts(t *testing.T) {
	for _, tc := range []struct {
		name  string
		give  answer
		runs  int
		ready bool
		event string
	}{
		{"success", code(0), 1, true, ""},
		{"exit code", code(2), 1, false, "web Unhealthy Readiness probe failed: said"},
		{"too slow", func(context.Context, int) (string, int, error) {
			return "", 0, fmt.Errorf("exec: %w", context.DeadlineExceeded)
		}, 1, false, `web Unhealthy Readiness probe failed: command timed out: "ready" timed out after 3s`},
		{"cannot run", func(context.Context, int) (string, int, error) { return "", 0, errors.New("no such container") }, 3, true,
			"web Unhealthy Readiness probe errored and resulted in unknown state: no such container"},
		{"works the second time", func(_ context.Context, n int) (string, int, error) {
			if n == 2 {
				return "", 0, errors.New("busy")
			}
			return "", 0, nil
		}, 2, true, ""},
		{"long output", func(context.Context, int) (string, int, error) { return strings.Repeat("x", 20<<10), 1, nil }, 1, false,
			"web Unhealthy Readiness probe failed: " + strings.Repeat("x", 10<<10)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// The first run succeeds, the next one is the one that is looked at.
				r := newRig(t, map[string]answer{"ready": func(ctx context.Context, n int) (string, int, error) {
					if n == 1 {
						return "", 0, nil
					}
					return tc.give(ctx, n)
				}})
				r.Set(podWith(corev1.Container{ReadinessProbe: exec("ready", corev1.Probe{FailureThreshold: 1, TimeoutSeconds: 3})}), "", running("c1"))
				r.after(10)
				if got := len(r.ran("ready")) - 1; got != tc.runs {
					t.Errorf("%d runs, want %d", got, tc.runs)
				}
				if ready, _ := r.Ready("c1"); ready != tc.ready {
					t.Errorf("ready %v", ready)
				}
				if got := strings.Join(r.events, "\n"); got != tc.event {
					t.Errorf("events %.200q, want %.200q", got, tc.event)
				}
			})
		})
	}
}

func TestSlowProbeDoesNotOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"live": func(context.Context, int) (string, int, error) { time.Sleep(25 * time.Second); return "", 0, nil }})
		r.Set(podWith(corev1.Container{LivenessProbe: exec("live", corev1.Probe{})}), "", running("c1"))
		r.after(80)
		if got := r.ran("live"); !slices.Equal(got, []int{10, 35, 60}) {
			t.Errorf("ran at %v", got)
		}
	})
}

func TestEndedProbeCountsForNothing(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(r *rig, pod *corev1.Pod)
	}{
		{"forgotten", func(r *rig, pod *corev1.Pod) { r.Forget(pod.UID) }},
		{"restarted", func(r *rig, pod *corev1.Pod) { r.Set(pod, "", running("c2")) }},
		{"closed", func(r *rig, _ *corev1.Pod) { r.Close() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ended := make(chan time.Duration, 1)
				r := newRig(t, map[string]answer{"live": func(ctx context.Context, _ int) (string, int, error) {
					from := time.Now()
					<-ctx.Done()
					ended <- time.Since(from)
					return "", 1, ctx.Err()
				}})
				pod := podWith(corev1.Container{LivenessProbe: exec("live", corev1.Probe{FailureThreshold: 1})})
				r.Set(pod, "", running("c1"))
				r.after(12)
				tc.end(r, pod)
				synctest.Wait()
				select {
				case took := <-ended:
					if took != 2500*time.Millisecond {
						t.Errorf("ended after %v", took)
					}
				default:
					t.Fatal("the probe in flight goes on")
				}
				if len(r.events) != 0 || r.Failed("c2") != "" || r.changes != 0 {
					t.Errorf("events %q, failed %q, changes %d", r.events, r.Failed("c2"), r.changes)
				}
			})
		})
	}
}

// Twenty pods with three probes each hold no goroutine between their runs.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"ready": code(0), "live": code(0), "start": code(0)})
		for i := range 20 {
			pod := podWith(corev1.Container{
				StartupProbe: exec("start", corev1.Probe{}), ReadinessProbe: exec("ready", corev1.Probe{}), LivenessProbe: exec("live", corev1.Probe{}),
			})
			pod.UID = types.UID(fmt.Sprint(i))
			r.Set(pod, "", running(fmt.Sprint(i)))
		}
		r.after(105)
		if n := len(r.ran("live")); n != 20*9 { // 20, 30, … 100: the start was at 10
			t.Errorf("liveness ran %d times", n)
		}
		stacks := make([]byte, 1<<20)
		if all := string(stacks[:runtime.Stack(stacks, true)]); strings.Contains(all, "probe.(*worker)") || strings.Contains(all, "probe.(*Prober)") {
			t.Errorf("goroutines between runs:\n%s", all)
		}
		if n := r.count(); n != 60 {
			t.Errorf("%v workers", n)
		}
		for i := range 20 {
			r.Forget(types.UID(fmt.Sprint(i)))
		}
		if n := r.count(); n != 0 || len(r.Prober.mu.pods) != 0 {
			t.Errorf("%v workers and %d pods left", n, len(r.Prober.mu.pods))
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, map[string]answer{"ready": failUntil(3)})
		r.Set(podWith(corev1.Container{ReadinessProbe: exec("ready", corev1.Probe{})}), "", running("c1"))
		r.after(35)
		families, err := r.reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "fairlead_pods_probes_total" {
					got[m.GetLabel()[0].GetValue()+" "+m.GetLabel()[1].GetValue()] = m.GetCounter().GetValue()
				}
			}
		}
		if len(got) != 2 || got["Readiness failure"] != 2 || got["Readiness success"] != 2 {
			t.Errorf("counted %v", got)
		}
	})
}

func TestWhatIsProbed(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	p := exec("x", corev1.Probe{})
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		InitContainers: []corev1.Container{{Name: "init", ReadinessProbe: p}, {Name: "sidecar", RestartPolicy: &always, StartupProbe: p}},
		Containers:     []corev1.Container{{Name: "web", LivenessProbe: p}, {Name: "plain"}},
	}}
	for name, want := range map[string]bool{"init": false, "sidecar": true, "web": true, "plain": false, "other": false} {
		if got := probed(pod, name) != nil; got != want {
			t.Errorf("%s is probed: %v", name, got)
		}
	}
}
