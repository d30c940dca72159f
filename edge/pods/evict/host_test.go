package evict

import (
	"context"
	"crypto/rand"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-io/fairlead/edge/pods/cgroup"
)

// openTree opens a tree below a root of its own and sets it up.
func openTree(t *testing.T) *cgroup.Tree {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("cgroups want root")
	}
	tree, err := cgroup.Open(cgroup.Config{Root: "/fairlead-test-" + strings.ToLower(rand.Text()[:8])})
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.Setup(t.Context(), cgroup.Limits{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := tree.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return tree
}

func TestObserve(t *testing.T) {
	tree := openTree(t)
	dir, shm := t.TempDir(), "/dev/shm"
	h := &Host{Tree: tree, MemoryCapacity: 1 << 40, PodsMemory: 1 << 39, NodeFS: dir, ImageFS: func() string { return "" }}
	o, dedicated, err := h.Observe()
	if err != nil || dedicated {
		t.Fatalf("%v, dedicated %v", err, dedicated)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		t.Fatal(err)
	}
	if got, want := o[NodeFSAvailable].Capacity, int64(s.Blocks)*s.Bsize; got != want {
		t.Errorf("size %d, want %d", got, want)
	}
	if o[NodeFSInodes].Capacity != int64(s.Files) {
		t.Errorf("inodes %+v", o[NodeFSInodes])
	}
	if m := o[MemoryAvailable]; m.Available <= 0 || m.Available >= m.Capacity {
		t.Errorf("memory %+v", m)
	}
	if m := o[PodsMemoryAvailable]; m.Available > m.Capacity || m.Available < m.Capacity-(16<<20) {
		t.Errorf("memory of no pods %+v", m)
	}
	if p := o[PIDAvailable]; p.Available <= 0 || p.Available >= p.Capacity || p.Capacity != MaxPIDs() {
		t.Errorf("process IDs %+v", p)
	}
	if _, ok := o[ImageFSAvailable]; ok {
		t.Error("images are told though it is not known where they are")
	}
	h.ImageFS = func() string { return dir }
	if o, dedicated, err := h.Observe(); err != nil || dedicated || o[ImageFSAvailable] != o[NodeFSAvailable] {
		t.Errorf("images on the same file system: %v, %v, %+v", err, dedicated, o)
	}
	h.ImageFS = func() string { return shm }
	if _, dedicated, err := h.Observe(); err != nil || !dedicated {
		t.Errorf("images in %s: %v, dedicated %v", shm, err, dedicated)
	}
	h.NodeFS = filepath.Join(dir, "none")
	if o, _, err := h.Observe(); err == nil || o[MemoryAvailable].Capacity == 0 {
		t.Errorf("without the data folder: %v, %+v", err, o)
	}
}

// The kernel wakes the manager when the pods' memory reaches the threshold.
func TestMemoryAlarm(t *testing.T) {
	tree := openTree(t)
	if tree.Version() != 1 {
		t.Skip("cgroups of version 2 have no alarm of usage")
	}
	_, pods := tree.MemoryFolders()
	h := &Host{Tree: tree, PodsMemory: 64 << 20, Thresholds: thresholds(t, "memory.available=40Mi", "", "", "")}
	wake := h.Wake()
	defer func() { _ = h.Close() }()
	cmd := exec.Command("sh", "-c", "echo $$ > "+filepath.Join(pods, "cgroup.procs")+`; exec "$@"`, "sh", os.Args[0])
	cmd.Env = append(os.Environ(), "EVICT_TEST_EAT=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	for range 2 { // the second leaves the alarm as it is
		if _, _, err := h.Observe(); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-wake:
		t.Fatal("alarm without need")
	default:
	}
	if _, err := io.WriteString(in, "x"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-wake:
	case <-time.After(20 * time.Second):
		b, _ := os.ReadFile(filepath.Join(pods, "memory.usage_in_bytes"))
		t.Fatalf("no alarm; in use %s", b)
	}
}

// Tasks that wait for memory raise the alarm of version 2 too.
func TestPressureAlarm(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("pressure triggers want root")
	}
	h := &Host{}
	wake := h.Wake()
	a, err := pressureAlarm("/proc/pressure/memory", stall)
	if err != nil {
		t.Skipf("this kernel tells no pressure: %v", err)
	}
	h.arm(MemoryAvailable, 0, func() (*alarm, error) { return a, nil })
	defer func() { _ = h.Close() }()
	tree := openTree(t)
	dir, _ := tree.MemoryFolders()
	_, pods := tree.MemoryFolders()
	limit := map[int]string{1: "memory.limit_in_bytes", 2: "memory.max"}[tree.Version()]
	if dir == "" {
		t.Skip("no memory controller to make pressure with")
	}
	if err := os.WriteFile(filepath.Join(pods, limit), []byte(strconv.Itoa(4<<20)), 0); err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(t.TempDir(), "big")
	// Writing and reading a file that does not fit evicts its own pages all the time.
	script := "echo $$ > " + filepath.Join(pods, "cgroup.procs") + "; head -c 64M /dev/zero > " + big +
		"; while :; do for i in 1 2 3 4; do cat " + big + " > /dev/null & done; wait; done"
	select {
	case <-wake:
		t.Skip("something else on this machine waits for memory")
	default:
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL); _ = cmd.Wait() }()
	select {
	case <-wake:
	case <-time.After(30 * time.Second):
		b, _ := os.ReadFile("/proc/pressure/memory")
		t.Fatalf("no alarm; pressure:\n%s", b)
	}
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	empty, err := Measure(dir)
	if err != nil || empty.Inodes != 1 {
		t.Fatalf("empty folder: %+v, %v", empty, err)
	}
	write := func(name string, n int) {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a", 1<<20)
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	write("sub/b", 1<<20)
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "sub", "same")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	got, err := Measure(dir)
	if err != nil {
		t.Fatal(err)
	}
	// The folder, a, sub, sub/b, link and sparse; folders take blocks on some file systems.
	if got.Inodes != 6 || got.Bytes < 2<<20 || got.Bytes > 2<<20+64<<10 {
		t.Errorf("got %+v, want 6 inodes and about 2 MiB", got)
	}
	if got, err := Measure(filepath.Join(dir, "gone")); err != nil || got != (Files{}) {
		t.Errorf("a folder that is gone: %+v, %v", got, err)
	}
}
