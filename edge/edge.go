package edge

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/edge/link"
	"github.com/fairlead-io/fairlead/edge/node"
	"github.com/fairlead-io/fairlead/edge/twin"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Config configures the agent. Node and Dir are required.
type Config struct {
	// Node is the node's name, a Kubernetes name.
	Node string
	// Dir is the data folder: the store, the mappers' token.
	Dir string
	// MQTT are the bus's listeners, as broker.Listen reads them.
	MQTT []string
	// Cloud is the cloud broker's address; empty for none.
	Cloud string
	// CloudCA holds the certificates that may have signed the cloud broker's;
	// the system's where it is empty.
	CloudCA string
	// TokenFile holds the node's credential for the cloud.
	TokenFile string
	// KeepAlive is the link's; 30 s where it is 0.
	KeepAlive time.Duration
	// Checkpoint is how often readings are written; 60 s where it is 0.
	Checkpoint time.Duration
	// EventBytes and EventAge bound the log of events that wait for the cloud; the
	// oldest are dropped beyond them. 64 MiB and 7 days where they are 0. Without
	// a cloud there is no log.
	EventBytes int64
	EventAge   time.Duration
	// MaxClients bounds each listener's connections; DefaultMaxClients where it is 0.
	MaxClients int
	// Queue bounds what waits for a client with a persistent session; the
	// defaults where it is 0.
	Queue broker.QueueLimits
	// Pods are the pods that the node runs.
	Pods Pods
	// Origins are browser origins that may use a WebSocket listener.
	Origins []string
	// Metrics is the address of /metrics, /healthz and /readyz; empty for none.
	Metrics string
	// Version is the agent's.
	Version string
	Logger  *slog.Logger
	// Ready is told the listeners' addresses once the bus serves; nil for nobody.
	Ready func(addrs []string)
}

// The bounds of the event log.
const (
	DefaultEventBytes = 64 << 20
	DefaultEventAge   = 7 * 24 * time.Hour
	minEventBytes     = 1 << 20
)

// eventLog gives the bounds of the event log.
func (c *Config) eventLog() (bytes int64, age time.Duration) {
	bytes, age = c.EventBytes, c.EventAge
	if bytes == 0 {
		bytes = DefaultEventBytes
	}
	if age == 0 {
		age = DefaultEventAge
	}
	if c.Cloud == "" {
		bytes = 0 // nobody would ever read it
	}
	return bytes, age
}

// What a gateway bears: its disk has a few gigabytes, its clients are dozens.
const (
	DefaultMaxClients    = 256
	DefaultQueueMessages = 100_000
	DefaultQueueBytes    = 64 << 20
)

// Validate says what is wrong with the configuration and what to do.
func (c *Config) Validate() error {
	if c.Node == "" {
		return errors.New("the node has no name: give --node")
	}
	if err := topic.CheckName("node", c.Node); err != nil {
		return err
	}
	if c.Dir == "" {
		return errors.New("no data folder: give --data")
	}
	if len(c.MQTT) == 0 {
		return errors.New("no listener: give --mqtt, such as 127.0.0.1:1883")
	}
	if c.MaxClients < 0 || c.Queue.Messages < 0 || c.Queue.Bytes < 0 {
		return errors.New("--max-clients, --queue-messages and --queue-bytes want numbers above 0")
	}
	if c.Checkpoint < 0 {
		return fmt.Errorf("checkpoint %s: want a time above 0, such as 60s", c.Checkpoint)
	}
	if c.EventBytes < 0 || c.EventBytes > 0 && c.EventBytes < minEventBytes {
		return fmt.Errorf("event log of %d bytes: want %d (1 MiB) or more", c.EventBytes, minEventBytes)
	}
	if c.EventAge < 0 {
		return fmt.Errorf("event age %s: want a time above 0, such as 168h", c.EventAge)
	}
	if c.Cloud != "" && c.TokenFile == "" {
		return fmt.Errorf("the cloud wants a credential: make one with `fairlead token create --node %s`, put it into a file and give --token-file", c.Node)
	}
	return nil
}

// identity is what the data folder belongs to; a folder that was copied to
// another node is refused rather than mixed up.
type identity struct {
	Node string `json:"node"`
}

// Run runs the agent until ctx ends. An error from before the bus served is the
// configuration's or the host's; it says what to do.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := cfg.Validate(); err != nil {
		return err
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := prepare(cfg); err != nil {
		return err
	}
	token, err := readToken(cfg)
	if err != nil {
		return err
	}
	mapperToken, err := mapperToken(cfg.Dir)
	if err != nil {
		return err
	}
	reg := prometheus.NewRegistry()
	engine := twin.New(twin.Config{Node: cfg.Node, Metrics: reg, Logger: log})
	eventBytes, eventAge := cfg.eventLog()
	bus, err := broker.Open(broker.Options{
		Dir: filepath.Join(cfg.Dir, "store"), Node: cfg.Node, Version: cfg.Version,
		Authenticate: authenticate(mapperToken),
		Interceptors: []broker.Interceptor{engine},
		Presence:     engine.Presence,
		Durability:   broker.EdgeDurability,
		Checkpoint:   cfg.Checkpoint,
		EventBytes:   eventBytes,
		EventAge:     eventAge,
		MaxClients:   cmp.Or(cfg.MaxClients, DefaultMaxClients),
		Queue: broker.QueueLimits{
			Messages: cmp.Or(cfg.Queue.Messages, DefaultQueueMessages),
			Bytes:    cmp.Or(cfg.Queue.Bytes, DefaultQueueBytes),
		},
		AllowedOrigins: cfg.Origins,
		Metrics:        reg, Logger: log,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bus.Close()) }()
	if aside := bus.SetAside(); aside != "" {
		log.Error("the store was corrupt; it was set aside and the node begins anew from the cloud's state", "aside", aside)
	}
	if err := engine.Start(ctx, bus); err != nil {
		if ctx.Err() != nil {
			return nil // ended before it began
		}
		// Without room nothing changes, but what is there goes on working.
		if !errors.Is(err, store.ErrDiskFull) {
			return fmt.Errorf("twins: %w", err)
		}
		log.Error("disk full: what became void while the node was off stays until there is room", "error", err)
	}
	self := node.Describe(cfg.Version)
	var l *link.Link
	roots, err := readRoots(cfg.CloudCA)
	if err != nil {
		return err
	}
	if cfg.Cloud == "" {
		if err := unlink(ctx, bus, cfg.Node); err != nil && ctx.Err() == nil {
			log.Warn("the bus still shows a link to the cloud", "error", err)
		}
	} else {
		l, err = link.New(link.Config{
			Node: cfg.Node, URL: cfg.Cloud, TLS: roots, Token: token, KeepAlive: cfg.KeepAlive, Agent: cfg.Version, Metrics: reg, Logger: log,
			Host: strings.TrimSpace(self.Hostname + " " + self.InternalAddress),
		}, bus)
		if err != nil {
			return err
		}
	}
	var pn *podNode
	if cfg.Pods.Runtime != "" {
		if pn, err = newPodNode(cfg, bus, l, reg, log); err != nil {
			return err
		}
	}
	if err := describe(ctx, bus, cfg.Node, self, pn); err != nil && ctx.Err() == nil {
		log.Error("node not described", "error", err)
	}
	stopAdmin := serveAdmin(cfg.Dir, bus, log)
	defer stopAdmin()
	g, ctx := errgroup.WithContext(ctx)
	if cfg.Metrics != "" {
		stop, addr, err := serveMetrics(cfg.Metrics, reg, bus)
		if err != nil {
			return err
		}
		defer stop()
		log.Info("metrics and health", "address", addr)
	}
	var addrs []string
	for _, a := range cfg.MQTT {
		addr, err := bus.Listen(a)
		if err != nil {
			return err
		}
		addrs = append(addrs, addr)
	}
	log.Info("bus serves", "addresses", addrs, "version", cfg.Version)
	if cfg.Ready != nil {
		cfg.Ready(addrs)
	}
	g.Go(func() error { return engine.Run(ctx, bus) })
	g.Go(func() error { letGo(ctx, log); return nil })
	g.Go(func() error { return watchNode(ctx, bus, cfg.Node, self, pn) })
	if pn != nil {
		g.Go(func() error { return pn.run(ctx) })
	}
	if l != nil {
		g.Go(func() error { return l.Run(ctx) })
	}
	<-ctx.Done()
	return g.Wait()
}

// unlink takes back what an earlier run said of its link to the cloud.
func unlink(ctx context.Context, bus *broker.Broker, node string) error {
	t := topic.ReportedLink(node)
	if _, ok := bus.Retained(t); !ok {
		return nil
	}
	return bus.Publish(ctx, broker.Message{Topic: t, QoS: 1, Retain: true})
}

// readRoots makes the link's TLS of a file of certificates; nil without one.
func readRoots(file string) (*tls.Config, error) {
	if file == "" {
		return nil, nil //nolint:nilnil // the client's default
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--cloud-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("--cloud-ca %s: no certificate in it; want PEM, -----BEGIN CERTIFICATE-----", file)
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// prepare makes the data folder and checks that it is this node's.
func prepare(cfg Config) error {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	path := filepath.Join(cfg.Dir, "node.json")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return writeFile(path, payload.Encode(identity{Node: cfg.Node}))
	}
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	var id identity
	err = json.Unmarshal(b, &id)
	if err == nil && id.Node == "" {
		err = errors.New("it names no node")
	}
	if err != nil {
		return fmt.Errorf("%s cannot be read: %w; if the folder is node %s's, write {\"node\":%q} into it", path, err, cfg.Node, cfg.Node)
	}
	if id.Node != cfg.Node {
		return fmt.Errorf("data folder %s belongs to node %s, not to %s: give another --data, or remove the folder", cfg.Dir, id.Node, cfg.Node)
	}
	return nil
}

// writeFile writes a small file that is either whole or not there.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

func readToken(cfg Config) (string, error) {
	if cfg.TokenFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(cfg.TokenFile)
	if err != nil {
		return "", fmt.Errorf("token: %w; make one with `fairlead token create --node %s > %s`", err, cfg.Node, cfg.TokenFile)
	}
	t := strings.TrimSpace(string(b))
	if t == "" {
		return "", fmt.Errorf("token file %s is empty; make a token with `fairlead token create --node %s > %s`", cfg.TokenFile, cfg.Node, cfg.TokenFile)
	}
	if !printable(t) {
		return "", fmt.Errorf("token file %s is damaged: want one line as `fairlead token create --node %s` writes it", cfg.TokenFile, cfg.Node)
	}
	return t, nil
}

// describe publishes reported/node with the state of the store and of the pods, if
// it changed.
func describe(ctx context.Context, bus *broker.Broker, name string, self payload.Node, pn *podNode) error {
	if pn != nil {
		pn.describe(&self)
	}
	if err := bus.StoreErr(); err != nil {
		self.StoreError = err.Error()
	}
	t, p := topic.ReportedNode(name), payload.Encode(self)
	if old, ok := bus.Retained(t); ok && string(old) == string(p) {
		return nil
	}
	return bus.Publish(ctx, broker.Message{Topic: t, Payload: p, QoS: 1, Retain: true})
}

// storeCheck is how soon the cloud learns that a node cannot store any more.
const storeCheck = 5 * time.Second

// watchNode tells in reported/node when the store refuses, and when it takes
// again, and what changes about the pods' node, until ctx ends.
func watchNode(ctx context.Context, bus *broker.Broker, name string, self payload.Node, pn *podNode) error {
	tick := time.NewTicker(storeCheck)
	defer tick.Stop()
	var changed <-chan struct{}
	if pn != nil {
		changed = pn.changed
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-changed:
		}
		if pn != nil {
			pn.whole() // which remembers it, if so
		}
		// A bus that is closing refuses; there is nobody to tell then.
		_ = describe(ctx, bus, name, self, pn)
	}
}
