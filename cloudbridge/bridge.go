package cloudbridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Config configures a bridge. Kube and Broker are required.
type Config struct {
	// Kube reaches the API server. Where it sets no QPS, 500 with a burst of
	// 1,000 is used: a Lease per node every 10 s is most of it.
	Kube *rest.Config
	// Broker reaches the broker, with the role access.Cloud: Dial or URL,
	// Username and Password, KeepAlive, back-off. The bridge sets the rest.
	Broker client.Config
	// DeviceStatusInterval is the time between two writes of a device's status
	// where only values change; 10 s where it is 0, never less than 1 s.
	DeviceStatusInterval time.Duration
	Metrics              prometheus.Registerer // nil is none
	Logger               *slog.Logger
}

// Validate says what is missing or cannot work.
func (c *Config) Validate() error {
	switch {
	case c.Kube == nil:
		return errors.New("cloudbridge: Kube is required")
	case c.Broker.Dial == nil && c.Broker.URL == "":
		return errors.New("cloudbridge: Broker wants Dial or URL")
	case c.DeviceStatusInterval < 0 || c.DeviceStatusInterval > 0 && c.DeviceStatusInterval < leastStatusInterval:
		return fmt.Errorf("device status interval %s: want %s or more", c.DeviceStatusInterval, leastStatusInterval)
	}
	return nil
}

// leastStatusInterval and usualStatusInterval are the design's law 8.
const (
	leastStatusInterval = time.Second
	usualStatusInterval = 10 * time.Second
)

// Bridge joins one cluster and one broker.
type Bridge struct {
	cfg     Config
	log     *slog.Logger
	in      *informers
	truth   *truth
	desired *desired
	mirror  *mirror
	status  *status
	events  *events
	outbox  *repair.Outbox
	inbox   *repair.Inbox
	client  *client.Client
	metrics *metrics
	session session
	clones  clones

	// start is closed when everything was looked at: before, the workers
	// would publish and write from half a picture.
	start     chan struct{}
	startOnce sync.Once
	ready     atomic.Bool // started, and the broker is connected
	wg        sync.WaitGroup
}

// New checks the configuration. It does not connect.
func New(cfg Config) (*Bridge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.DeviceStatusInterval == 0 {
		cfg.DeviceStatusInterval = usualStatusInterval
	}
	rc := rest.CopyConfig(cfg.Kube)
	if rc.QPS == 0 {
		rc.QPS, rc.Burst = 500, 1000
	}
	dyn, err := dynamic.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	meta, err := metadata.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	rc = rest.CopyConfig(rc)
	rc.ContentType = "application/vnd.kubernetes.protobuf" // half the bytes for Kubernetes' own kinds
	rc.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	kube, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}

	b := &Bridge{cfg: cfg, log: cfg.Logger, truth: newTruth(), start: make(chan struct{})}
	b.mirror = newMirror(b.log, time.Now, linkGrace)
	if b.in, err = newInformers(kube, dyn, meta); err != nil {
		return nil, err
	}
	b.outbox = repair.NewOutbox(repair.OutboxConfig{Direction: topic.Desired, Epoch: repair.NewEpoch(), Get: b.truth.get, Logger: b.log})
	b.inbox = repair.NewInbox(repair.InboxConfig{Direction: topic.Reported, Logger: b.log})
	b.desired = &desired{
		in: b.in, kube: kube, log: b.log, now: time.Now, truth: b.truth, refs: newReferences(),
		touch: b.outbox.Touch, targetRev: b.mirror.targetRev, heal: b.heal, sealKey: b.mirror.sealKey, linkUp: b.mirror.linkUp,
		devices: newQueue(), pods: newQueue(),
	}
	b.status = newStatus(kube, dyn, b.in, b.mirror, b.truth, newPace(leastStatusInterval, cfg.DeviceStatusInterval), b.log)
	b.desired.settled, b.desired.count = b.status.settled, b.status.count
	b.metrics = newMetrics(cfg.Metrics, b)
	b.status.writes = b.metrics.writes
	b.events = newEvents(kube, b.in, b.log, b.status.count, b.metrics.eventDrops)
	if err := b.connectTo(cfg.Broker); err != nil {
		return nil, err
	}
	if err := b.desired.watch(); err != nil {
		return nil, err
	}
	if err := b.status.watch(); err != nil {
		return nil, err
	}
	// A node's digest has to be there before its first topic: a node that
	// comes with old state drops it by an empty digest.
	err = b.in.handle(b.in.nodes, func(name string, _, is any) {
		if is != nil {
			b.outbox.AddNode(name)
		}
	})
	return b, err
}

// Ready tells whether Kubernetes and the broker were read completely and the
// broker is connected.
func (b *Bridge) Ready() bool { return b.ready.Load() }

// Run works until ctx ends. It returns an error only where no retry could help.
func (b *Bridge) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	b.in.run(ctx, b.wg.Go)
	b.worker(ctx, b.desired.runDevices)
	for range podWorkers {
		b.worker(ctx, func() { b.desired.runPods(ctx) })
	}
	for range statusWorkers {
		b.worker(ctx, func() { b.status.run(ctx) })
	}
	for range eventWorkers {
		b.worker(ctx, func() { b.events.run(ctx) })
	}
	err := b.client.Run(ctx) // its connections do the rest, see serve
	cancel()
	b.desired.shutDown()
	b.status.shutDown()
	b.events.shutDown()
	b.wg.Wait()
	return err
}

// worker runs fn from the start on.
func (b *Bridge) worker(ctx context.Context, fn func()) {
	b.wg.Go(func() {
		select {
		case <-b.start:
			fn()
		case <-ctx.Done():
		}
	})
}

// begin looks at everything in Kubernetes once and starts the workers. held is
// what the broker has.
func (b *Bridge) begin(ctx context.Context, held map[topic.Topic][]byte) error {
	b.truth.setBoot(held)
	if err := b.desired.first(ctx); err != nil {
		return err // the connection or the process ended; the next one begins again
	}
	b.truth.setBoot(nil)
	return nil
}

func (b *Bridge) waitSynced(ctx context.Context) bool {
	return cache.WaitForCacheSync(ctx.Done(), b.in.synced...)
}
