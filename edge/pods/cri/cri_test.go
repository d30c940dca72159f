package cri_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestDialRefuses(t *testing.T) {
	for _, tc := range []struct{ endpoint, want string }{
		{"", "absolute path"},
		{"run/containerd.sock", "absolute path"},
		{"tcp://127.0.0.1:1234", "unix socket"},
		{"unix://run/containerd.sock", "unix socket"},
		{"unix://", "absolute path"},
		{"unix:///" + strings.Repeat("x", 120), "at most 107 bytes"},
		{"unix:///%zz", "invalid URL escape"},
	} {
		c, err := cri.Dial(tc.endpoint, slog.New(slog.DiscardHandler))
		if err == nil {
			c.Close()
			t.Errorf("%q: want an error with %q", tc.endpoint, tc.want)
		} else if !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), tc.endpoint) {
			t.Errorf("%q: got %v, want an error with %q", tc.endpoint, err, tc.want)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, tc := range []struct {
		err                                            error
		notFound, deadline, unavailable, unimplemented bool
	}{
		{err: nil},
		{err: errors.New("no such thing")},
		{err: status.Error(codes.Unknown, "no such thing")},
		{err: status.Error(codes.NotFound, "x"), notFound: true},
		{err: fmt.Errorf("look at it: %w", status.Error(codes.NotFound, "x")), notFound: true},
		{err: status.Error(codes.DeadlineExceeded, "x"), deadline: true},
		{err: fmt.Errorf("wait: %w", context.DeadlineExceeded), deadline: true},
		{err: context.Canceled},
		{err: status.Error(codes.Unavailable, "x"), unavailable: true},
		{err: status.Error(codes.Unknown, "server is not initialized yet"), unavailable: true},
		{err: status.Error(codes.Unimplemented, "x"), unimplemented: true},
	} {
		if got := cri.IsNotFound(tc.err); got != tc.notFound {
			t.Errorf("IsNotFound(%v): %t", tc.err, got)
		}
		if got := cri.IsDeadline(tc.err); got != tc.deadline {
			t.Errorf("IsDeadline(%v): %t", tc.err, got)
		}
		if got := cri.IsUnavailable(tc.err); got != tc.unavailable {
			t.Errorf("IsUnavailable(%v): %t", tc.err, got)
		}
		if got := cri.IsUnimplemented(tc.err); got != tc.unimplemented {
			t.Errorf("IsUnimplemented(%v): %t", tc.err, got)
		}
	}
}

func TestRuntime(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	v, err := s.Version(ctx)
	if err != nil || v.RuntimeName != "containerd" || v.RuntimeApiVersion != "v1" {
		t.Errorf("version: got %v, %v", v, err)
	}
	st, err := s.Status(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(st.Status.Conditions) < 2 || !strings.Contains(st.Info["config"], s.rt.Dir) {
		t.Errorf("status: got conditions %v, config %q", st.Status.Conditions, st.Info["config"])
	}
	if st, err = s.Status(ctx, false); err != nil || len(st.Info) > 0 {
		t.Errorf("status that is not verbose: got %v, %v", st.GetInfo(), err)
	}
	if r, err := s.RuntimeConfig(ctx); err == nil {
		t.Logf("cgroup driver %s", r.GetLinux().GetCgroupDriver())
	} else if !cri.IsUnimplemented(err) {
		t.Errorf("runtime config: %v", err)
	}
}

func TestLifecycle(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	sandbox, config := s.sandbox("a")
	st, err := s.PodSandboxStatus(ctx, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	if st.State != runtimeapi.PodSandboxState_SANDBOX_READY || st.Network.GetIp() == "" || st.Metadata.Uid != "a-uid" {
		t.Errorf("sandbox: got %v", st)
	}
	list, err := s.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: config.Labels})
	if err != nil || len(list) != 1 || list[0].Id != sandbox {
		t.Errorf("list of sandboxes: got %v, %v", list, err)
	}
	list, err = s.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"no": "such"}})
	if err != nil || len(list) != 0 {
		t.Errorf("list of no sandboxes: got %v, %v", list, err)
	}

	id := s.create(sandbox, config, "main", "sh", "-c", "trap 'echo stopping; exit 3' TERM; echo hello; while :; do sleep 0.05; done")
	if got := s.status(id).State; got != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("container before its start: %s", got)
	}
	if err := s.StartContainer(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := s.StartContainer(ctx, id); err == nil {
		t.Error("the container started twice")
	}
	eventually(t, "the container says hello", func() bool { return strings.Contains(s.readLog(config, "main.log"), "stdout F hello\n") })
	containers, err := s.ListContainers(ctx, &runtimeapi.ContainerFilter{PodSandboxId: sandbox})
	if err != nil || len(containers) != 1 || containers[0].Id != id || containers[0].State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("list of containers: got %v, %v", containers, err)
	}

	// Resources and usage.
	if err := s.UpdateContainerResources(ctx, id, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 48 << 20}); err != nil {
		t.Errorf("update resources: %v", err)
	}
	if got := s.status(id).Resources.GetLinux().GetMemoryLimitInBytes(); got != 0 && got != 48<<20 {
		t.Errorf("memory limit after the update: %d", got) // 0: containerd before 1.7 does not say
	}
	limit := s.cgroupFile("memory.max", "memory/", "memory.limit_in_bytes", "a/"+id)
	if limit != fmt.Sprint(48<<20) {
		t.Errorf("memory limit of the cgroup: %s", limit)
	}
	if stats, err := s.ContainerStats(ctx, id); err != nil || stats.Memory.GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("stats: got %v, %v", stats, err)
	}
	if stats, err := s.ListContainerStats(ctx, &runtimeapi.ContainerStatsFilter{PodSandboxId: sandbox}); err != nil || len(stats) != 1 {
		t.Errorf("list of stats: got %v, %v", stats, err)
	}
	if _, err := s.ListPodSandboxStats(ctx, nil); err != nil && !cri.IsUnimplemented(err) {
		t.Errorf("list of sandbox stats: %v", err)
	}

	// Logs: a new file after the old one was moved away.
	file := filepath.Join(config.LogDirectory, "main.log")
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	if err := s.ReopenContainerLog(ctx, id); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("no new log: %v", err)
	}

	if err := s.StopContainer(ctx, id, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	c := s.status(id)
	if c.State != runtimeapi.ContainerState_CONTAINER_EXITED || c.ExitCode != 3 || c.FinishedAt == 0 {
		t.Errorf("container after its stop: got %v", c)
	}
	if log := s.readLog(config, "main.log"); !strings.Contains(log, "stdout F stopping\n") {
		t.Errorf("log after the stop: %q", log)
	}
	if err := s.StopContainer(ctx, id, 0); err != nil {
		t.Errorf("second stop: %v", err)
	}

	// One that ignores its stop signal is killed.
	deaf := s.run(sandbox, config, "deaf", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
	eventually(t, "the trap is set", func() bool { return strings.Contains(s.readLog(config, "deaf.log"), "ready") })
	if err := s.StopContainer(ctx, deaf, 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if got := s.status(deaf).ExitCode; got != 137 {
		t.Errorf("exit code of a killed container: %d", got)
	}

	for range 2 { // the second time there is nothing left
		if err := s.RemoveContainer(ctx, id); err != nil {
			t.Errorf("remove container: %v", err)
		}
		if err := s.StopPodSandbox(ctx, sandbox); err != nil && !cri.IsNotFound(err) {
			t.Errorf("stop sandbox: %v", err)
		}
		if err := s.RemovePodSandbox(ctx, sandbox); err != nil {
			t.Errorf("remove sandbox: %v", err)
		}
	}
	if _, err := s.ContainerStatus(ctx, id); !cri.IsNotFound(err) {
		t.Errorf("status of a container that is gone: %v", err)
	}
	if _, err := s.PodSandboxStatus(ctx, sandbox); !cri.IsNotFound(err) {
		t.Errorf("status of a sandbox that is gone: %v", err)
	}
	if err := s.StopContainer(ctx, deaf, 0); err != nil && !cri.IsNotFound(err) {
		t.Errorf("stop of a container that went with its sandbox: %v", err)
	}
}

// cgroupFile reads a file of a container's cgroup, of cgroup v2 or v1.
func (s *site) cgroupFile(v2, v1, v1file, below string) string {
	s.t.Helper()
	root := "/sys/fs/cgroup"
	b, err := os.ReadFile(root + s.rt.Cgroup + "/" + below + "/" + v2)
	if err != nil {
		b, err = os.ReadFile(root + "/" + v1 + s.rt.Cgroup + "/" + below + "/" + v1file)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestExec(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	sandbox, config := s.sandbox("a")
	id := s.run(sandbox, config, "main", "sleep", "1000000")
	for _, tc := range []struct {
		script         string
		limit          time.Duration
		code           int32
		stdout, stderr string
	}{
		{script: "echo out; echo err >&2; exit 7", code: 7, stdout: "out\n", stderr: "err\n"},
		{script: "echo quick", limit: time.Minute, stdout: "quick\n"},
	} {
		r, err := s.ExecSync(ctx, id, []string{"sh", "-c", tc.script}, tc.limit)
		if err != nil || r.ExitCode != tc.code || string(r.Stdout) != tc.stdout || string(r.Stderr) != tc.stderr {
			t.Errorf("%q: got %v, %v", tc.script, r, err)
		}
	}
	// Half a second is a limit too.
	patient, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := s.ExecSync(patient, id, []string{"sleep", "100000"}, 500*time.Millisecond); !cri.IsDeadline(err) || patient.Err() != nil {
		t.Errorf("a command that takes too long: %v", err)
	}
	eventually(t, "the command is killed", func() bool {
		r, err := s.ExecSync(ctx, id, []string{"sh", "-c", "ps | grep -c '[s]leep 100000$'"}, 0)
		return err == nil && strings.TrimSpace(string(r.Stdout)) == "0"
	})
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := s.ExecSync(short, id, []string{"sleep", "100000"}, 0); !cri.IsDeadline(err) {
		t.Errorf("a command with a ctx that ends: %v", err)
	}
	if _, err := s.ExecSync(ctx, id, []string{"no-such-command"}, 0); err == nil || cri.IsDeadline(err) || cri.IsUnavailable(err) {
		t.Errorf("a command that does not exist: %v", err)
	}
	if _, err := s.ExecSync(ctx, "0123456789", []string{"true"}, 0); !cri.IsNotFound(err) {
		t.Errorf("a command in no container: %v", err)
	}
}

// TestMessageSize has answers beyond gRPC's default of 4 MiB, and beyond ours.
func TestMessageSize(t *testing.T) {
	s := start(t)
	sandbox, config := s.sandbox("a")
	id := s.run(sandbox, config, "main", "sleep", "1000000")
	fill := func(mib int) []string {
		return []string{"sh", "-c", fmt.Sprintf("dd if=/dev/zero bs=1M count=%d 2>/dev/null", mib)}
	}
	r, err := s.ExecSync(t.Context(), id, fill(15), 0)
	if err != nil || len(r.Stdout) != 15<<20 {
		t.Errorf("15 MiB: got %d bytes, %v", len(r.GetStdout()), err)
	}
	if r, err := s.ExecSync(t.Context(), id, fill(17), 0); err == nil && len(r.Stdout) > 16<<20 {
		t.Errorf("17 MiB: got all %d bytes", len(r.Stdout))
	}
	if r, err := s.ExecSync(t.Context(), id, []string{"echo", "well"}, 0); err != nil || string(r.Stdout) != "well\n" {
		t.Errorf("afterwards: got %q, %v", r.GetStdout(), err)
	}
}

func TestImages(t *testing.T) {
	s := start(t)
	ctx := t.Context()
	img, err := s.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: testruntime.Busybox})
	if err != nil || img == nil || img.Id == "" || img.Size == 0 || img.RepoTags[0] != testruntime.Busybox {
		t.Fatalf("image: got %v, %v", img, err)
	}
	all, err := s.ListImages(ctx, nil)
	if err != nil || len(all) != 2 {
		t.Errorf("images: got %v, %v", all, err)
	}
	if img, err := s.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: "fairlead.test/none:1"}); img != nil || err != nil {
		t.Errorf("image that is not there: got %v, %v", img, err)
	}
	fs, err := s.ImageFsInfo(ctx)
	if err != nil || len(fs.ImageFilesystems) == 0 || !strings.HasPrefix(fs.ImageFilesystems[0].FsId.GetMountpoint(), s.rt.Dir) {
		t.Errorf("image file system: got %v, %v", fs, err)
	}
	_, err = s.PullImage(ctx, &runtimeapi.ImageSpec{Image: "127.0.0.1:1/none:1"}, nil, nil)
	if err == nil || strings.Contains(err.Error(), "code = Unknown") || !strings.Contains(err.Error(), "127.0.0.1:1/none:1") {
		t.Errorf("pull from nowhere: %v", err)
	}
	for range 2 {
		if err := s.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: testruntime.Busybox}); err != nil {
			t.Errorf("remove image: %v", err)
		}
	}
	if img, err := s.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: testruntime.Busybox}); img != nil || err != nil {
		t.Errorf("image after its removal: got %v, %v", img, err)
	}
}

func TestRuntimeAway(t *testing.T) {
	s := start(t)
	sandbox, config := s.sandbox("a")
	id := s.run(sandbox, config, "main", "sleep", "1000000")
	s.rt.Kill()
	_, err := s.ContainerStatus(t.Context(), id)
	if !cri.IsUnavailable(err) || cri.IsNotFound(err) {
		t.Errorf("status while containerd is away: %v", err)
	}
	if err := s.rt.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the client is back", func() bool {
		st, err := s.ContainerStatus(t.Context(), id)
		if err != nil && !cri.IsUnavailable(err) {
			t.Fatal(err)
		}
		return err == nil && st.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	})
}
