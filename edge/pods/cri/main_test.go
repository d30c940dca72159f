package cri_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = time.Minute

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// site is a runtime and its client.
type site struct {
	*cri.Client
	t   *testing.T
	rt  *testruntime.Runtime
	log *lines
}

func start(t *testing.T) *site {
	t.Helper()
	rt := testruntime.Start(t)
	s := &site{t: t, rt: rt, log: &lines{}}
	s.Client = dial(t, rt.Socket, s.log)
	return s
}

func dial(t *testing.T, endpoint string, log *lines) *cri.Client {
	t.Helper()
	c, err := cri.Dial(endpoint, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(log.String())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// sandbox makes a sandbox.
func (s *site) sandbox(name string) (id string, config *runtimeapi.PodSandboxConfig) {
	s.t.Helper()
	config = &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name + "-uid", Attempt: 0},
		LogDirectory: filepath.Join(s.rt.Dir, "logs", name),
		Labels:       map[string]string{"io.kubernetes.pod.name": name},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: s.rt.Cgroup + "/" + name},
	}
	id, err := s.RunPodSandbox(s.t.Context(), config, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return id, config
}

// create makes a container.
func (s *site) create(sandbox string, config *runtimeapi.PodSandboxConfig, name string, command ...string) (id string) {
	s.t.Helper()
	id, err := s.CreateContainer(s.t.Context(), sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: testruntime.Busybox},
		Command:  command,
		LogPath:  name + ".log",
		Linux:    &runtimeapi.LinuxContainerConfig{Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}},
	}, config)
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

// run makes and starts a container.
func (s *site) run(sandbox string, config *runtimeapi.PodSandboxConfig, name string, command ...string) (id string) {
	s.t.Helper()
	id = s.create(sandbox, config, name, command...)
	if err := s.StartContainer(s.t.Context(), id); err != nil {
		s.t.Fatal(err)
	}
	return id
}

func (s *site) status(id string) *runtimeapi.ContainerStatus {
	s.t.Helper()
	st, err := s.ContainerStatus(s.t.Context(), id)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func (s *site) exits(id string) {
	s.t.Helper()
	eventually(s.t, "the container ends", func() bool {
		return s.status(id).State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
}

// readLog gives a container's log file.
func (s *site) readLog(config *runtimeapi.PodSandboxConfig, file string) string {
	b, err := os.ReadFile(filepath.Join(config.LogDirectory, file))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// seen are the calls of Watch. With each, look is called and its result kept.
type seen struct {
	mu    sync.Mutex
	calls []call
}

type call struct{ id, state string }

// watch watches until the test ends or stop is called.
func (s *site) watch() (_ *seen, stop func()) {
	s.t.Helper()
	w := &seen{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Watch(ctx, func(id string) {
			c := call{id: id}
			if id != "" {
				c.state = s.state(ctx, id)
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.calls = append(w.calls, c)
		})
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	s.t.Cleanup(stop)
	return w, stop
}

// state is what the CRI says of a container or sandbox.
func (s *site) state(ctx context.Context, id string) string {
	c, err := s.ContainerStatus(ctx, id)
	if err == nil {
		return c.State.String()
	}
	b, err := s.PodSandboxStatus(ctx, id)
	if err == nil {
		return b.State.String()
	}
	if cri.IsNotFound(err) {
		return "gone"
	}
	return err.Error()
}

func (w *seen) all() []call {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.calls)
}

func (w *seen) count(c call) (n int) {
	for _, x := range w.all() {
		if x == c {
			n++
		}
	}
	return n
}
