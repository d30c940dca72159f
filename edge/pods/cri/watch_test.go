package cri_test

import (
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	running  = runtimeapi.ContainerState_CONTAINER_RUNNING.String()
	ended    = runtimeapi.ContainerState_CONTAINER_EXITED.String()
	ready    = runtimeapi.PodSandboxState_SANDBOX_READY.String()
	notReady = runtimeapi.PodSandboxState_SANDBOX_NOTREADY.String()
)

// TestWatch wants each change to be told when the CRI says so already: whoever
// looks then sees it.
func TestWatch(t *testing.T) {
	s := start(t)
	w, stop := s.watch()
	eventually(t, "the watch has begun", func() bool { return w.count(call{}) > 0 })
	if !s.Eventful() {
		t.Error("containerd has events")
	}

	sandbox, config := s.sandbox("a")
	id := s.run(sandbox, config, "main", "sleep", "1000000")
	// By its ID, or by another "look at everything" where the watch has just gone
	// over to the source that works.
	eventually(t, "the start is told", func() bool {
		return w.count(call{id, running}) > 0 && w.count(call{sandbox, ready}) > 0 || w.count(call{}) > 1
	})

	first := w.count(call{})
	for range 3 {
		if _, err := s.ExecSync(t.Context(), id, []string{"true"}, 0); err != nil {
			t.Fatal(err)
		}
	}
	s.exits(s.run(sandbox, config, "brief", "true"))
	if err := s.StopContainer(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the exit is told", func() bool { return w.count(call{id, ended}) > 0 })
	if told := w.count(call{id, ended}); told != 1 {
		t.Errorf("the exit is told %d times", told)
	}

	if err := s.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the removal is told", func() bool { return w.count(call{id, "gone"}) > 0 })
	if err := s.StopPodSandbox(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the sandbox's end is told", func() bool { return w.count(call{sandbox, notReady}) > 0 })
	if err := s.RemovePodSandbox(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the sandbox's removal is told", func() bool { return w.count(call{sandbox, "gone"}) > 0 })
	if got := w.count(call{}); got != first {
		t.Errorf("told to look at everything %d times instead of %d", got, first)
	}
	stop()
	if s.Eventful() {
		t.Error("eventful although nobody watches")
	}
}

// TestWatchKilledRuntime kills containerd, and a container meanwhile.
func TestWatchKilledRuntime(t *testing.T) {
	s := start(t)
	sandbox, config := s.sandbox("a")
	dies := s.run(sandbox, config, "dies", "sleep", "1000000")
	lives := s.run(sandbox, config, "lives", "sleep", "1000000")
	w, _ := s.watch()
	eventually(t, "the watch has begun", func() bool { return w.count(call{}) > 0 })
	for range 3 {
		n := w.count(call{})
		s.rt.Kill()
		eventually(t, "the loss is noticed", func() bool { return !s.Eventful() })
		if err := s.rt.Restart(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "told to look at everything", func() bool { return w.count(call{}) > n })
	}
	if got := s.status(lives).State.String(); got != running {
		t.Errorf("the container that lives on is %s", got)
	}
	n := w.count(call{})
	if err := s.StopContainer(t.Context(), dies, 0); err != nil {
		t.Fatal(err)
	}
	// By its ID, or by "look at everything" where the watch was between two sources.
	eventually(t, "an exit is told after all that", func() bool { return w.count(call{dies, ended}) > 0 || w.count(call{}) > n })
}

// TestWatchMany has many containers die at once.
func TestWatchMany(t *testing.T) {
	s := start(t)
	w, _ := s.watch()
	sandbox, config := s.sandbox("a")
	var ids []string
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		ids = append(ids, s.run(sandbox, config, name, "sleep", "1000000"))
	}
	if err := s.rt.KillContainers(); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		eventually(t, "all exits are told", func() bool { return w.count(call{id, ended}) > 0 })
	}
	eventually(t, "the sandbox's end is told", func() bool { return w.count(call{sandbox, notReady}) > 0 })
}
