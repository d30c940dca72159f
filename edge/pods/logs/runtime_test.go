package logs

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// TestRealContainer rotates the log of a container that counts, and looks for
// every number.
func TestRealContainer(t *testing.T) {
	rt := testruntime.Start(t)
	c, err := cri.Dial(rt.Socket, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	ctx := t.Context()
	dir := PodDir(t.TempDir(), "default", "counter", "u1")
	box := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "counter", Namespace: "default", Uid: "u1"},
		LogDirectory: dir, Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: rt.Cgroup}}
	sandbox, err := c.RunPodSandbox(ctx, box, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "app"), 0o755); err != nil {
		t.Fatal(err)
	}
	id, err := c.CreateContainer(ctx, sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "app"}, Image: &runtimeapi.ImageSpec{Image: testruntime.Busybox}, LogPath: "app/0.log",
		Command: []string{"sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; if [ $((i%5000)) = 0 ]; then until rm /tmp/go; do sleep 0.01; done 2>/dev/null; fi; done"}, Linux: &runtimeapi.LinuxContainerConfig{},
	}, box)
	if err == nil {
		err = c.StartContainer(ctx, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "app", "0.log")
	clock := time.UnixMilli(1790000000000)
	r, err := New(Config{
		Live:   func() []Live { return []Live{{id, path}} },
		Reopen: c.ReopenContainerLog, MaxSize: 64 << 10, MaxFiles: 1000,
		Now: func() time.Time { clock = clock.Add(time.Second); return clock },
	})
	if err != nil {
		t.Fatal(err)
	}
	lines := func() (out []string) {
		files, err := Files(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			var in io.Reader = bytes.NewReader(b)
			if strings.HasSuffix(f, ".gz") {
				if in, err = gzip.NewReader(in); err != nil {
					t.Fatal(err)
				}
			}
			for s := bufio.NewScanner(in); s.Scan(); {
				out = append(out, s.Text())
			}
		}
		return out
	}
	for round := range 4 {
		for deadline := time.Now().Add(time.Minute); len(lines()) < 5000*(round+1); r.Look(ctx) {
			if time.Now().After(deadline) {
				t.Fatalf("%d lines", len(lines()))
			}
		}
		r.Look(ctx)
		if resp, err := c.ExecSync(ctx, id, []string{"touch", "/tmp/go"}, time.Minute); err != nil || resp.ExitCode != 0 {
			t.Fatal(resp, err)
		}
	}
	if err := c.StopContainer(ctx, id, 0); err != nil {
		t.Fatal(err)
	}
	if count(t, r.rotated) < 4 || count(t, r.failed) != 0 {
		t.Errorf("%v rotations, %v failed", count(t, r.rotated), count(t, r.failed))
	}
	for i, l := range lines() {
		if !strings.HasSuffix(l, fmt.Sprintf(" stdout F %d", i+1)) {
			t.Fatalf("line %d: got %q", i+1, l)
		}
	}
}
