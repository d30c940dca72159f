package evict

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// Reason is the status reason of evicted and of refused pods, and of the event.
const Reason = "Evicted"

// ThresholdMet is the reason of the node's event about an eviction threshold.
const ThresholdMet = "EvictionThresholdMet"

const (
	interval = 10 * time.Second
	// limitsEvery is how often folders are walked for limits of local storage.
	limitsEvery = time.Minute
	// hardGrace is what a pod gets when there is no time to lose, in seconds.
	hardGrace = 1
	// killTime is how long an eviction is waited for beyond the pod's grace.
	killTime = 30 * time.Second

	defaultTransition = 5 * time.Minute
)

// Config says what is watched and how pods are known and killed. Observe, Pods,
// Usage and Evict are required.
type Config struct {
	Thresholds []Threshold
	// Transition is how long a pressure condition stays after its threshold was last
	// met; 5 min where it is 0.
	Transition time.Duration
	// MaxGrace bounds the grace period in seconds of pods that go by a soft
	// threshold; 0 kills them at once.
	MaxGrace int64

	// Observe reads the signals. It tells whether the images are on another file
	// system than the node's data. Signals that it cannot read it leaves out.
	Observe func() (o Observations, dedicatedImageFS bool, err error)
	// Wake says that a look before the next interval is worth it; nil is never.
	Wake <-chan struct{}
	// Pods gives the pods that are not in a terminal phase.
	Pods func() []*corev1.Pod
	// Usage measures the pods given; one that it knows nothing of it leaves out.
	Usage func(ctx context.Context, pods []*corev1.Pod, what What) map[types.UID]PodUsage
	// Evict kills a pod and gives it its status and its event. It returns when the
	// pod is dead and its volumes are gone, or with an error when ctx ends before.
	Evict func(ctx context.Context, e Eviction) error
	// FreeContainers removes dead containers, FreeImages images that nobody uses;
	// they go before pods do. Nil is nothing to free.
	FreeContainers, FreeImages func(ctx context.Context) error
	// Event tells of the node; nil for nobody.
	Event func(eventType, reason, message string)
	// Changed is told when Conditions gives others than before; nil for nobody. It
	// must not block.
	Changed func()

	Metrics prometheus.Registerer // nil is none
	Log     *slog.Logger          // nil is none
}

// Eviction is the end of one pod. Its status becomes Failed with Reason and
// Message; its event is a Warning of the same with the annotations.
type Eviction struct {
	Pod     *corev1.Pod
	Reason  string
	Message string
	// Grace replaces the pod's grace period, in seconds.
	Grace       int64
	Annotations map[string]string
	// Condition is DisruptionTarget for pods that go though they did nothing wrong;
	// nil for those that exceeded a limit of their own.
	Condition *corev1.PodCondition
}

// Manager watches the node's resources.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	evicted *prometheus.CounterVec

	// Of the loop alone.
	firstMet []met1      // thresholds crossed, and since when
	pending  []Threshold // those whose grace is over, until MinReclaim is free
	limitsAt time.Time   // the next look at limits of local storage

	mu struct {
		sync.Mutex
		seen       map[corev1.NodeConditionType]time.Time // when its threshold was last met
		conditions []corev1.NodeCondition
	}
}

type met1 struct {
	Threshold
	at time.Time
}

// New gives a manager that says "no pressure" until Run has looked.
func New(cfg Config) *Manager {
	m := &Manager{cfg: cfg, log: cfg.Log}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	if m.cfg.Transition == 0 {
		m.cfg.Transition = defaultTransition
	}
	m.evicted = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "fairlead_pods_evictions_total", Help: "Pods evicted, by the signal or the limit that was exceeded.",
	}, []string{"signal"})
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(m.evicted)
	}
	m.mu.seen = map[corev1.NodeConditionType]time.Time{}
	m.setConditions(time.Now())
	return m
}

// Run watches until ctx ends.
func (m *Manager) Run(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for ctx.Err() == nil {
		if m.look(ctx) {
			continue // a pod has gone: see at once whether it was enough
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-m.cfg.Wake:
		}
	}
}

// look does one round and tells whether a pod was evicted.
func (m *Manager) look(ctx context.Context) bool {
	o, dedicated, err := m.cfg.Observe()
	if err != nil {
		m.log.Warn("the node's resources cannot be read; what can be is watched", "error", err)
	}
	now := time.Now()
	crossed := merge(met(m.cfg.Thresholds, o, false), met(m.pending, o, true))
	m.firstMet = since(crossed, m.firstMet, now)
	m.pending = nil
	for _, t := range m.firstMet {
		if now.Sub(t.at) >= t.Grace {
			m.pending = append(m.pending, t.Threshold)
		}
	}
	m.press(crossed, now)

	pods := m.cfg.Pods()
	if !now.Before(m.limitsAt) {
		m.limitsAt = now.Add(limitsEvery)
		if m.limits(ctx, pods, dedicated) {
			return true
		}
	}
	if len(m.pending) == 0 {
		return false
	}
	t := m.pending[0]
	for _, p := range m.pending {
		if p.Signal.resource() == corev1.ResourceMemory {
			t = p // nothing is as urgent
			break
		}
	}
	return m.reclaim(ctx, t, o, dedicated, pods)
}

// since keeps from when thresholds are crossed.
func since(crossed []Threshold, before []met1, now time.Time) []met1 {
	var out []met1
	for _, t := range crossed {
		at := now
		if i := slices.IndexFunc(before, func(b met1) bool { return b.same(t) }); i >= 0 {
			at = before[i].at
		}
		out = append(out, met1{t, at})
	}
	return out
}

// reclaim frees what the threshold wants, by a pod if nothing else does.
func (m *Manager) reclaim(ctx context.Context, t Threshold, o Observations, dedicated bool, pods []*corev1.Pod) bool {
	name := t.Signal.resource()
	m.log.Warn("the node is low on a resource", "resource", name, "signal", t.Signal,
		"available", o[t.Signal].Available, "capacity", o[t.Signal].Capacity)
	if m.cfg.Event != nil {
		m.cfg.Event(corev1.EventTypeWarning, ThresholdMet, fmt.Sprintf("Attempting to reclaim %s", name))
	}
	if m.freeUnused(ctx, t, dedicated) {
		m.log.Info("enough was freed without a pod", "resource", name)
		return false
	}
	if len(pods) == 0 {
		m.log.Error("the node is low on a resource and has no pod to evict", "resource", name)
		return false
	}
	what := Disk
	switch name {
	case corev1.ResourceMemory:
		what = Memory
	case pids:
		what = PIDs
	}
	pods = slices.Clone(pods)
	u := usages(m.cfg.Usage(ctx, pods, what))
	rank(pods, t.Signal, u, dedicated)
	for _, p := range pods {
		grace := int64(hardGrace)
		if t.Grace > 0 {
			grace = m.cfg.MaxGrace
			if g := p.Spec.TerminationGracePeriodSeconds; g != nil {
				grace = min(grace, *g)
			}
		}
		message, annotations := explain(name, p, u, m.pending, o)
		done := m.evict(ctx, string(t.Signal), Eviction{
			Pod: p, Message: message, Grace: grace, Annotations: annotations,
			Condition: &corev1.PodCondition{
				Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, ObservedGeneration: p.Generation,
				Reason: corev1.PodReasonTerminationByKubelet, Message: message,
			},
		})
		if done {
			return true
		}
	}
	m.log.Error("no pod could be evicted", "resource", name)
	return false
}

// freeUnused frees what no pod needs and tells whether that was enough.
func (m *Manager) freeUnused(ctx context.Context, t Threshold, dedicated bool) bool {
	if t.Signal.condition() != corev1.NodeDiskPressure {
		return false
	}
	if dedicated && (t.Signal == NodeFSAvailable || t.Signal == NodeFSInodes) {
		return false // images and layers are elsewhere
	}
	for _, free := range []func(context.Context) error{m.cfg.FreeContainers, m.cfg.FreeImages} {
		if free == nil {
			continue
		}
		if err := free(ctx); err != nil {
			m.log.Warn("not all that is unused could be freed", "error", err)
		}
	}
	o, _, err := m.cfg.Observe()
	return err == nil && len(met(m.cfg.Thresholds, o, true)) == 0
}

// evict kills a pod, unless it is critical, and tells whether it is gone.
func (m *Manager) evict(ctx context.Context, signal string, e Eviction) bool {
	log := m.log.With("pod", e.Pod.Namespace+"/"+e.Pod.Name)
	if spec.Critical(e.Pod) {
		log.Error("a critical pod would have to be evicted; it stays")
		return false
	}
	e.Reason = Reason
	log.Warn("evicting pod", "message", e.Message)
	limited, cancel := context.WithTimeout(ctx, time.Duration(e.Grace)*time.Second+killTime)
	defer cancel()
	m.evicted.WithLabelValues(signal).Inc()
	if err := m.cfg.Evict(limited, e); err != nil {
		if !errors.Is(err, context.Canceled) {
			log.Error("evicted pod does not end", "error", err)
		}
		return false
	}
	return true
}

// Admit gives the reason and message with which a pod is refused now; empty ones
// where it may start.
func (m *Manager) Admit(p *corev1.Pod) (reason, message string) {
	m.mu.Lock()
	var under []corev1.NodeConditionType
	for _, c := range m.mu.conditions {
		if c.Status == corev1.ConditionTrue {
			under = append(under, c.Type)
		}
	}
	m.mu.Unlock()
	if len(under) == 0 || spec.Critical(p) {
		return "", ""
	}
	if len(under) == 1 && under[0] == corev1.NodeMemoryPressure {
		if spec.QOS(p) != corev1.PodQOSBestEffort {
			return "", ""
		}
		for i := range p.Spec.Tolerations {
			t := &p.Spec.Tolerations[i]
			if (t.Effect == "" || t.Effect == corev1.TaintEffectNoSchedule) &&
				(t.Key == corev1.TaintNodeMemoryPressure && (t.Operator == corev1.TolerationOpExists || t.Value == "") ||
					t.Key == "" && t.Operator == corev1.TolerationOpExists) {
				return "", ""
			}
		}
	}
	return Reason, fmt.Sprintf("The node had condition: %v. ", under)
}

// Conditions are MemoryPressure, DiskPressure and PIDPressure with the kubelet's
// reasons and messages. Nobody may change what it gives.
func (m *Manager) Conditions() []corev1.NodeCondition {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.conditions
}

// press notes the conditions of the thresholds that are crossed.
func (m *Manager) press(crossed []Threshold, now time.Time) {
	m.mu.Lock()
	for _, t := range crossed {
		m.mu.seen[t.Signal.condition()] = now
	}
	m.mu.Unlock()
	changed := m.setConditions(now)
	for _, c := range changed {
		if c.Status == corev1.ConditionTrue {
			m.log.Warn("node is under pressure", "condition", c.Type)
		} else {
			m.log.Info("node is no longer under pressure", "condition", c.Type)
		}
	}
	if len(changed) > 0 && m.cfg.Changed != nil {
		m.cfg.Changed()
	}
}

func (m *Manager) setConditions(now time.Time) (changed []corev1.NodeCondition) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := make([]corev1.NodeCondition, 0, len(pressureWords))
	for _, w := range pressureWords {
		c := corev1.NodeCondition{Type: w.condition, Status: corev1.ConditionFalse, Reason: w.no, Message: w.noMessage, LastTransitionTime: metav1.NewTime(now)}
		if at, ok := m.mu.seen[w.condition]; ok && now.Sub(at) < m.cfg.Transition {
			c.Status, c.Reason, c.Message = corev1.ConditionTrue, w.yes, w.yesMessage
		}
		i := slices.IndexFunc(m.mu.conditions, func(o corev1.NodeCondition) bool { return o.Type == c.Type })
		switch {
		case i < 0:
		case m.mu.conditions[i].Status == c.Status:
			c.LastTransitionTime = m.mu.conditions[i].LastTransitionTime
		default:
			changed = append(changed, c)
		}
		next = append(next, c)
	}
	m.mu.conditions = next
	return changed
}

// pressureWords are the kubelet's, where tools look for them.
var pressureWords = []struct {
	condition                      corev1.NodeConditionType
	yes, yesMessage, no, noMessage string
}{
	{corev1.NodeMemoryPressure, "KubeletHasInsufficientMemory", "kubelet has insufficient memory available", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"},
	{corev1.NodeDiskPressure, "KubeletHasDiskPressure", "kubelet has disk pressure", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"},
	{corev1.NodePIDPressure, "KubeletHasInsufficientPID", "kubelet has insufficient PID available", "KubeletHasSufficientPID", "kubelet has sufficient PID available"},
}
