package edge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/edge/link"
	"github.com/fairlead-io/fairlead/edge/node"
	"github.com/fairlead-io/fairlead/edge/pods"
	"github.com/fairlead-io/fairlead/edge/pods/archive/folder"
	"github.com/fairlead-io/fairlead/edge/pods/evict"
	"github.com/fairlead-io/fairlead/edge/pods/shutdown"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Pods configures the pods of a node. Without a Runtime there are none.
type Pods struct {
	// Runtime is the socket of the container runtime's CRI.
	Runtime string
	// Images is a folder from which archives of images are imported; <Dir>/images
	// where it is empty.
	Images string
	// Static is a folder of manifests of the node's own pods; empty for none.
	Static string
	// Logs holds the pods' log folders; /var/log/pods where it is empty.
	Logs string
	// CgroupRoot is the cgroup above kubepods; /fairlead where it is empty.
	CgroupRoot string
	// ClusterDNS and ClusterDomain are for pods with dnsPolicy ClusterFirst.
	ClusterDNS    []string
	ClusterDomain string
	// NodeIP are the node's addresses; the host's where it is empty.
	NodeIP string
	// Devices are devices that pods may ask for, NAME=PATH each.
	Devices []string
	// Reserved is kept from pods, such as cpu=100m,memory=128Mi.
	Reserved string
	// EvictionHard are the thresholds of eviction as signal to amount, such as
	// memory.available to 100Mi or nodefs.available to 10%; the stock kubelet's where
	// it is nil. EvictionSoft are those with a grace period, EvictionSoftGrace.
	EvictionHard, EvictionSoft, EvictionSoftGrace map[string]string
	// ShutdownGrace is how long the node's shutdown waits for pods, and
	// ShutdownGraceCritical the part of it that is kept for critical ones; 0 is not
	// at all.
	ShutdownGrace, ShutdownGraceCritical time.Duration
	// UnsafeSysctls are sysctls, or prefixes that end in *, that pods may set besides
	// the safe ones.
	UnsafeSysctls []string
	// MaxPIDs bounds the processes of one pod; 0 is no bound.
	MaxPIDs int64
	// MaxPods is how many pods run at most; 110 where it is 0.
	MaxPods int
	// ParallelPulls is how many images are pulled at once; 1 where it is 0.
	ParallelPulls int
}

// softGrace bounds, in seconds, the grace of pods that go by a soft threshold.
const softGrace = 30

// podNode runs the pods of the node and knows what the node offers them.
type podNode struct {
	cfg     Config
	log     *slog.Logger
	bus     *broker.Broker
	link    *link.Link // nil without a cloud
	engine  *pods.Engine
	key     *seal.Key
	offer   node.Offer
	devices []node.Device
	ips     []netip.Addr
	settled atomic.Bool
	changed chan struct{} // something about the node is to be told
}

// newPodNode checks the configuration. It does not touch the runtime yet. The link
// is nil without a cloud.
func newPodNode(cfg Config, bus *broker.Broker, l *link.Link, reg prometheus.Registerer, log *slog.Logger) (*podNode, error) {
	c := cfg.Pods
	n := &podNode{cfg: cfg, log: log, bus: bus, link: l, changed: make(chan struct{}, 1)}
	var err error
	if n.key, err = sealKey(cfg.Dir); err != nil {
		return nil, err
	}
	if n.ips, err = node.ParseIPs(c.NodeIP); err != nil {
		return nil, err
	}
	for _, d := range c.Devices {
		dev, err := node.ParseDevice(d)
		if err != nil {
			return nil, err
		}
		n.devices = append(n.devices, dev)
	}
	reserved, err := node.ParseReserved(c.Reserved)
	if err != nil {
		return nil, err
	}
	hard := c.EvictionHard
	if hard == nil {
		hard = evict.DefaultHard
	}
	thresholds, err := evict.Parse(hard, c.EvictionSoft, c.EvictionSoftGrace, nil)
	if err != nil {
		return nil, err
	}
	n.offer = node.Offer{MaxPods: c.MaxPods, Data: cfg.Dir, Reserved: []corev1.ResourceList{reserved}, Devices: n.devices}
	periods, err := shutdown.Periods(c.ShutdownGrace, c.ShutdownGraceCritical)
	if err != nil {
		return nil, err
	}
	capacity, _, err := n.offer.Resources()
	if err != nil {
		return nil, err
	}
	n.offer.Reserved = append(n.offer.Reserved, evict.Reserve(thresholds, capacity))
	n.engine, err = pods.New(pods.Config{
		Node: cfg.Node, Dir: cfg.Dir, Bus: bus, Runtime: c.Runtime, Key: n.key,
		LogRoot: c.Logs, LogLinks: links(c.Logs), CgroupRoot: c.CgroupRoot, StaticPods: c.Static,
		ClusterDNS: c.ClusterDNS, ClusterDomain: c.ClusterDomain, ParallelPulls: c.ParallelPulls,
		Host: n.host, Changed: n.tell, Thresholds: thresholds, EvictionGrace: softGrace,
		Shutdown: periods, Reserved: reserved,
		Settled: n.whole,
		Metrics: reg, Logger: log,
	})
	return n, err
}

// whole tells whether the bus has all that the cloud wants of this node. A store
// that was lost, or that never was in sync, has not: what it misses is no reason
// to end a pod. A file in the store remembers it, so that it goes where the store goes:
// one that was set aside, restored or repaired has none.
func (n *podNode) whole() bool {
	l := n.link
	if l == nil || n.settled.Load() {
		return true
	}
	mark := filepath.Join(n.cfg.Dir, "store", ".synced")
	if _, err := os.Stat(mark); err == nil {
		n.settled.Store(true)
		return true
	}
	if !l.InSync() {
		return false
	}
	if err := writeFile(mark, nil); err != nil {
		n.log.Warn("not remembered that the node was in sync with the cloud", "error", err)
	}
	n.settled.Store(true)
	return true
}

// host gives the facts that pods are made with.
func (n *podNode) host() spec.Node {
	d := node.Describe("")
	_, allocatable, err := n.offer.Resources()
	if err != nil {
		n.log.Warn("not all is known of what the node offers", "error", err)
	}
	s := spec.Node{
		CPUs: d.CPUs, Memory: int64(d.MemoryBytes), Allocatable: allocatable, AppArmor: node.AppArmor(),
		UnsafeSysctls: n.cfg.Pods.UnsafeSysctls, PodPIDLimit: n.cfg.Pods.MaxPIDs,
		SeccompRoot: filepath.Join(n.cfg.Dir, "seccomp"), Devices: map[corev1.ResourceName][]spec.Device{},
	}
	s.MaskedPaths, _ = filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle") // its pattern is well formed
	s.KernelMajor, s.KernelMinor = node.KernelVersion(d.Kernel)
	for _, h := range node.HugePages() {
		s.HugePageSizes = append(s.HugePageSizes, h.Size)
	}
	for _, dev := range n.devices {
		s.Devices[dev.Resource()] = append(s.Devices[dev.Resource()], spec.Device{Path: dev.Path, HostPath: dev.Host()})
	}
	addrs, err := node.Addresses(d.Hostname, n.ips)
	if err != nil {
		n.log.Warn("the node's addresses", "error", err)
	}
	for _, a := range addrs {
		if a.Type == corev1.NodeInternalIP {
			s.HostIPs = append(s.HostIPs, a.Address)
		}
	}
	if b, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		if s.Resolv, err = spec.ParseResolvConf(string(b)); err != nil {
			n.log.Warn("resolv.conf", "error", err)
		}
	}
	return s
}

// tell has the node described anew.
func (n *podNode) tell() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// describe adds to the node's description what concerns pods.
func (n *podNode) describe(self *payload.Node) {
	self.Pods, self.SealKey = true, n.key.Public()
	capacity, allocatable, _ := n.offer.Resources() // its error was logged by host
	self.Capacity, self.Allocatable = node.Quantities(capacity), node.Quantities(allocatable)
	if addrs, err := node.Addresses(self.Hostname, n.ips); err == nil {
		self.Addresses = nil
		for _, a := range addrs {
			if a.Type == corev1.NodeHostName {
				a.Address = n.cfg.Node // its label kubernetes.io/hostname, as with the kubelet's --hostname-override
			}
			self.Addresses = append(self.Addresses, payload.NodeAddress{Type: string(a.Type), Address: a.Address})
		}
	}
	st := n.engine.State()
	self.Runtime, self.Images, self.VolumesInUse = st.Runtime, node.Images(st.Images), nil
	conditions := append(slices.Clone(st.Pressure), node.Ready(st.Problems...))
	var before payload.Node
	if b, ok := n.bus.Retained(topic.ReportedNode(n.cfg.Node)); ok {
		_ = payload.Decode(b, &before) // what cannot be read was not before
	}
	self.Conditions = node.Conditions(before.Conditions, conditions)
}

// run runs the pods until ctx ends.
func (n *podNode) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.engine.Run(ctx) })
	g.Go(func() error { n.importImages(ctx); return nil })
	g.Go(func() error {
		return node.WatchDevices(ctx, n.devices, func() {
			n.engine.Refresh()
			n.tell()
		})
	})
	return g.Wait()
}

// importImages imports the archives in the folder of images, until ctx ends.
func (n *podNode) importImages(ctx context.Context) {
	program, err := folder.Program()
	if err != nil {
		n.log.Warn("archives in the folder of images are not imported", "error", err)
		return
	}
	dir := cmp.Or(n.cfg.Pods.Images, filepath.Join(n.cfg.Dir, "images"))
	folder.Watch(ctx, folder.Config{
		Dir: dir, Command: append([]string{program}, folder.Arguments(dir, n.cfg.Pods.Runtime)...),
		Done: func(r folder.Result) {
			if r.Error != "" {
				n.engine.NodeEvent(corev1.EventTypeWarning, "ImageArchiveFailed", fmt.Sprintf("Archive %s cannot be imported: %s", r.File, r.Error))
				return
			}
			n.engine.NodeEvent(corev1.EventTypeNormal, "ImageArchiveImported", fmt.Sprintf("Archive %s is imported: %s", r.File, strings.Join(r.Images, ", ")))
			n.engine.ImagesArrived()
		},
		Logger: n.log,
	})
}

// sealKey gives the key that secrets are sealed to for this node; the first start
// makes it.
func sealKey(dir string) (*seal.Key, error) {
	path := filepath.Join(dir, "seal.key")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		k, err := seal.NewKey()
		if err != nil {
			return nil, err
		}
		raw, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		return k, writeFile(path, raw)
	}
	if err != nil {
		return nil, fmt.Errorf("the node's key: %w", err)
	}
	const size = 32
	if len(b) > size { // writeFile ends with a newline
		b = b[:size]
	}
	k, err := seal.ParseKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; remove it to have a new one made: the cloud seals anew to it", path, err)
	}
	return k, nil
}

// links is where log collectors look for the logs of containers, if the pods' logs
// are where they expect them too.
func links(logs string) string {
	if filepath.Clean(logs) == "/var/log/pods" {
		return "/var/log/containers"
	}
	return ""
}
