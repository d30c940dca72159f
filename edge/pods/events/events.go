package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/types"
)

// Ref says which object an event is about.
type Ref struct {
	Kind string // Pod, Node
	// Namespace is empty for a Node.
	Namespace, Name string
	UID             types.UID
	// FieldPath is the part of the object, such as spec.containers{app}.
	FieldPath string
}

// Event is a core/v1 Event on its way to the cloud, which makes or patches the
// one whose name is ID. Two with the same ID are the same Event; the later one,
// with the higher Count, is how it is now.
type Event struct {
	ID              string
	Ref             Ref
	Reason, Message string
	Type            string // Normal or Warning
	First, Last     time.Time
	Count           int
	Component       string
}

// Config says where events go. Component and Publish must be set.
type Config struct {
	// Component is the source of the events.
	Component string
	// Publish takes one event after the other, in order. An event that it
	// refuses is dropped and counted: its next repetition says the same.
	Publish func(Event) error
	// Queue is how many events may wait for Publish; beyond it new ones are
	// dropped and counted, while repetitions of waiting ones replace them.
	// Default 1000.
	Queue   int
	Logger  *slog.Logger
	Metrics prometheus.Registerer // nil: none
	// Now is the clock, time.Now if nil.
	Now func() time.Time
}

// Recorder turns what happens into events. Its methods may be called from several
// goroutines.
type Recorder struct {
	cfg Config
	log *slog.Logger

	mu struct {
		sync.Mutex
		*correlator
		queue   []string          // the IDs that wait, oldest first
		waiting map[string]*Event // by ID
		failing bool
	}
	wake chan struct{}

	published prometheus.Counter
	dropped   *prometheus.CounterVec
}

// New makes a recorder. Run publishes.
func New(cfg Config) (*Recorder, error) {
	if cfg.Component == "" || cfg.Publish == nil {
		return nil, errors.New("events: Config needs Component and Publish")
	}
	if cfg.Queue == 0 {
		cfg.Queue = 1000
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Recorder{cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1),
		published: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_pods_events_published_total", Help: "Kubernetes events that were given to the bus."}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_pods_events_dropped_total",
			Help: "Kubernetes events that were not published: spam for those beyond an object's rate, full for those beyond the queue, refused for those that the bus did not take."}, []string{"cause"}),
	}
	for _, c := range []string{"spam", "full", "refused"} {
		r.dropped.WithLabelValues(c)
	}
	r.mu.correlator = newCorrelator()
	r.mu.waiting = map[string]*Event{}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{r.published, r.dropped} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("events: register metrics: %w", err)
			}
		}
	}
	return r, nil
}

// Event records that something happened to an object. It does not block. typ is
// corev1.EventTypeNormal or corev1.EventTypeWarning.
func (r *Recorder) Event(obj Ref, typ, reason, message string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ev, ok := r.mu.correlate(Event{Ref: obj, Type: typ, Reason: reason, Message: message, Component: r.cfg.Component}, r.cfg.Now())
	if !ok {
		r.dropped.WithLabelValues("spam").Inc()
		return
	}
	if w := r.mu.waiting[ev.ID]; w != nil {
		*w = ev
		return
	}
	if len(r.mu.queue) >= r.cfg.Queue {
		r.dropped.WithLabelValues("full").Inc()
		return
	}
	r.mu.queue = append(r.mu.queue, ev.ID)
	r.mu.waiting[ev.ID] = &ev
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Eventf is Event with a format.
func (r *Recorder) Eventf(obj Ref, typ, reason, format string, args ...any) {
	r.Event(obj, typ, reason, fmt.Sprintf(format, args...))
}

// Run publishes until ctx ends, then what still waits, and returns.
func (r *Recorder) Run(ctx context.Context) {
	for {
		for {
			ev, ok := r.next()
			if !ok {
				break
			}
			r.publish(ev)
		}
		select {
		case <-r.wake:
		case <-ctx.Done():
			for ev, ok := r.next(); ok; ev, ok = r.next() {
				r.publish(ev)
			}
			return
		}
	}
}

func (r *Recorder) next() (Event, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.mu.queue) == 0 {
		return Event{}, false
	}
	id := r.mu.queue[0]
	if r.mu.queue = r.mu.queue[1:]; len(r.mu.queue) == 0 {
		r.mu.queue = nil // gives the array back
	}
	ev := *r.mu.waiting[id]
	delete(r.mu.waiting, id)
	return ev, true
}

func (r *Recorder) publish(ev Event) {
	err := r.cfg.Publish(ev)
	r.mu.Lock()
	was := r.mu.failing
	r.mu.failing = err != nil
	r.mu.Unlock()
	if err == nil {
		r.published.Inc()
		return
	}
	r.dropped.WithLabelValues("refused").Inc()
	if !was { // a full disk refuses all of them: once is enough
		r.log.Warn("Kubernetes events cannot be published and are dropped until the bus takes them again",
			"object", strings.Trim(ev.Ref.Namespace+"/"+ev.Ref.Name, "/"), "reason", ev.Reason, "err", err)
	}
}
