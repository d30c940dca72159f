package shutdown

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// What the kubelet says of pods that end, or are refused, because the node goes down.
const (
	Reason          = "Terminated"
	Message         = "Pod was terminated in response to imminent node shutdown."
	RefusedReason   = "NodeShutdown"
	RefusedMessage  = "Pod was rejected as the node is shutting down."
	eventReason     = "Shutdown"
	systemPriority  = 2_000_000_000
	defaultPriority = 0
)

// Period is how long pods of a priority, up to that of the next period, may take.
type Period struct {
	Priority int32
	Grace    time.Duration // whole seconds
}

// Periods are those of the kubelet's shutdownGracePeriod and
// shutdownGracePeriodCriticalPods: the second is the part of the first that is
// kept for critical pods. None where total is 0.
func Periods(total, critical time.Duration) ([]Period, error) {
	if total < 0 || critical < 0 || critical > total {
		return nil, fmt.Errorf("shutdown grace period %s with %s of it for critical pods: want the whole above 0 and the part no longer than it", total, critical)
	}
	if total == 0 {
		return nil, nil
	}
	return []Period{{defaultPriority, (total - critical).Truncate(time.Second)}, {systemPriority, critical.Truncate(time.Second)}}, nil
}

// Config says how long pods have and how they are ended.
type Config struct {
	// Periods are by priority; without any, nothing is done.
	Periods []Period
	// Pods gives the pods that are not in a terminal phase.
	Pods func() []*corev1.Pod
	// Kill ends a pod and returns when it is dead and its volumes are gone, or when
	// ctx ends. It may be called for several pods at once.
	Kill func(ctx context.Context, t Termination) error
	// Event tells of the node; nil for nobody.
	Event func(eventType, reason, message string)
	// Changed is told when ShuttingDown changes; nil for nobody. It must not block.
	Changed func()
	// Bus is the address of logind's D-Bus; empty is the system bus.
	Bus string
	// LogindConf is the folder of logind's configuration, where it is told to wait as
	// long as the periods are; empty is /etc/systemd/logind.conf.d.
	LogindConf string
	Log        *slog.Logger // nil is none
}

// Termination is the end of one pod: the kubelet makes it Failed with Reason and
// Message, unless it has succeeded.
type Termination struct {
	Pod *corev1.Pod
	// Grace replaces the pod's grace period, in seconds.
	Grace     int64
	Reason    string
	Message   string
	Condition corev1.PodCondition // DisruptionTarget
}

// Manager ends pods when the node goes down.
type Manager struct {
	cfg   Config
	log   *slog.Logger
	kills sync.WaitGroup // those that took longer than their period

	mu struct {
		sync.Mutex
		down bool
	}
}

// New gives a manager; Run makes it listen.
func New(cfg Config) *Manager {
	m := &Manager{cfg: cfg, log: cfg.Log}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.cfg.Periods = slices.Clone(cfg.Periods)
	slices.SortFunc(m.cfg.Periods, func(a, b Period) int { return cmp.Compare(a.Priority, b.Priority) })
	return m
}

// ShuttingDown tells whether the node goes down: it is not ready then.
func (m *Manager) ShuttingDown() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.down
}

// Admit gives the reason and message with which pods are refused now; empty ones
// while the node stays up.
func (m *Manager) Admit() (reason, message string) {
	if m.ShuttingDown() {
		return RefusedReason, RefusedMessage
	}
	return "", ""
}

func (m *Manager) set(down bool) {
	m.mu.Lock()
	changed := m.mu.down != down
	m.mu.down = down
	m.mu.Unlock()
	if !changed {
		return
	}
	what := "cancellation"
	if down {
		what = "event"
	}
	m.log.Warn("node shutdown", "down", down)
	if m.cfg.Event != nil {
		m.cfg.Event(corev1.EventTypeNormal, eventReason, "Shutdown manager detected shutdown "+what)
	}
	if m.cfg.Changed != nil {
		m.cfg.Changed()
	}
}

// Terminate says that the node goes down and ends all pods, group by group. It
// returns when they have ended, or when the last period is over.
func (m *Manager) Terminate(ctx context.Context) {
	m.set(true)
	for i, pods := range m.groups(m.cfg.Pods()) {
		if len(pods) == 0 || ctx.Err() != nil {
			continue
		}
		m.end(ctx, m.cfg.Periods[i], pods)
	}
}

// groups gives the pods of each period: one whose priority lies between two
// belongs to the lower.
func (m *Manager) groups(pods []*corev1.Pod) [][]*corev1.Pod {
	if len(m.cfg.Periods) == 0 {
		return nil
	}
	groups := make([][]*corev1.Pod, len(m.cfg.Periods))
	for _, p := range pods {
		var priority int32
		if p.Spec.Priority != nil {
			priority = *p.Spec.Priority
		}
		i, found := slices.BinarySearchFunc(m.cfg.Periods, priority, func(p Period, x int32) int { return cmp.Compare(p.Priority, x) })
		if !found {
			i = max(i-1, 0)
		}
		groups[i] = append(groups[i], p)
	}
	return groups
}

// end kills the pods and waits for them as long as their period is.
func (m *Manager) end(ctx context.Context, period Period, pods []*corev1.Pod) {
	var group sync.WaitGroup
	for _, p := range pods {
		grace := int64(period.Grace / time.Second)
		if g := p.Spec.TerminationGracePeriodSeconds; g != nil {
			grace = min(grace, *g)
		}
		t := Termination{Pod: p, Grace: grace, Reason: Reason, Message: Message, Condition: corev1.PodCondition{
			Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, ObservedGeneration: p.Generation,
			Reason: corev1.PodReasonTerminationByKubelet, Message: Message,
		}}
		group.Add(1)
		m.kills.Go(func() {
			defer group.Done()
			if err := m.cfg.Kill(ctx, t); err != nil && !errors.Is(err, context.Canceled) {
				m.log.Error("pod does not end before the node goes down", "pod", p.Namespace+"/"+p.Name, "error", err)
			}
		})
	}
	done := make(chan struct{})
	m.kills.Go(func() { group.Wait(); close(done) })
	timer := time.NewTimer(period.Grace)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		m.log.Warn("pods have not ended in time", "priority", period.Priority, "period", period.Grace)
	case <-ctx.Done():
	}
}

// total is how long the periods are together.
func (m *Manager) total() (d time.Duration) {
	for _, p := range m.cfg.Periods {
		d += p.Grace
	}
	return d
}
