package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// v1Controllers are those the stock kubelet makes pod cgroups in. Runtimes do the
// same for their containers, in further hierarchies too.
var v1Controllers = []string{"cpu", "cpuacct", "cpuset", "memory", "pids", "hugetlb", "name=systemd", "devices", "freezer", "blkio"}

// discover finds the hierarchies below the mount point.
func discover(mount string) (version int, hs []hierarchy, err error) {
	b, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers"))
	if err == nil {
		return 2, []hierarchy{{mount: mount, controllers: strings.Fields(string(b))}}, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return 0, nil, err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		// 36 35 0:31 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
		before, after, ok := strings.Cut(s.Text(), " - ")
		l, r := strings.Fields(before), strings.Fields(after)
		if !ok || len(l) < 5 || len(r) < 3 || filepath.Dir(l[4]) != filepath.Clean(mount) {
			continue
		}
		switch r[0] {
		case "cgroup":
			h := hierarchy{mount: l[4], foreign: true}
			for o := range strings.SplitSeq(r[2], ",") {
				if slices.Contains(v1Controllers, o) {
					h.foreign = false
				}
				h.controllers = append(h.controllers, o)
			}
			hs = append(hs, h)
		case "cgroup2":
			hs = append(hs, hierarchy{mount: l[4], foreign: true})
		}
	}
	if !slices.ContainsFunc(hs, func(h hierarchy) bool { return !h.foreign }) {
		return 0, nil, fmt.Errorf("no cgroups below %s: mount cgroup2 there, as `mount -t cgroup2 none %s` does, or version 1", mount, mount)
	}
	return 1, hs, nil
}

// delegate makes the folder's ancestors and lets its own children have the
// controllers: version 2 gives a cgroup only what its parent enables.
func (h *hierarchy) delegate(dir string) error {
	rel, err := filepath.Rel(h.mount, dir)
	if err != nil {
		return err
	}
	p := h.mount
	for part := range strings.SplitSeq(rel, "/") {
		if err := h.enable(p); err != nil {
			return err
		}
		p = filepath.Join(p, part)
		if err := os.Mkdir(p, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	// The containers below the pod want theirs too.
	return h.enable(p)
}

func (h *hierarchy) enable(dir string) error {
	file := filepath.Join(dir, "cgroup.subtree_control")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	have := strings.Fields(string(b))
	var want []string
	for _, c := range h.controllers {
		if !slices.Contains(have, c) {
			want = append(want, "+"+c)
		}
	}
	if len(want) == 0 {
		return nil
	}
	if err := writeFile(file, strings.Join(want, " ")); err == nil {
		return nil
	}
	// One that cannot be had, such as cpu beside realtime processes, must not cost the others.
	var errs []error
	for _, c := range want {
		if err := writeFile(file, c); err != nil && slices.Contains(needed, c[1:]) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// inheritCPUSet fills the CPUs and memory nodes of a new cgroup from its parent:
// version 1 leaves them empty, and no process may join.
func inheritCPUSet(mount, dir string) error {
	rel, err := filepath.Rel(mount, dir)
	if err != nil {
		return err
	}
	parent := mount
	for part := range strings.SplitSeq(rel, "/") {
		child := filepath.Join(parent, part)
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(child, f))
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(b)) != "" {
				continue
			}
			if b, err = os.ReadFile(filepath.Join(parent, f)); err != nil {
				return err
			}
			if err := writeFile(filepath.Join(child, f), strings.TrimSpace(string(b))); err != nil {
				return err
			}
		}
		parent = child
	}
	return nil
}

// writeFile writes to a file of the kernel, which takes a value in one write.
func writeFile(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %q: %w", value, err)
	}
	return nil
}

// The waits between two looks at a cgroup that is not empty yet.
const (
	firstWait = 2 * time.Millisecond
	maxWait   = 100 * time.Millisecond
)

// killAll kills every process below the folders until there is none.
func killAll(ctx context.Context, dirs []string) error {
	for _, d := range dirs {
		// No fork shall win against the kills.
		if f := filepath.Join(d, "pids.max"); exists(f) {
			if err := writeFile(f, "0"); err != nil {
				return err
			}
		}
	}
	for wait := firstWait; ; wait = min(2*wait, maxWait) {
		left, err := 0, error(nil)
		for _, d := range dirs {
			n, e := killIn(d)
			left, err = left+n, errors.Join(err, e)
		}
		if err != nil || left == 0 {
			return err
		}
		if !sleep(ctx, wait) {
			return fmt.Errorf("%d processes did not die: %w", left, context.Cause(ctx))
		}
	}
}

// killIn sends SIGKILL to all processes of a cgroup and of those below it.
func killIn(dir string) (n int, err error) {
	if f := filepath.Join(dir, "cgroup.kill"); exists(f) {
		// Version 2 since Linux 5.14. What is still there is counted below.
		if err := writeFile(f, "1"); err != nil {
			return 0, err
		}
	}
	err = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.EOPNOTSUPP) {
			return nil // gone meanwhile, or a threaded one, whose processes are its parent's
		}
		if err != nil {
			return err
		}
		pids := strings.Fields(string(b))
		if len(pids) == 0 {
			return nil
		}
		// A frozen process of version 1 dies only once it is thawed.
		if thaw := filepath.Join(p, "freezer.state"); exists(thaw) {
			if err := writeFile(thaw, "THAWED"); err != nil {
				return err
			}
		}
		for _, s := range pids {
			pid, err := strconv.Atoi(s)
			if err != nil || pid <= 1 || pid == os.Getpid() {
				return fmt.Errorf("%s holds process %s, which must not be killed: move it away", p, s)
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("kill process %d of %s: %w", pid, p, err)
			}
			n++
		}
		return nil
	})
	return n, err
}

// removeTree removes a cgroup and those below it. A process that is dead may hold
// its cgroup a while.
func removeTree(ctx context.Context, dir string) error {
	for wait := firstWait; ; wait = min(2*wait, maxWait) {
		err := removeOnce(dir)
		if err == nil || !errors.Is(err, syscall.EBUSY) && !errors.Is(err, syscall.ENOTEMPTY) {
			return err
		}
		if !sleep(ctx, wait) {
			return errors.Join(err, context.Cause(ctx))
		}
	}
}

func removeOnce(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeOnce(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}
