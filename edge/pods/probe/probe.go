package probe

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Result is what a probe has found out, after its thresholds.
type Result int8

// Results of a probe.
const (
	Unknown Result = iota
	Success
	Failure
)

func (r Result) String() string {
	switch r {
	case Success:
		return "Success"
	case Failure:
		return "Failure"
	}
	return "Unknown"
}

// Kind is one of the three probes of a container, as it is spelled in events.
type Kind string

// The kinds of probes.
const (
	Startup   Kind = "Startup"
	Readiness Kind = "Readiness"
	Liveness  Kind = "Liveness"
)

var kinds = [...]Kind{Startup, Readiness, Liveness}

// Reasons of the events.
const (
	Unhealthy = "Unhealthy"
	Warned    = "ProbeWarning"
)

// Config of a Prober.
type Config struct {
	// Exec runs a command in a container and gives its output (both streams) and
	// exit code. err is for a command that could not be run, or did not end in
	// time: then it wraps context.DeadlineExceeded or is the runtime's
	// DeadlineExceeded.
	Exec func(ctx context.Context, containerID string, cmd []string, timeout time.Duration) (out []byte, code int, err error)
	// Changed is called, without a lock held, when a result of the pod has changed.
	// It must not block.
	Changed func(types.UID)
	// Event is called for a failed probe, a warning, or one that could not be made;
	// reason is Unhealthy or ProbeWarning, type Warning. It must not block.
	Event func(pod *corev1.Pod, container, reason, message string)

	Metrics prometheus.Registerer // nil is none
	Logger  *slog.Logger
}

// Running is a container that runs.
type Running struct {
	Name  string    // in the pod's spec
	ID    string    // the runtime's, without a scheme
	Since time.Time // when it was started
	// Started: it has been reported as started before. After a restart of the agent
	// that spares it a second startup probe, and what was reported about its
	// readiness holds until there is a result.
	Started bool
}

// Prober runs the probes of the node's pods. Its methods do not block and may be
// called from several goroutines.
type Prober struct {
	cfg      Config
	log      *slog.Logger
	http     *http.Transport
	began    time.Time
	ctx      context.Context // of the probes in flight; Close owns its cancel
	cancel   context.CancelFunc
	flights  sync.WaitGroup
	results  *prometheus.CounterVec
	duration *prometheus.HistogramVec

	mu struct {
		sync.Mutex
		closed bool
		pods   map[types.UID]*podProbes
		byID   map[string]*target
	}
}

// podProbes are the probed containers of a pod, by name.
type podProbes struct {
	targets map[string]*target
	ending  bool
}

// target is a running container with probes. All its fields are guarded by the
// Prober's mutex.
type target struct {
	pod     *corev1.Pod
	spec    *corev1.Container
	id, ip  string
	since   time.Time
	workers map[Kind]*worker
}

// New makes a Prober. It has to be closed.
func New(cfg Config) (*Prober, error) {
	if cfg.Exec == nil || cfg.Changed == nil || cfg.Event == nil {
		return nil, errors.New("probe: Exec, Changed and Event are required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	p := &Prober{
		cfg: cfg, log: cfg.Logger, http: transport(), began: time.Now(),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_pods_probes_total", Help: "Probes made, by kind and result (success, failure, error)."}, []string{"kind", "result"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "fairlead_pods_probe_duration_seconds", Help: "How long probes took, by kind.", Buckets: []float64{.01, .1, 1, 10}}, []string{"kind"}),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.mu.pods, p.mu.byID = map[types.UID]*podProbes{}, map[string]*target{}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{
			p.results, p.duration,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fairlead_pods_probe_workers", Help: "Probes that are due now and then."}, p.count),
		} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// Set declares what runs of a pod now. Probes of containers that were not there
// before begin, those of containers that are not there any more end. A container
// that runs on keeps its results. podIP is where to ask, unless a probe names a host.
func (p *Prober) Set(pod *corev1.Pod, podIP string, running []Running) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.closed {
		return
	}
	pp := p.mu.pods[pod.UID]
	if pp == nil {
		pp = &podProbes{targets: map[string]*target{}}
	}
	pp.ending = pp.ending || pod.DeletionTimestamp != nil
	keep := map[string]bool{}
	for _, r := range running {
		spec := probed(pod, r.Name)
		if spec == nil {
			continue
		}
		keep[r.Name] = true
		t := pp.targets[r.Name]
		if t != nil && t.id == r.ID {
			t.pod, t.ip = pod, podIP
			continue
		}
		if t != nil {
			p.dropLocked(pp, r.Name)
		}
		t = &target{pod: pod, spec: spec, id: r.ID, ip: podIP, since: r.Since, workers: map[Kind]*worker{}}
		pp.targets[r.Name], p.mu.byID[r.ID] = t, t
		for _, k := range kinds {
			if s := probeOf(spec, k); s != nil {
				t.workers[k] = newWorker(p, t, k, s, r.Started)
			}
		}
	}
	for name := range pp.targets {
		if !keep[name] {
			p.dropLocked(pp, name)
		}
	}
	if len(pp.targets) == 0 && !pp.ending {
		delete(p.mu.pods, pod.UID)
		return
	}
	p.mu.pods[pod.UID] = pp
	if pp.ending {
		p.endLocked(pp)
		return
	}
	for _, t := range pp.targets {
		t.scheduleLocked()
	}
}

// Ending stops the liveness and startup probes of a pod that is being ended: it
// dies anyway. Readiness goes on until its containers are gone.
func (p *Prober) Ending(uid types.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pp := p.mu.pods[uid]
	if pp == nil {
		if p.mu.closed {
			return
		}
		pp = &podProbes{targets: map[string]*target{}}
		p.mu.pods[uid] = pp
	}
	pp.ending = true
	p.endLocked(pp)
}

func (p *Prober) endLocked(pp *podProbes) {
	for _, t := range pp.targets {
		for _, k := range []Kind{Startup, Liveness} {
			if w := t.workers[k]; w != nil {
				// Success, so that nothing is killed, and nothing is said about it.
				w.stopLocked()
				if k == Liveness || w.result != Success {
					w.result = Success
				}
				w.hold = true
			}
		}
		t.scheduleLocked()
	}
}

// Forget ends the probes of a pod.
func (p *Prober) Forget(uid types.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pp := p.mu.pods[uid]; pp != nil {
		for name := range pp.targets {
			p.dropLocked(pp, name)
		}
		delete(p.mu.pods, uid)
	}
}

func (p *Prober) dropLocked(pp *podProbes, name string) {
	t := pp.targets[name]
	for _, w := range t.workers {
		w.stopLocked()
		w.gone = true
	}
	delete(pp.targets, name)
	delete(p.mu.byID, t.id)
}

// Close ends all probes and waits for those in flight.
func (p *Prober) Close() {
	p.mu.Lock()
	p.mu.closed = true
	for uid, pp := range p.mu.pods {
		for name := range pp.targets {
			p.dropLocked(pp, name)
		}
		delete(p.mu.pods, uid)
	}
	p.mu.Unlock()
	p.cancel()
	p.flights.Wait()
	p.http.CloseIdleConnections()
}

// Started tells whether the startup probe of a container has succeeded; it has
// where there is none. known is false for a container without any probes.
func (p *Prober) Started(containerID string) (started, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.mu.byID[containerID]
	if t == nil {
		return false, false
	}
	return t.startedLocked(), true
}

// Ready tells whether the readiness probe of a container has succeeded; it has
// where there is none. known is false for a container without any probes, and
// where the agent was restarted and has no result yet.
func (p *Prober) Ready(containerID string) (ready, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.mu.byID[containerID]
	if t == nil {
		return false, false
	}
	w := t.workers[Readiness]
	if w == nil {
		return true, true
	}
	return w.result == Success, w.result != Unknown
}

// Live tells what the liveness probe of a container says: Success until it has
// failed, Unknown where there is none.
func (p *Prober) Live(containerID string) Result {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.mu.byID[containerID]; t != nil && t.workers[Liveness] != nil {
		return t.workers[Liveness].result
	}
	return Unknown
}

// Failed names the probe that wants the container killed: LivenessProbe or
// StartupProbe, else "".
func (p *Prober) Failed(containerID string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if t := p.mu.byID[containerID]; t != nil {
		for _, k := range []Kind{Liveness, Startup} {
			if w := t.workers[k]; w != nil && w.result == Failure {
				return string(k) + "Probe"
			}
		}
	}
	return ""
}

func (p *Prober) count() float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, t := range p.mu.byID {
		n += len(t.workers)
	}
	return float64(n)
}

func (t *target) startedLocked() bool {
	w := t.workers[Startup]
	return w == nil || w.result == Success
}

// scheduleLocked arms what has to run and is not armed yet.
func (t *target) scheduleLocked() {
	started := t.startedLocked()
	for k, w := range t.workers {
		if (k == Startup) != started {
			w.armLocked()
		}
	}
}

// probed gives the spec of a container that is probed: regular or sidecar, with a
// probe; else nil.
func probed(pod *corev1.Pod, name string) *corev1.Container {
	has := func(c *corev1.Container) bool {
		return c.Name == name && (c.StartupProbe != nil || c.ReadinessProbe != nil || c.LivenessProbe != nil)
	}
	for i := range pod.Spec.Containers {
		if c := &pod.Spec.Containers[i]; has(c) {
			return c
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if has(c) && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			return c
		}
	}
	return nil
}

func probeOf(c *corev1.Container, k Kind) *corev1.Probe {
	switch k {
	case Startup:
		return c.StartupProbe
	case Readiness:
		return c.ReadinessProbe
	}
	return c.LivenessProbe
}

// random is a part of a period.
func random(period time.Duration) time.Duration {
	return time.Duration(rand.Int64N(int64(period)))
}
