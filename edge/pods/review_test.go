package pods_test

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/edge/pods/podstatus"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// box makes a sandbox in the pod's name, as an agent does that is killed thereafter.
func (s *site) box(c *cri.Client, p *corev1.Pod) (string, *runtimeapi.PodSandboxConfig) {
	s.t.Helper()
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: p.Name, Namespace: p.Namespace, Uid: string(p.UID)},
		Labels: map[string]string{
			"io.kubernetes.pod.name": p.Name, "io.kubernetes.pod.namespace": p.Namespace, "io.kubernetes.pod.uid": string(p.UID), "fairlead.dev/node": node,
		},
		LogDirectory: s.logs(p),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: s.rt.Cgroup + "/" + p.Name},
	}
	id, err := c.RunPodSandbox(s.t.Context(), cfg, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return id, cfg
}

func (s *site) logs(p *corev1.Pod) string {
	return filepath.Join(s.dir, "logs", p.Namespace+"_"+p.Name+"_"+string(p.UID))
}

// half makes one of the pod's containers and does not start it.
func (s *site) half(c *cri.Client, p *corev1.Pod, sandbox string, cfg *runtimeapi.PodSandboxConfig, attempt uint32) string {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Join(s.logs(p), "main"), 0o700); err != nil {
		s.t.Fatal(err)
	}
	labels := map[string]string{"io.kubernetes.container.name": "main"}
	for k, v := range cfg.Labels {
		labels[k] = v
	}
	id, err := c.CreateContainer(s.t.Context(), sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main", Attempt: attempt}, Labels: labels,
		Image: &runtimeapi.ImageSpec{Image: "fairlead.test/busybox:1"}, Command: []string{"sh", "-c", forever},
		LogPath: "main/" + strconv.Itoa(int(attempt)) + ".log", Linux: &runtimeapi.LinuxContainerConfig{},
	}, cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

// leases counts the addresses in use.
func (s *site) leases() int {
	n := 0
	_ = filepath.WalkDir(filepath.Join(s.rt.Dir, "ipam"), func(path string, d os.DirEntry, err error) error {
		if err == nil {
			if _, err := netip.ParseAddr(d.Name()); err == nil {
				n++
			}
		}
		return nil
	})
	return n
}

// TestTwins: two containers of one name run, as when the runtime went on with what
// a killed agent had asked for. The pod ends all the same.
func TestTwins(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("twins", forever, "", ""))
	s.apply(p)
	s.until(p, "running", running)
	c := s.runtime()
	boxes, err := c.ListPodSandbox(t.Context(), nil)
	if err != nil || len(boxes) != 1 {
		t.Fatal(boxes, err)
	}
	cfg := &runtimeapi.PodSandboxConfig{Metadata: boxes[0].Metadata, Labels: boxes[0].Labels, LogDirectory: s.logs(p), Linux: &runtimeapi.LinuxPodSandboxConfig{}}
	s.stop()
	id := s.half(c, p, boxes[0].Id, cfg, 7)
	if err := c.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.remove(p)
	if n := s.sandboxes(c); n != 0 {
		t.Errorf("%d sandboxes left", n)
	}
}

// TestHalfMade: the agent and the machine ended between the making of a container
// and its start. It is started once, and never was restarted.
func TestHalfMade(t *testing.T) {
	for _, dead := range []bool{false, true} {
		t.Run("sandbox dead "+strconv.FormatBool(dead), func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.stop()
			p := pod(t, manifest("half", forever, "", "restartPolicy: Never"))
			c := s.runtime()
			id, cfg := s.box(c, p)
			s.half(c, p, id, cfg, 0)
			if dead {
				if err := c.StopPodSandbox(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
			s.apply(p)
			s.start()
			if st := s.until(p, "running", running); st.ContainerStatuses[0].RestartCount != 0 {
				t.Errorf("%d restarts of a container that never ran before", st.ContainerStatuses[0].RestartCount)
			}
			all, err := c.ListContainers(t.Context(), nil)
			if err != nil || len(all) != 1 {
				t.Errorf("%d containers: %v", len(all), err)
			}
		})
	}
}

// TestMirrorWithdrawn: the mirror pod of a static pod comes and goes; the static pod
// is the node's own.
func TestMirrorWithdrawn(t *testing.T) {
	s := newSite(t)
	if err := os.WriteFile(filepath.Join(s.static, "web.yaml"), []byte(manifest("web", forever, "", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	named := pod(t, manifest("web-"+node, forever, "", ""))
	before := s.until(named, "running", running)
	named.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	s.apply(named)
	s.withdraw(named)
	named.Annotations = nil // an impostor of its name
	s.apply(named)
	s.withdraw(named)
	other := pod(t, manifest("other", forever, "", ""))
	s.apply(other) // later on the same queue
	s.until(other, "running", running)
	if s.heard("Killing", "") {
		t.Errorf("events:\n%s", s.said())
	}
	if after := s.until(named, "running", running); ids(&before) != ids(&after) {
		t.Errorf("restarted: %s, %s", ids(&before), ids(&after))
	}
}

// TestUnreadableAtStart: a description that this agent cannot read ends nobody.
func TestUnreadableAtStart(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("odd", forever, "", ""))
	s.apply(p)
	before := s.until(p, "running", running)
	s.stop()
	s.publish(topic.DesiredPod(node, p.Namespace, p.Name), payload.Encode(payload.Pod{UID: string(p.UID), Rev: 9, Metadata: []byte(`{"name":1}`), Spec: []byte(`{}`)}))
	s.start()
	other := pod(t, manifest("other", forever, "", ""))
	s.apply(other)
	s.until(other, "running", running) // the first look at the runtime was before
	if s.heard("Killing", "") {
		t.Errorf("events:\n%s", s.said())
	}
	s.apply(p)
	if after := s.until(p, "running", running); ids(&before) != ids(&after) {
		t.Errorf("restarted: %s, %s", ids(&before), ids(&after))
	}
}

// TestWantedAgain: a pod that was withdrawn is wanted again while it ends.
func TestWantedAgain(t *testing.T) {
	s := newSite(t)
	p := pod(t, strings.Replace(manifest("again", "trap '' TERM; while :; do sleep 0.1; done", "", ""), "Seconds: 1", "Seconds: 3", 1))
	s.apply(p)
	before := s.until(p, "running", running)
	s.withdraw(p)
	s.eventually("it ends", func() bool { return s.heard("Killing", "") })
	s.apply(p)
	s.until(p, "running again", func(st *corev1.PodStatus) bool {
		return running(st) && st.ContainerStatuses[0].ContainerID != before.ContainerStatuses[0].ContainerID
	})
}

// TestEvictWithdrawn: the eviction of a pod that nobody wants any more ends with the
// pod, and with its volumes.
func TestEvictWithdrawn(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("going", "trap '' TERM; while :; do sleep 0.1; done", "volumeMounts: [{name: w, mountPath: /w}]", "volumes: [{name: w, emptyDir: {}}]"))
	s.apply(p)
	s.until(p, "running", running)
	s.withdraw(p)
	s.eventually("it ends", func() bool { return s.heard("Killing", "") })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.engine.Evict(ctx, p.UID, podstatus.Failure{Reason: "Evicted"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "pods", string(p.UID))); err == nil {
		t.Error("its volumes are there")
	}
}

// TestAdmitAfterRestart: pods that have ended do not count, though the agent has
// just begun.
func TestAdmitAfterRestart(t *testing.T) {
	s := newSite(t)
	const big = "resources: {requests: {cpu: 1500m}}"
	job := pod(t, manifest("job", "true", big, "restartPolicy: Never"))
	s.apply(job)
	s.until(job, "succeeded", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodSucceeded })
	s.stop()
	next := pod(t, manifest("next", forever, big, ""))
	s.apply(next)
	s.start()
	st := s.until(next, "running or refused", func(st *corev1.PodStatus) bool { return running(st) || st.Phase == corev1.PodFailed })
	if st.Phase != corev1.PodRunning {
		t.Errorf("%s: %s", st.Reason, st.Message)
	}
}

// TestForeignLogs: the log folder of somebody else's pod on the same runtime, such
// as a kubelet's, is not left over.
func TestForeignLogs(t *testing.T) {
	s := newSite(t)
	c := s.runtime()
	_, err := c.RunPodSandbox(t.Context(), &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "theirs", Namespace: "default", Uid: "theirs"},
		Labels:   map[string]string{"io.kubernetes.pod.uid": "theirs"},
		Linux:    &runtimeapi.LinuxPodSandboxConfig{CgroupParent: s.rt.Cgroup + "/theirs"},
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	s.engine.Refresh()
	s.eventually("theirs is known", func() bool { return !s.engine.Gone("theirs") })
	if !s.engine.Gone("nobodys") {
		t.Error("what is nobody's is not gone")
	}
}

// TestAddressesAfterPowerCut: the addresses of dead sandboxes are given back, of
// pods that will not run again and of those that crash.
func TestAddressesAfterPowerCut(t *testing.T) {
	s := newSite(t)
	once := pod(t, manifest("once", forever, "", "restartPolicy: Never"))
	crash := pod(t, manifest("crash", "sleep 1; exit 1", "", ""))
	s.apply(once)
	s.apply(crash)
	s.until(once, "running", running)
	s.until(crash, "running", running)
	if n := s.leases(); n != 2 {
		t.Fatalf("%d addresses in use; want 2", n)
	}
	s.stop()
	s.rt.Kill()
	if err := s.rt.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := s.rt.Restart(); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.until(once, "failed", func(st *corev1.PodStatus) bool { return st.Phase == corev1.PodFailed })
	s.until(crash, "restarted", func(st *corev1.PodStatus) bool {
		return len(st.ContainerStatuses) == 1 && st.ContainerStatuses[0].RestartCount > 0
	})
	s.eventually("one address in use", func() bool { return s.leases() == 1 })
}

// TestStaticInTurn: a static pod that changed begins when the one before has ended,
// as they share the host's ports and folders.
func TestStaticInTurn(t *testing.T) {
	s := newSite(t)
	file := filepath.Join(s.static, "web.yaml")
	text := strings.Replace(manifest("web", "trap '' TERM; while :; do sleep 0.1; done", "", ""), "Seconds: 1", "Seconds: 4", 1)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	named := pod(t, manifest("web-"+node, forever, "", ""))
	first := s.until(named, "running", running)
	if err := os.WriteFile(file, []byte(manifest("web", forever, "", "")), 0o600); err != nil {
		t.Fatal(err)
	}
	next := s.until(named, "the next one", func(st *corev1.PodStatus) bool {
		return running(st) && st.ContainerStatuses[0].ContainerID != first.ContainerStatuses[0].ContainerID
	})
	old, err := s.runtime().ContainerStatus(t.Context(), strings.TrimPrefix(first.ContainerStatuses[0].ContainerID, "containerd://"))
	if err == nil && (old.State != runtimeapi.ContainerState_CONTAINER_EXITED || time.Unix(0, old.FinishedAt).After(next.ContainerStatuses[0].State.Running.StartedAt.Add(time.Second))) {
		t.Errorf("the old one: %v, ended %s; the next began %s", old.State, time.Unix(0, old.FinishedAt), next.ContainerStatuses[0].State.Running.StartedAt)
	}
}

// TestGoneOnce: a pod that was reported as gone stays so until it is withdrawn.
func TestGoneOnce(t *testing.T) {
	s := newSite(t)
	p := pod(t, sleeper)
	s.apply(p)
	s.until(p, "running", running)
	var said []bool
	stop, err := s.bus.Watch(t.Context(), topic.Filter(topic.ReportedPod(node, p.Namespace, p.Name)), func(m broker.Message) {
		var r payload.ReportedPod
		if len(m.Payload) > 0 && payload.Decode(m.Payload, &r) == nil {
			said = append(said, r.Gone)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	now := p.CreationTimestamp.Rfc3339Copy()
	now.Time = time.Now()
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, p.Spec.TerminationGracePeriodSeconds
	gone := func() bool { r, _, ok := s.report(p); return ok && r.Gone && r.Rev == s.rev }
	s.apply(p)
	s.eventually("gone", gone)
	s.apply(p) // again, with another revision
	s.eventually("gone again", gone)
	s.withdraw(p)
	s.eventually("retracted", func() bool { _, _, ok := s.report(p); return !ok })
	stop()
	was := false
	for _, g := range said {
		if was && !g {
			t.Errorf("gone, and back: %v", said)
		}
		was = g
	}
}
