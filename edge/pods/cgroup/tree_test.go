package cgroup

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// open opens a tree of this machine's kernel, below a root of its own. Version 0
// is the one that the machine has.
func open(t *testing.T, version int) *Tree {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("cgroups want root")
	}
	cfg := Config{Root: "/fairlead-test-" + strings.ToLower(rand.Text()[:8])}
	if version == 2 {
		// On a hybrid host version 2 is there too, but most controllers are not.
		const unified = "/sys/fs/cgroup/unified"
		if before, err := os.ReadFile(filepath.Join(unified, "cgroup.subtree_control")); err == nil {
			cfg.Mount = unified
			t.Cleanup(func() { // last: the host is left as it was
				after, _ := os.ReadFile(filepath.Join(unified, "cgroup.subtree_control"))
				for _, c := range strings.Fields(string(after)) {
					if !slices.Contains(strings.Fields(string(before)), c) {
						if err := writeFile(filepath.Join(unified, "cgroup.subtree_control"), "-"+c); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
	}
	tree, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if version != 0 && tree.Version() != version {
		t.Skipf("this machine has cgroups of version %d", tree.Version())
	}
	for _, h := range tree.hierarchies {
		dir := filepath.Join(h.mount, tree.root.path(tree.driver))
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := errors.Join(killAll(ctx, []string{dir}[:min(1, len(glob(dir)))]), removeTree(ctx, dir)); err != nil {
				t.Error(err)
			}
		})
	}
	return tree
}

func glob(p string) []string { m, _ := filepath.Glob(p); return m }

// put starts a program in a cgroup below the pod's in every hierarchy, as a
// runtime does with a container, in those too that we make nothing in.
func put(t *testing.T, tree *Tree, uid types.UID, qos corev1.PodQOSClass, argv ...string) *exec.Cmd {
	t.Helper()
	var joins []string
	for _, mount := range mounts(t, tree) {
		dir := filepath.Join(mount, tree.pod(uid, qos).path(tree.driver), "c1")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(dir, "..", f)); err == nil && tree.version == 1 {
				if err := writeFile(filepath.Join(dir, f), strings.TrimSpace(string(b))); err != nil {
					t.Fatal(err)
				}
			}
		}
		joins = append(joins, "echo $$ > "+filepath.Join(dir, "cgroup.procs"))
	}
	script := "set -e; " + strings.Join(joins, "; ") + `; echo in; exec "$@"`
	cmd := exec.Command("sh", append([]string{"-c", script, "sh"}, argv...)...)
	cmd.Env = append(os.Environ(), "CGROUP_TEST_EAT=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() { // it may be frozen
			for _, h := range tree.hierarchies {
				_, _ = killIn(filepath.Join(h.mount, tree.root.path(tree.driver)))
				for _, f := range glob(filepath.Join(h.mount, tree.pod(uid, qos).path(tree.driver), "*", "freezer.state")) {
					_ = writeFile(f, "THAWED")
				}
			}
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	r := bufio.NewReader(out)
	want := []string{"in\n"}
	if argv[0] == os.Args[0] {
		want = append(want, "full\n")
	}
	for _, w := range want {
		if l, err := r.ReadString('\n'); l != w {
			t.Fatalf("program in the cgroup says %q, %v; want %q", l, err, w)
		}
	}
	return cmd
}

// mounts are the hierarchies that the machine has, not those that Open has found.
func mounts(t *testing.T, tree *Tree) (out []string) {
	t.Helper()
	if tree.version == 2 {
		return []string{tree.hierarchies[0].mount}
	}
	seen := map[uint64]bool{} // some are linked to
	for _, p := range glob("/sys/fs/cgroup/*/cgroup.procs") {
		var s syscall.Stat_t
		if err := syscall.Stat(filepath.Dir(p), &s); err != nil {
			t.Fatal(err)
		}
		if !seen[s.Dev] {
			seen[s.Dev] = true
			out = append(out, filepath.Dir(p))
		}
	}
	return out
}

func read(t *testing.T, tree *Tree, controller string, n name, file string) string {
	t.Helper()
	dir, ok := tree.dir(controller, n)
	if !ok {
		t.Fatalf("no hierarchy has %s", controller)
	}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func testPod(uid types.UID, requests, limits corev1.ResourceList) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{UID: uid, Name: "p", Namespace: "default"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{Requests: requests, Limits: limits}}}},
	}
}

func list(cpu, memory string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
}

func TestValuesReachTheKernel(t *testing.T) {
	tree := open(t, 1)
	if err := tree.Setup(t.Context(), Limits{MilliCPU: 1500, Memory: 512 << 20, PIDs: 1000}); err != nil {
		t.Fatal(err)
	}
	node := &spec.Node{CgroupVersion: 1, PodPIDLimit: 64}
	pods := []*corev1.Pod{
		testPod("1111-guaranteed", list("250m", "32Mi"), list("250m", "32Mi")),
		testPod("2222-burstable", list("100m", "16Mi"), corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}),
		testPod("3333-besteffort", nil, nil),
	}
	// Twice, as after a restart of the agent.
	for range 2 {
		for _, p := range pods {
			if err := tree.EnsurePod(t.Context(), p.UID, spec.QOS(p), spec.PodResources(p, node)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tree.SetBurstable(t.Context(), 100); err != nil {
		t.Fatal(err)
	}
	const unlimited = "9223372036854771712"
	guaranteed, burstable, bestEffort := tree.pod(pods[0].UID, spec.QOS(pods[0])), tree.pod(pods[1].UID, spec.QOS(pods[1])), tree.pod(pods[2].UID, spec.QOS(pods[2]))
	for _, w := range []struct {
		controller string
		n          name
		file, want string
	}{
		{"memory", tree.kubepods(), "memory.limit_in_bytes", "536870912"},
		{"cpu", tree.kubepods(), "cpu.shares", "1536"},
		{"pids", tree.kubepods(), "pids.max", "1000"},
		{"cpu", tree.class(corev1.PodQOSBurstable), "cpu.shares", "102"},
		{"cpu", tree.class(corev1.PodQOSBestEffort), "cpu.shares", "2"},
		{"cpu", guaranteed, "cpu.shares", "256"},
		{"cpu", guaranteed, "cpu.cfs_quota_us", "25000"},
		{"cpu", guaranteed, "cpu.cfs_period_us", "100000"},
		{"memory", guaranteed, "memory.limit_in_bytes", "33554432"},
		{"pids", guaranteed, "pids.max", "64"},
		{"cpu", burstable, "cpu.shares", "102"},
		{"cpu", burstable, "cpu.cfs_quota_us", "-1"},
		{"memory", burstable, "memory.limit_in_bytes", "67108864"},
		{"cpu", bestEffort, "cpu.shares", "2"},
		{"memory", bestEffort, "memory.limit_in_bytes", unlimited},
	} {
		if got := read(t, tree, w.controller, w.n, w.file); got != w.want {
			t.Errorf("%s of %v: %s, want %s", w.file, w.n, got, w.want)
		}
	}
	if _, err := os.Stat("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes"); tree.Swap() != (err == nil) {
		t.Errorf("swap is accounted: %v", tree.Swap())
	}
	found, err := tree.Pods()
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 3 || found["1111-guaranteed"] != corev1.PodQOSGuaranteed || found["2222-burstable"] != corev1.PodQOSBurstable || found["3333-besteffort"] != corev1.PodQOSBestEffort {
		t.Errorf("found pods %v", found)
	}
}

func TestUsage(t *testing.T) {
	tree := open(t, 1)
	if err := tree.Setup(t.Context(), Limits{}); err != nil {
		t.Fatal(err)
	}
	const uid = types.UID("4444")
	if err := tree.EnsurePod(t.Context(), uid, corev1.PodQOSBurstable, spec.PodCgroup{CPUShares: 2}); err != nil {
		t.Fatal(err)
	}
	if u, err := tree.PodUsage(uid, corev1.PodQOSBurstable); err != nil || u.PIDs != 0 {
		t.Fatalf("empty pod: %+v, %v", u, err)
	}
	put(t, tree, uid, corev1.PodQOSBurstable, os.Args[0])
	u, err := tree.PodUsage(uid, corev1.PodQOSBurstable)
	if err != nil {
		t.Fatal(err)
	}
	if u.Memory < 32<<20 || u.MemoryUsage < u.Memory || u.PIDs < 1 || u.CPU <= 0 {
		t.Errorf("pod with 32 MiB in use: %+v", u)
	}
	all, err := tree.PodsUsage()
	if err != nil || all.Memory < 32<<20 {
		t.Errorf("all pods: %+v, %v", all, err)
	}
	host, err := tree.NodeUsage()
	if err != nil || host.Memory < all.Memory {
		t.Errorf("host: %+v, %v; pods %+v", host, err, all)
	}
	if _, err := tree.PodUsage("5555", corev1.PodQOSBurstable); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pod without a cgroup: %v", err)
	}

	// The limit of all pods cannot be below what they use: all else is set up.
	err = tree.Setup(t.Context(), Limits{MilliCPU: 2000, Memory: 8 << 20})
	if !errors.Is(err, ErrLimits) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a limit below the usage: %v", err)
	}
	if got := read(t, tree, "cpu", tree.kubepods(), "cpu.shares"); got != "2048" {
		t.Errorf("shares of kubepods: %s", got)
	}
}

func TestRemovePod(t *testing.T) {
	for _, version := range []int{1, 2} {
		t.Run("version "+strconv.Itoa(version), func(t *testing.T) {
			tree := open(t, version)
			if err := tree.Setup(t.Context(), Limits{}); err != nil {
				t.Fatal(err)
			}
			const uid, other = types.UID("6666"), types.UID("7777")
			for _, u := range []types.UID{uid, other} {
				if err := tree.EnsurePod(t.Context(), u, corev1.PodQOSBestEffort, spec.PodCgroup{CPUShares: 2}); err != nil {
					t.Fatal(err)
				}
			}
			forks := put(t, tree, uid, corev1.PodQOSBestEffort, "sh", "-c", "trap '' TERM; while :; do sleep 1000 & sleep 0.01; done")
			if version == 2 {
				// The container has the controllers too.
				dir := filepath.Join(tree.hierarchies[0].mount, tree.pod(uid, corev1.PodQOSBestEffort).path(tree.driver), "c1")
				b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
				if err != nil || !slices.Equal(strings.Fields(string(b)), tree.hierarchies[0].controllers) {
					t.Errorf("controllers of the container: %q, %v; want %v", b, err, tree.hierarchies[0].controllers)
				}
			}
			sleeps := put(t, tree, other, corev1.PodQOSBestEffort, "sleep", "1000")
			if dir, ok := tree.dir("freezer", tree.pod(uid, corev1.PodQOSBestEffort)); ok {
				if err := writeFile(filepath.Join(dir, "c1", "freezer.state"), "FROZEN"); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := tree.RemovePod(ctx, uid); err != nil {
				t.Fatal(err)
			}
			if err := forks.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Errorf("the program ended with %v, want killed", err)
			}
			for _, mount := range mounts(t, tree) {
				if dir := filepath.Join(mount, tree.pod(uid, corev1.PodQOSBestEffort).path(tree.driver)); exists(dir) {
					t.Errorf("%s is left", dir)
				}
			}
			if err := syscall.Kill(sleeps.Process.Pid, 0); err != nil {
				t.Errorf("the other pod's program: %v", err)
			}
			if err := tree.RemovePod(ctx, uid); err != nil {
				t.Errorf("again: %v", err)
			}
			found, err := tree.Pods()
			if err != nil || len(found) != 1 || found[other] == "" {
				t.Errorf("pods left: %v, %v", found, err)
			}
		})
	}
}

// A runtime puts containers into hierarchies that we make nothing in, and a kill -9
// may leave a cgroup in one hierarchy alone.
func TestLeftoverInOneHierarchy(t *testing.T) {
	tree := open(t, 1)
	for _, mount := range mounts(t, tree) {
		dir := filepath.Join(mount, tree.pod("8888", corev1.PodQOSBurstable).path(tree.driver), "c1")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		found, err := tree.Pods()
		if err != nil || found["8888"] != corev1.PodQOSBurstable {
			t.Errorf("pod in %s alone: found %v, %v", mount, found, err)
		}
		if err := tree.RemovePod(t.Context(), "8888"); err != nil || exists(filepath.Dir(dir)) {
			t.Errorf("pod in %s alone: %v", mount, err)
		}
	}
}

// An agent that was put into a pod's cgroup does not kill itself.
func TestRemovePodSparesTheAgent(t *testing.T) {
	tree := open(t, 1)
	const uid = types.UID("9999")
	if err := tree.EnsurePod(t.Context(), uid, corev1.PodQOSBestEffort, spec.PodCgroup{}); err != nil {
		t.Fatal(err)
	}
	dir, _ := tree.dir("memory", tree.pod(uid, corev1.PodQOSBestEffort))
	before, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if err := writeFile(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(os.Getpid())); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for l := range strings.Lines(string(before)) {
			if f := strings.SplitN(strings.TrimSpace(l), ":", 3); f[1] == "memory" {
				h := tree.at("memory")
				if err := writeFile(filepath.Join(h.mount, f[2], "cgroup.procs"), strconv.Itoa(os.Getpid())); err != nil {
					t.Error(err)
				}
			}
		}
	}()
	if err := tree.RemovePod(t.Context(), uid); err == nil || !strings.Contains(err.Error(), "must not be killed") {
		t.Errorf("the agent's own cgroup: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{Driver: "docker"}, "cgroup driver"},
		{Config{Root: "/a_b"}, "cgroup root"},
		{Config{Mount: t.TempDir()}, "mount cgroup2"},
	} {
		if _, err := Open(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%+v: %v, want %q", tt.cfg, err, tt.want)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte("cpuset cpu io pids\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tree, err := Open(Config{Mount: dir})
	if err != nil || tree.Version() != 2 || !slices.Equal(tree.Missing(), []string{"memory"}) {
		t.Errorf("a kernel without the memory controller: %+v, %v", tree, err)
	}
}
