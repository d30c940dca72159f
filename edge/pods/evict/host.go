package evict

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fairlead-io/fairlead/edge/pods/cgroup"
)

// Host reads the signals of this machine. Its zero value watches process IDs only.
type Host struct {
	// Tree gives memory; nil watches none.
	Tree *cgroup.Tree
	// MemoryCapacity is the host's memory in bytes, PodsMemory the limit of all pods.
	MemoryCapacity, PodsMemory int64
	// NodeFS is a folder of the agent's data. ImageFS gives one of the runtime's, ""
	// while it is not known; nil is never.
	NodeFS  string
	ImageFS func() string
	// Thresholds are those of memory that the kernel shall tell of.
	Thresholds []Threshold
	Log        *slog.Logger // nil is none

	mu struct {
		sync.Mutex
		alarms map[Signal]*alarm
		broken bool // the kernel refused, which is said once
	}
	wake chan struct{}
	once sync.Once
	wait sync.WaitGroup
}

// Wake is told when the kernel sees memory run short. The alarms are set by Observe.
func (h *Host) Wake() <-chan struct{} {
	h.once.Do(func() { h.wake = make(chan struct{}, 1) })
	return h.wake
}

// Observe is a Config.Observe.
func (h *Host) Observe() (o Observations, dedicatedImageFS bool, err error) {
	o = Observations{}
	var errs []error
	if h.Tree != nil {
		errs = append(errs, h.memory(o))
	}
	if n, c, err := processes(); err != nil {
		errs = append(errs, err)
	} else {
		o[PIDAvailable] = Observation{c - n, c}
	}
	var node, image unix.Stat_t
	if h.NodeFS != "" {
		errs = append(errs, statfs(o, h.NodeFS, NodeFSAvailable, NodeFSInodes), unix.Stat(h.NodeFS, &node))
	}
	if h.ImageFS != nil {
		if dir := h.ImageFS(); dir != "" {
			errs = append(errs, statfs(o, dir, ImageFSAvailable, ImageFSInodes), unix.Stat(dir, &image))
			dedicatedImageFS = image.Dev != node.Dev
		}
	}
	return o, dedicatedImageFS, errors.Join(errs...)
}

// memory reads what is left, and sets the kernel's alarms to where it runs out.
func (h *Host) memory(o Observations) error {
	all, err := h.Tree.NodeUsage()
	if err == nil && h.MemoryCapacity > 0 {
		o[MemoryAvailable] = Observation{h.MemoryCapacity - all.Memory, h.MemoryCapacity}
	}
	pods, podsErr := h.Tree.PodsUsage()
	if podsErr == nil && h.PodsMemory > 0 {
		o[PodsMemoryAvailable] = Observation{h.PodsMemory - pods.Memory, h.PodsMemory}
	}
	if errors.Is(podsErr, fs.ErrNotExist) {
		podsErr = nil // not set up yet
	}
	host, kubepods := h.Tree.MemoryFolders()
	for _, t := range h.Thresholds {
		switch now, ok := o[t.Signal]; {
		case !ok || h.wake == nil:
		case t.Signal == MemoryAvailable && h.Tree.Version() == 2:
			h.arm(t.Signal, 0, func() (*alarm, error) { return pressureAlarm("/proc/pressure/memory", stall) })
		case h.Tree.Version() == 2:
		case t.Signal == MemoryAvailable:
			h.arm(t.Signal, alarmAt(t, now, all), func() (*alarm, error) { return usageAlarm(host, alarmAt(t, now, all)) })
		case t.Signal == PodsMemoryAvailable:
			h.arm(t.Signal, alarmAt(t, now, pods), func() (*alarm, error) { return usageAlarm(kubepods, alarmAt(t, now, pods)) })
		}
	}
	return errors.Join(err, podsErr)
}

// alarmAt is the usage at which the working set meets the threshold.
func alarmAt(t Threshold, now Observation, use cgroup.Usage) int64 {
	q := t.Value.of(now.Capacity)
	return now.Capacity - q.Value() + use.MemoryUsage - use.Memory
}

// statfs reads a file system's room. One without inodes, such as btrfs, tells none.
func statfs(o Observations, dir string, room, inodesFree Signal) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("file system of %s: %w", dir, err)
	}
	size := int64(s.Bsize) //nolint:unconvert // an int32 on 32-bit ARM
	o[room] = Observation{int64(s.Bavail) * size, int64(s.Blocks) * size}
	if s.Files > 0 {
		o[inodesFree] = Observation{int64(s.Ffree), int64(s.Files)}
	}
	return nil
}

// processes gives the number of tasks and how many there may be.
func processes() (n, most int64, err error) {
	most = MaxPIDs()
	b, err := os.ReadFile("/proc/loadavg") // 1.36 3.49 4.53 2/3518 3715089
	if err != nil {
		return 0, 0, err
	}
	f := strings.Fields(string(b))
	if len(f) > 3 {
		if _, total, ok := strings.Cut(f[3], "/"); ok {
			n, err = strconv.ParseInt(total, 10, 64)
		}
	}
	if err == nil && (n == 0 || most == 0) {
		err = errors.New("/proc tells no number of tasks")
	}
	return n, most, err
}

// MaxPIDs is how many processes and threads the kernel allows; 0 if it does not say.
func MaxPIDs() (most int64) {
	for _, f := range []string{"/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && (most == 0 || n < most) {
			most = n
		}
	}
	return most
}

// Measure counts the files below a folder and the room they take; hard links
// count once, other file systems not at all. A folder that is gone has none.
func Measure(dir string) (f Files, err error) {
	var top syscall.Stat_t
	if err := syscall.Stat(dir, &top); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return f, nil
		}
		return f, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	linked := map[uint64]bool{}
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		s, ok := info.Sys().(*syscall.Stat_t)
		switch {
		case !ok:
			return fmt.Errorf("%s tells no blocks", e.Name())
		case s.Dev != top.Dev && e.IsDir():
			return fs.SkipDir
		case s.Dev != top.Dev:
			return nil
		case s.Nlink > 1 && !e.IsDir():
			if linked[s.Ino] {
				return nil
			}
			linked[s.Ino] = true
		}
		f.Bytes += s.Blocks * 512
		f.Inodes++
		return nil
	})
	return f, err
}
