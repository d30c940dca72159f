package pods_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
)

// runtime asks containerd itself.
func (s *site) runtime() *cri.Client {
	s.t.Helper()
	c, err := cri.Dial(s.rt.Socket, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

func (s *site) sandboxes(c *cri.Client) int {
	s.t.Helper()
	l, err := c.ListPodSandbox(s.t.Context(), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return len(l)
}

func ids(st *corev1.PodStatus) string {
	return fmt.Sprint(st.ContainerStatuses[0].ContainerID, st.ContainerStatuses[0].RestartCount)
}

// TestAgentRestart: the engine comes back to what it left, and touches nothing of
// it; what was deleted meanwhile is ended, and what was added is run.
func TestAgentRestart(t *testing.T) {
	s := newSite(t)
	keep, del, force := pod(t, manifest("keep", forever, "", "")), pod(t, manifest("del", forever, "", "")), pod(t, manifest("force", forever, "", ""))
	for _, p := range []*corev1.Pod{keep, del, force} {
		s.apply(p)
	}
	before := s.until(keep, "running", running)
	s.until(del, "running", running)
	s.until(force, "running", running)
	s.stop()
	now := metav1.Now()
	gone := del.DeepCopy()
	gone.DeletionTimestamp, gone.DeletionGracePeriodSeconds = &now, del.Spec.TerminationGracePeriodSeconds
	s.apply(gone)
	s.withdraw(force)
	added := pod(t, manifest("added", forever, "", ""))
	s.apply(added)
	s.start()
	s.until(added, "running", running)
	s.eventually("del gone", func() bool { r, _, ok := s.report(del); return ok && r.Gone })
	s.eventually("force retracted", func() bool { _, _, ok := s.report(force); return !ok })
	after := s.until(keep, "running", running)
	if ids(&before) != ids(&after) || before.StartTime.Time != after.StartTime.Time {
		t.Errorf("kept pod was touched:\n%+v\n%+v", before, after)
	}
	if n := s.sandboxes(s.runtime()); n != 2 {
		t.Errorf("%d sandboxes; want keep's and added's", n)
	}
	for _, p := range []*corev1.Pod{del, force} {
		if _, err := os.Stat(filepath.Join(s.dir, "pods", string(p.UID))); err == nil {
			t.Errorf("%s left its folder", p.Name)
		}
		if _, err := os.Stat(filepath.Join(s.dir, "logs", "default_"+p.Name+"_"+string(p.UID))); err == nil {
			t.Errorf("%s left its logs", p.Name)
		}
	}
}

// TestReboot: all containers and the engine end at once, while there is no cloud.
func TestReboot(t *testing.T) {
	s := newSite(t)
	always := pod(t, manifest("always", forever, "", ""))
	once := pod(t, manifest("once", "echo done", "", "restartPolicy: Never"))
	s.apply(always)
	s.apply(once)
	s.until(always, "running", running)
	s.until(once, "succeeded", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
	s.stop()
	s.rt.Kill()
	if err := s.rt.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := s.rt.Restart(); err != nil {
		t.Fatal(err)
	}
	s.start()
	st := s.until(always, "running again", func(st *corev1.PodStatus) bool {
		return running(st) && st.ContainerStatuses[0].RestartCount == 1
	})
	if st.ContainerStatuses[0].LastTerminationState.Terminated == nil {
		t.Errorf("no word of the container before: %+v", st.ContainerStatuses[0])
	}
	if _, st, _ := s.report(once); st.Phase != corev1.PodSucceeded || st.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("a pod that had ended: %+v", st)
	}
}

// TestRuntimeKilled: containers live on without containerd, and pods of that time
// begin when it is back.
func TestRuntimeKilled(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("before", forever, "", ""))
	s.apply(p)
	before := s.until(p, "running", running)
	s.rt.Kill()
	q := pod(t, manifest("meanwhile", forever, "", ""))
	s.apply(q)
	if err := s.rt.Restart(); err != nil {
		t.Fatal(err)
	}
	s.until(q, "running", running)
	if after := s.until(p, "running", running); ids(&before) != ids(&after) {
		t.Errorf("restarted:\n%+v\n%+v", before, after)
	}
}

// TestContainerKilled: a container that is killed from outside is started again.
func TestContainerKilled(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("killed", forever, "", ""))
	s.apply(p)
	s.until(p, "running", running)
	if err := s.rt.KillContainers(); err != nil {
		t.Fatal(err)
	}
	s.until(p, "running again", func(st *corev1.PodStatus) bool {
		// More than once: the kill goes on until nothing is left to be killed, and
		// what was started again meanwhile is not spared.
		return running(st) && st.ContainerStatuses[0].RestartCount >= 1
	})
}

// TestStaticPod: a pod from the node's folder, that changes and goes.
func TestStaticPod(t *testing.T) {
	s := newSite(t)
	file := filepath.Join(s.static, "web.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(manifest("web", forever, "", ""))
	named := &corev1.Pod{}
	named.Namespace, named.Name = "default", "web-"+node
	first := s.until(named, "running", running)
	r, _, _ := s.report(named)
	if r.Static == nil {
		t.Error("the cloud is not told what it is")
	}
	write(manifest("web", forever+" # changed", "", ""))
	s.until(named, "another pod", func(st *corev1.PodStatus) bool {
		return running(st) && st.ContainerStatuses[0].ContainerID != first.ContainerStatuses[0].ContainerID
	})
	write("kind: Pod\nnonsense: 1")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	s.eventually("gone", func() bool { _, _, ok := s.report(named); return !ok })
	c := s.runtime()
	s.eventually("no sandbox left", func() bool { return s.sandboxes(c) == 0 })
}

// TestForeign: what belongs to others on the same runtime is left alone.
func TestForeign(t *testing.T) {
	s := newSite(t)
	c := s.runtime()
	id, err := c.RunPodSandbox(t.Context(), &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "theirs", Namespace: "default", Uid: "99999999-0000-0000-0000-000000000000"},
		Labels:   map[string]string{"io.kubernetes.pod.uid": "99999999-0000-0000-0000-000000000000"},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{CgroupParent: s.rt.Cgroup + "/theirs"},
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	p := pod(t, manifest("ours", forever, "", ""))
	s.apply(p)
	s.until(p, "running", running)
	s.remove(p)
	s.stop()
	s.start()
	s.apply(p)
	s.until(p, "running", running)
	st, err := c.PodSandboxStatus(t.Context(), id)
	if err != nil || st.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("their sandbox: %v, %v", st, err)
	}
}

// TestReplaced: a new pod of the same name runs though the old one still ends, and
// the report is the new one's.
func TestReplaced(t *testing.T) {
	s := newSite(t)
	old := pod(t, manifest("web", "trap '' TERM; while :; do sleep 0.1; done", "", ""))
	s.apply(old)
	s.until(old, "running", running)
	next := pod(t, manifest("web", forever, "", ""))
	next.UID = "22222222-0000-0000-0000-000000000000"
	s.apply(next)
	s.until(next, "running", func(st *corev1.PodStatus) bool {
		r, _, _ := s.report(next)
		return r.UID == string(next.UID) && running(st)
	})
	c := s.runtime()
	s.eventually("only the new one's sandbox", func() bool { return s.sandboxes(c) == 1 })
	if r, _, _ := s.report(next); r.UID != string(next.UID) {
		t.Errorf("the report is of %s", r.UID)
	}
}

// TestShutdown: the node goes down in order, without the cloud, and what is always
// restarted is back after the boot.
func TestShutdown(t *testing.T) {
	s := newSite(t)
	always := pod(t, manifest("always", forever, "", ""))
	never := pod(t, manifest("never", forever, "", "restartPolicy: Never"))
	s.apply(always)
	s.apply(never)
	s.until(always, "running", running)
	s.until(never, "running", running)
	s.engine.Terminate(t.Context())
	c := s.runtime()
	l, err := c.ListPodSandbox(t.Context(), &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}})
	if err != nil || len(l) != 0 {
		t.Errorf("%d sandboxes still run, %v", len(l), err)
	}
	if _, st, _ := s.report(never); st.Phase != corev1.PodFailed || st.Reason != "Terminated" {
		t.Errorf("never: %s %s", st.Phase, st.Reason)
	}
	if _, st, _ := s.report(always); st.Phase != corev1.PodRunning {
		t.Errorf("always: %s %s: nobody would start it again without the cloud", st.Phase, st.Reason)
	}
	late := pod(t, manifest("late", forever, "", ""))
	s.apply(late)
	s.stop()
	s.start()
	s.until(always, "running again", func(st *corev1.PodStatus) bool { return running(st) && st.ContainerStatuses[0].RestartCount == 1 })
	s.until(late, "running", running)
}
