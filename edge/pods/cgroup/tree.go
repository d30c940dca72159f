package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// Config says where the tree is.
type Config struct {
	// Driver is the runtime's: spec.CgroupFS or spec.Systemd. Empty is CgroupFS.
	Driver string
	// Root is the cgroup above kubepods in the form of cgroupfs, such as /fairlead.
	// Empty is "/". It is made where it is missing.
	Root string
	// Mount is where cgroups are mounted; empty is /sys/fs/cgroup.
	Mount string
	// Bus is the address of systemd's D-Bus; empty is the system bus. Only the
	// driver Systemd asks it.
	Bus string
	// Log tells of what the kernel does not offer; nil for nobody.
	Log *slog.Logger
}

// Tree is the cgroups of this node's pods. Its methods may be called from several
// goroutines, but the calls about one pod must come one after the other.
type Tree struct {
	version     int
	driver      string
	root        name // above kubepods
	hierarchies []hierarchy
	missing     []string
	log         *slog.Logger
	units       *units // of systemd, nil with cgroupfs

	mu struct {
		sync.Mutex
		burstable uint64 // shares last written
	}
}

// hierarchy is one mounted tree. Version 2 has one with all controllers, version
// 1 several.
type hierarchy struct {
	mount       string
	controllers []string
	// foreign ones get no pods from us, but the runtime may have put some there.
	foreign bool
}

// needed are the controllers without which a request or a limit has no effect.
var needed = []string{"cpu", "memory", "pids"}

// Open finds out what the host has. An error says what to mount or to set.
func Open(cfg Config) (*Tree, error) {
	t := &Tree{driver: cfg.Driver, log: cfg.Log}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	if t.driver == "" {
		t.driver = spec.CgroupFS
	}
	if t.driver != spec.CgroupFS && t.driver != spec.Systemd {
		return nil, fmt.Errorf("cgroup driver %q: want %s or %s, the one that the container runtime is set to", cfg.Driver, spec.CgroupFS, spec.Systemd)
	}
	root, err := parseName(cfg.Root)
	if err != nil {
		return nil, err
	}
	t.root = root
	mount := cfg.Mount
	if mount == "" {
		mount = "/sys/fs/cgroup"
	}
	t.version, t.hierarchies, err = discover(mount)
	if err != nil {
		return nil, err
	}
	for _, c := range needed {
		if t.at(c) == nil {
			t.missing = append(t.missing, c)
		}
	}
	if len(t.missing) > 0 {
		t.log.Warn("the kernel offers no cgroup controller for some resources: their requests and limits have no effect; a boot parameter such as cgroup_enable=memory may be missing",
			"missing", t.missing, "version", t.version)
	}
	if t.driver == spec.Systemd {
		t.units = &units{bus: cfg.Bus, version: t.version}
	}
	return t, nil
}

// Close ends the connection to systemd, if there is one.
func (t *Tree) Close() error {
	if t.units == nil {
		return nil
	}
	return t.units.close()
}

// Version is 1 or 2; a hybrid host is 1.
func (t *Tree) Version() int { return t.version }

// Driver is spec.CgroupFS or spec.Systemd.
func (t *Tree) Driver() string { return t.driver }

// Missing are the controllers of cpu, memory and pids that the host does not
// have: requests and limits of these have no effect.
func (t *Tree) Missing() []string { return t.missing }

// at is the hierarchy with a controller, nil if no hierarchy has it.
func (t *Tree) at(controller string) *hierarchy {
	for i := range t.hierarchies {
		if !t.hierarchies[i].foreign && slices.Contains(t.hierarchies[i].controllers, controller) {
			return &t.hierarchies[i]
		}
	}
	return nil
}

// dir is the cgroup's folder in the hierarchy of a controller, if there is one.
func (t *Tree) dir(controller string, n name) (string, bool) {
	h := t.at(controller)
	if h == nil {
		return "", false
	}
	return filepath.Join(h.mount, n.path(t.driver)), true
}

func (t *Tree) kubepods() name { return t.root.child(spec.Kubepods) }

func (t *Tree) class(qos corev1.PodQOSClass) name {
	switch qos {
	case corev1.PodQOSBurstable, corev1.PodQOSBestEffort:
		return t.kubepods().child(strings.ToLower(string(qos)))
	default:
		return t.kubepods()
	}
}

func (t *Tree) pod(uid types.UID, qos corev1.PodQOSClass) name {
	return t.class(qos).child(podPrefix + string(uid))
}

var classes = []corev1.PodQOSClass{corev1.PodQOSGuaranteed, corev1.PodQOSBurstable, corev1.PodQOSBestEffort}

// Limits bound all pods together: what the node has less what is reserved for
// the system and the agent. 0 is no bound.
type Limits struct {
	MilliCPU int64
	Memory   int64 // bytes
	PIDs     int64
}

// Setup makes kubepods and the classes, or sets them right after a restart. An
// error that wraps ErrLimits says that all are there, but kubepods has not the
// limits: pods run, and the call may be repeated.
func (t *Tree) Setup(ctx context.Context, l Limits) error {
	unbounded := map[string]uint64{}
	for _, s := range hugePageSizes() {
		unbounded[s] = 1 << 62
	}
	for i := range t.root {
		if err := t.create(ctx, t.root[:i+1]); err != nil {
			return err
		}
	}
	if err := t.create(ctx, t.kubepods()); err != nil {
		return err
	}
	limits := t.write(ctx, t.kubepods(), resources{Shares: spec.Shares(l.MilliCPU), Memory: l.Memory, PIDs: l.PIDs, HugePages: unbounded})
	for _, qos := range classes[1:] {
		if err := t.create(ctx, t.class(qos)); err != nil {
			return err
		}
		if err := t.write(ctx, t.class(qos), resources{Shares: minShares, HugePages: unbounded}); err != nil {
			return err
		}
	}
	t.mu.Lock()
	t.mu.burstable = minShares
	t.mu.Unlock()
	if limits != nil {
		return fmt.Errorf("%w: %w", ErrLimits, limits)
	}
	return nil
}

// ErrLimits is that the node's limit over all pods could not be set, such as a
// memory limit below what pods use already.
var ErrLimits = errors.New("failed to update Node Allocatable limits")

// SetBurstable tells what the node's burstable pods request together, in
// thousandths of a CPU: their class gets that share.
func (t *Tree) SetBurstable(ctx context.Context, milliCPU int64) error {
	s := spec.Shares(milliCPU)
	t.mu.Lock()
	defer t.mu.Unlock()
	if s == t.mu.burstable {
		return nil
	}
	if err := t.write(ctx, t.class(corev1.PodQOSBurstable), resources{Shares: s}); err != nil {
		return err
	}
	t.mu.burstable = s
	return nil
}

// EnsurePod makes the pod's cgroup in every hierarchy and sets its values. One
// that is there keeps what runs in it.
func (t *Tree) EnsurePod(ctx context.Context, uid types.UID, qos corev1.PodQOSClass, r spec.PodCgroup) error {
	if err := checkUID(uid); err != nil {
		return err
	}
	n := t.pod(uid, qos)
	if err := t.create(ctx, n); err != nil {
		return fmt.Errorf("cgroup of pod %s: %w", uid, err)
	}
	if err := t.write(ctx, n, ofPod(r)); err != nil {
		return fmt.Errorf("cgroup of pod %s: %w", uid, err)
	}
	return nil
}

// PodParent is what the pod's sandbox gets as cgroup_parent: a path with
// cgroupfs, the name of a slice with systemd.
func (t *Tree) PodParent(uid types.UID, qos corev1.PodQOSClass) string {
	p := t.pod(uid, qos).path(t.driver)
	if t.driver == spec.Systemd {
		return filepath.Base(p)
	}
	return p
}

// Path is the kubepods cgroup below the mount point, such as /kubepods.slice.
func (t *Tree) Path() string { return t.kubepods().path(t.driver) }

// Pods are the pods that have a cgroup in any hierarchy, with the class each is in.
func (t *Tree) Pods() (map[types.UID]corev1.PodQOSClass, error) {
	pods := map[types.UID]corev1.PodQOSClass{}
	for _, h := range t.hierarchies {
		for _, qos := range classes {
			parent := t.class(qos)
			dir := filepath.Join(h.mount, parent.path(t.driver))
			entries, err := os.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list pod cgroups: %w", err)
			}
			for _, e := range entries {
				if !e.IsDir() {
					continue
				}
				if uid, ok := podOf(e.Name(), parent, t.driver); ok {
					pods[uid] = qos
				}
			}
		}
	}
	return pods, nil
}

// RemovePod kills what is left in the pod's cgroups, containers included, and
// removes them from every hierarchy. It waits for the kernel until ctx ends. A pod
// without cgroups is none to remove: nil.
func (t *Tree) RemovePod(ctx context.Context, uid types.UID) error {
	if err := checkUID(uid); err != nil {
		return err
	}
	var errs []error
	for _, qos := range classes {
		n := t.pod(uid, qos)
		var dirs []string
		for _, h := range t.hierarchies {
			d := filepath.Join(h.mount, n.path(t.driver))
			if _, err := os.Stat(d); err == nil {
				dirs = append(dirs, d)
			}
		}
		if len(dirs) == 0 {
			continue
		}
		if err := killAll(ctx, dirs); err != nil {
			errs = append(errs, err)
			continue
		}
		if t.units != nil {
			if err := t.units.stop(ctx, filepath.Base(n.path(spec.Systemd))); err != nil {
				errs = append(errs, err)
			}
		}
		for _, d := range dirs {
			errs = append(errs, removeTree(ctx, d))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove cgroup of pod %s: %w", uid, err)
	}
	return nil
}

// create makes a cgroup in every hierarchy that is ours; its parent is there.
func (t *Tree) create(ctx context.Context, n name) error {
	if t.units != nil {
		if err := t.units.start(ctx, n); err != nil {
			return err
		}
	}
	for _, h := range t.hierarchies {
		if h.foreign {
			continue
		}
		dir := filepath.Join(h.mount, n.path(t.driver))
		if t.version == 2 {
			if err := h.delegate(dir); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if t.version == 1 && slices.Contains(h.controllers, "cpuset") {
			if err := inheritCPUSet(h.mount, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// Remove kills what is left of all pods and removes kubepods with all below it, and
// the root if nothing else is in it. It is for nodes that stop running pods.
func (t *Tree) Remove(ctx context.Context) error {
	var errs []error
	for i := range len(t.root) + 1 {
		n := t.kubepods()[:len(t.root)+1-i]
		var dirs []string
		for _, h := range t.hierarchies {
			if d := filepath.Join(h.mount, n.path(t.driver)); exists(d) {
				dirs = append(dirs, d)
			}
		}
		if i > 0 {
			for _, d := range dirs {
				_ = os.Remove(d) // it may hold other cgroups
			}
			continue
		}
		errs = append(errs, killAll(ctx, dirs))
		if t.units != nil {
			errs = append(errs, t.units.stop(ctx, filepath.Base(n.path(spec.Systemd))))
		}
		for _, d := range dirs {
			errs = append(errs, removeTree(ctx, d))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the cgroups of pods: %w", err)
	}
	return nil
}
