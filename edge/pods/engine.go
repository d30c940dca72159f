package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/edge/pods/cgroup"
	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/events"
	"github.com/fairlead-io/fairlead/edge/pods/evict"
	"github.com/fairlead-io/fairlead/edge/pods/gc"
	"github.com/fairlead-io/fairlead/edge/pods/image"
	"github.com/fairlead-io/fairlead/edge/pods/logs"
	"github.com/fairlead-io/fairlead/edge/pods/probe"
	"github.com/fairlead-io/fairlead/edge/pods/shutdown"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/edge/pods/volume"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Config configures the engine. Node, Dir, Bus, Runtime and Key are required.
type Config struct {
	// Node is the node's name.
	Node string
	// Dir is the agent's data folder; the pods' is <Dir>/pods.
	Dir string
	// Bus is the node's broker.
	Bus Bus
	// Runtime is the CRI socket, such as unix:///run/containerd/containerd.sock.
	Runtime string
	// Key opens what the cloud sealed.
	Key *seal.Key
	// LogRoot holds the pods' log folders; /var/log/pods where it is empty.
	LogRoot string
	// LogLinks gets a link to every container's log, for log collectors, such as
	// /var/log/containers; empty for none.
	LogLinks string
	// CgroupRoot is the cgroup that kubepods is made in; /fairlead where it is empty,
	// so that a kubelet on the same machine has its own.
	CgroupRoot string
	// StaticPods is a folder of pod manifests that the node runs by itself; empty
	// for none.
	StaticPods string
	// ClusterDNS and ClusterDomain are for pods with dnsPolicy ClusterFirst.
	ClusterDNS    []string
	ClusterDomain string
	// Host describes the node; it is asked again and again. Its runtime fields are
	// the engine's to fill.
	Host func() spec.Node
	// ParallelPulls is how many images are pulled at once; 1 where it is 0.
	ParallelPulls int
	// Thresholds are those of eviction. EvictionGrace bounds the grace period, in
	// seconds, of pods that go by a soft one.
	Thresholds    []evict.Threshold
	EvictionGrace int64
	// Shutdown are the periods of the node's graceful shutdown; none is none.
	Shutdown []shutdown.Period
	// Reserved is kept from pods for the system and the agent, without what eviction
	// keeps free.
	Reserved corev1.ResourceList
	// Changed is told when State gives something else; nil for nobody. It must not block.
	Changed func()
	// Settled tells whether the bus has the whole desired state: before, nothing is
	// ended for not being in it. nil is always.
	Settled func() bool

	Metrics prometheus.Registerer // nil is none
	Logger  *slog.Logger
}

// Engine runs the pods of a node.
type Engine struct {
	cfg      Config
	log      *slog.Logger
	bus      Bus
	in       *inbox
	out      *outbox
	cri      *cri.Client
	objects  *objects
	volumes  *volume.Volumes
	probes   *probe.Prober
	images   *image.Images
	logs     *logs.Rotator
	gc       *gc.Collector
	events   *events.Recorder
	tree     *cgroup.Tree
	gate     *gate
	host     *evict.Host
	evictor  *evict.Manager
	shutdown *shutdown.Manager
	halting  atomic.Bool // the node goes down
	metrics  *metrics

	driver      string // of the cgroups
	began       time.Time
	limits      cgroup.Limits
	node        atomic.Pointer[spec.Node]
	runtimeErr  atomic.Pointer[error]
	state       atomic.Pointer[State]
	imageFolder atomic.Pointer[string]
	ctx         context.Context // of the workers; Run owns its cancel
	workers     sync.WaitGroup
	stopped     atomic.Bool
	relistNow   chan struct{}
	prints      map[types.UID]string // what the last relist saw, by pod
	// spared are pods that nobody here knows and that are not left over all the
	// same: somebody else's, and those whose description cannot be read.
	spared     atomic.Pointer[map[types.UID]bool]
	staticRead atomic.Bool // the folder of static pods was read once
	// pressure is evictor, for those who ask before it is there.
	pressure atomic.Pointer[evict.Manager]

	mu struct {
		sync.Mutex
		pods    map[types.UID]*pod
		desired map[string]*pod           // by namespace/name: who has the name now
		ids     map[string]types.UID      // by sandbox or container
		logs    map[types.UID][]logs.Live // of the containers that run
	}
}

// New makes the engine. It does not touch the runtime yet.
func New(cfg Config) (*Engine, error) {
	if cfg.Node == "" || cfg.Dir == "" || cfg.Bus == nil || cfg.Runtime == "" || cfg.Key == nil || cfg.Host == nil {
		return nil, errors.New("pods: Node, Dir, Bus, Runtime, Key and Host are required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.LogRoot == "" {
		cfg.LogRoot = "/var/log/pods"
	}
	if cfg.CgroupRoot == "" {
		cfg.CgroupRoot = "/fairlead"
	}
	if cfg.Settled == nil {
		cfg.Settled = func() bool { return true }
	}
	e := &Engine{
		cfg: cfg, log: cfg.Logger, bus: cfg.Bus, in: newInbox(), out: newOutbox(cfg.Bus, cfg.Logger),
		objects:   &objects{node: cfg.Node, bus: cfg.Bus, key: cfg.Key},
		relistNow: make(chan struct{}, 1), gate: newGate(2 * runtime.NumCPU()),
	}
	e.mu.pods, e.mu.desired = map[types.UID]*pod{}, map[string]*pod{}
	e.mu.ids, e.mu.logs = map[string]types.UID{}, map[types.UID][]logs.Live{}
	var err error
	if e.metrics, err = newMetrics(cfg.Metrics, e); err != nil {
		return nil, err
	}
	e.events, err = events.New(events.Config{Component: component, Publish: e.publish, Logger: e.log, Metrics: cfg.Metrics})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// component is the source of the Kubernetes events, as the stock kubelet's is.
const component = "kubelet"

func (e *Engine) podsDir() string { return filepath.Join(e.cfg.Dir, "pods") }

func (e *Engine) stopping() bool { return e.stopped.Load() }

// settled tells whether what is not desired may be ended.
func (e *Engine) settled() bool {
	return e.cfg.Settled() && (e.cfg.StaticPods == "" || e.staticRead.Load())
}

// publish carries an event to the bus.
func (e *Engine) publish(ev events.Event) error {
	ns := ev.Ref.Namespace
	if ns == "" {
		ns = metav1.NamespaceDefault
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(e.ctx), 10*time.Second)
	defer cancel()
	return e.bus.Publish(ctx, broker.Message{
		Topic: topic.EventKubernetes(e.cfg.Node, ns, ev.Ref.Kind, ev.Ref.Name),
		Payload: payload.Encode(payload.KubernetesEvent{
			ID: ev.ID, Kind: ev.Ref.Kind, Namespace: ev.Ref.Namespace, Name: ev.Ref.Name, UID: string(ev.Ref.UID), FieldPath: ev.Ref.FieldPath,
			Reason: ev.Reason, Message: ev.Message, Type: ev.Type,
			First: ev.First.UnixMilli(), Last: ev.Last.UnixMilli(), Count: int32(ev.Count), Component: ev.Component,
		}),
		QoS: 1,
	})
}

// podRef and containerRef name what an event is about.
func podRef(p *corev1.Pod) events.Ref {
	return events.Ref{Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID}
}

func containerRef(spec *corev1.Pod, c *corev1.Container) events.Ref {
	r := podRef(spec)
	field := "containers"
	for i := range spec.Spec.InitContainers {
		if spec.Spec.InitContainers[i].Name == c.Name {
			field = "initContainers"
		}
	}
	for i := range spec.Spec.EphemeralContainers {
		if spec.Spec.EphemeralContainers[i].Name == c.Name {
			field = "ephemeralContainers"
		}
	}
	r.FieldPath = fmt.Sprintf("spec.%s{%s}", field, c.Name)
	return r
}

func (p *pod) event(r events.Ref, typ, reason, message string) {
	p.e.events.Event(r, typ, reason, message)
}

// exec runs a command in a container; timeout 0 is none. The error says how the
// command failed.
func (e *Engine) exec(ctx context.Context, id string, cmd []string, timeout time.Duration) ([]byte, error) {
	out, code, err := e.execCode(ctx, id, cmd, timeout)
	if err == nil && code != 0 {
		err = fmt.Errorf("command '%s' exited with %d: %s", joinArgs(cmd), code, out)
	}
	return out, err
}

// Run runs the pods until ctx ends. Containers outlive it: that is the point. An
// error is one that no retry could help.
func (e *Engine) Run(ctx context.Context) error {
	if err := os.MkdirAll(e.podsDir(), 0o750); err != nil {
		return fmt.Errorf("the pods' folder: %w", err)
	}
	workers, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	e.ctx, e.began = workers, time.Now()
	if err := e.connect(); err != nil {
		return err
	}
	defer func() { _ = e.cri.Close() }()
	g, gctx := errgroup.WithContext(ctx)
	outCtx, stopOut := context.WithCancel(context.WithoutCancel(ctx))
	defer stopOut()
	var outs sync.WaitGroup
	outs.Go(func() { e.out.run(outCtx) })
	outs.Go(func() { e.events.Run(outCtx) })
	g.Go(func() error { return e.loop(gctx) })
	err := g.Wait()
	e.stopped.Store(true)
	cancel() // the workers stop where they are; the runtime has what they did
	for _, p := range e.all() {
		p.wakeAt(time.Time{})
	}
	e.workers.Wait()
	e.probes.Close()
	stopOut()
	outs.Wait()
	return err
}
