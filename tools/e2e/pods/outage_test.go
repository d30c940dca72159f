package pods

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/tools/stack"
)

// These tests kill parts, one test after the other, and before those that run
// side by side.

// sleeper is a pod that does nothing.
func sleeper(name string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 1
  dnsPolicy: Default
  containers:
  - {name: c, image: "fairlead.test/busybox:1", command: [sh, -c, "trap 'exit 0' TERM; sleep 1000000 & wait"]}
`, name)
}

// onlyAgent is a side on the agent's node, for tests without a counterpart.
func onlyAgent(t *testing.T, name string) *side {
	t.Helper()
	if agent.edge == nil {
		t.Skip("the kubelet is compared with itself")
	}
	return newSide(t, name, "agent", agent)
}

func (s *side) create(names ...string) {
	s.Helper()
	for _, n := range names {
		s.apply(sleeper(n))
	}
}

func (s *side) untilRunning(names ...string) {
	s.Helper()
	for _, n := range names {
		s.until(n+" is ready", func() bool { return s.condition(n, corev1.PodReady) == corev1.ConditionTrue })
	}
}

func numbered(count int) (names []string) {
	for i := range count {
		names = append(names, fmt.Sprintf("p%d", i))
	}
	return names
}

// containers are the running containers of this namespace: id → pod and when it
// was made.
func (s *side) containers() map[string]string {
	s.Helper()
	m := map[string]string{}
	for _, c := range s.allContainers() {
		if c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			m[c.Id] = fmt.Sprintf("%s %d", c.Labels["io.kubernetes.pod.name"], c.CreatedAt)
		}
	}
	return m
}

func (s *side) allContainers() (of []*runtimeapi.Container) {
	s.Helper()
	l, err := stack.Containers(s.ctx, s.node.rt)
	if err != nil {
		s.Fatal(err)
	}
	for _, c := range l {
		if c.Labels["io.kubernetes.pod.namespace"] == s.ns {
			of = append(of, c)
		}
	}
	return of
}

func (s *side) restartAgent() {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	if _, err := fab.StartPodEdge(ctx, s.node.edge, agentArgs...); err != nil {
		s.Fatal(err)
	}
}

func (s *side) startCloud() {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	if err := fab.StartCloud(ctx); err != nil {
		s.Fatal(err)
	}
}

// TestAgentKilled restarts the agent: nothing that runs is touched, and what
// happened meanwhile is noticed.
func TestAgentKilled(t *testing.T) {
	s := onlyAgent(t, "agent-killed")
	names := numbered(3)
	s.create(names...)
	s.untilRunning(names...)
	before := s.containers()
	s.node.edge.Kill()
	s.delete("p0", nil)
	s.create("late")
	s.restartAgent()
	s.untilRunning("late")
	s.until("p0 is gone", func() bool { _, gone := s.pod("p0"); return gone })
	after := s.containers()
	for id, c := range before {
		if strings.HasPrefix(c, "p0 ") {
			if after[id] != "" {
				t.Errorf("the container of the deleted pod still runs")
			}
		} else if after[id] != c {
			t.Errorf("container %s of %s was touched", id, c)
		}
	}
	if len(after) != 3 {
		t.Errorf("containers after the restart: %v; want those of p1, p2 and late", after)
	}
	s.deleteAll()
}

// TestRuntimeKilled restarts containerd: nothing that runs is touched, and new
// pods start.
func TestRuntimeKilled(t *testing.T) {
	s := onlyAgent(t, "runtime-killed")
	s.create("p0", "p1")
	s.untilRunning("p0", "p1")
	before := s.containers()
	s.node.rt.Kill()
	s.create("late")
	if err := s.node.rt.Restart(); err != nil {
		t.Fatal(err)
	}
	s.untilRunning("late")
	after := s.containers()
	for id, c := range before {
		if after[id] != c {
			t.Errorf("container %s of %s was touched", id, c)
		}
	}
	if len(after) != 3 {
		t.Errorf("containers after the restart: %v; want three", after)
	}
	s.deleteAll()
}

// TestPowerCut is a reboot while the cloud is away: all pods are back by
// themselves, and the cloud hears of it.
func TestPowerCut(t *testing.T) {
	s := onlyAgent(t, "power-cut")
	names := numbered(5)
	s.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {k: v}\n")
	s.apply(strings.Replace(sleeper("conf"), "fairlead.test/busybox:1\"", "fairlead.test/busybox:1\", env: [{name: K, valueFrom: {configMapKeyRef: {name: conf, key: k}}}]", 1))
	s.create(names...)
	names = append(names, "conf")
	s.untilRunning(names...)
	uids := map[string]string{}
	for _, n := range names {
		p, _ := s.pod(n)
		uids[n] = string(p.UID)
	}
	fab.Cloud.Kill()
	s.node.edge.Kill()
	if err := s.node.rt.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := s.node.rt.Restart(); err != nil {
		t.Fatal(err)
	}
	s.restartAgent()
	s.poll("all pods run again without the cloud", func(context.Context) error {
		if m := s.containers(); len(m) != len(names) {
			return fmt.Errorf("%d containers run: %v", len(m), m)
		}
		return nil
	})
	s.startCloud()
	for _, n := range names {
		s.until(n+" is known to have restarted", func() bool {
			c := s.status(n, "c")
			return s.condition(n, corev1.PodReady) == corev1.ConditionTrue && c != nil && c.RestartCount == 1
		})
		if p, _ := s.pod(n); string(p.UID) != uids[n] {
			t.Errorf("%s is another pod now", n)
		}
	}
	if n := len(s.containers()); n != len(names) {
		t.Errorf("%d containers run after the cloud's return, want %d", n, len(names))
	}
	s.deleteAll()
}

// TestDeletedOffline deletes pods while the node is out of reach: one in order,
// which stays until the node has said that it is gone, and one by force, which
// the node ends when it is back.
func TestDeletedOffline(t *testing.T) {
	s := onlyAgent(t, "deleted-offline")
	s.create("ordered", "forced", "stays")
	s.untilRunning("ordered", "forced", "stays")
	fab.Cloud.Kill()
	s.delete("ordered", nil)
	zero := int64(0)
	s.delete("forced", &zero)
	s.until("forced is gone from Kubernetes", func() bool { _, gone := s.pod("forced"); return gone })
	if n := len(s.containers()); n != 3 {
		t.Errorf("%d containers run while the node is out of reach, want 3", n)
	}
	if _, gone := s.pod("ordered"); gone {
		t.Error("ordered is gone from Kubernetes, yet it runs")
	}
	s.startCloud()
	s.until("ordered is gone", func() bool { _, gone := s.pod("ordered"); return gone })
	s.poll("only one pod is left", func(context.Context) error {
		if m := s.containers(); len(m) != 1 {
			return fmt.Errorf("containers: %v", m)
		}
		return nil
	})
	s.deleteAll()
}

// TestReplaced deletes a pod by force and makes another of its name at once.
func TestReplaced(t *testing.T) {
	s := onlyAgent(t, "replaced")
	s.create("a")
	s.untilRunning("a")
	old, _ := s.pod("a")
	zero := int64(0)
	s.delete("a", &zero)
	s.create("a")
	s.until("the new a is ready", func() bool {
		p, gone := s.pod("a")
		return !gone && p.UID != old.UID && s.condition("a", corev1.PodReady) == corev1.ConditionTrue
	})
	s.poll("one container is left, of the new pod", func(context.Context) error {
		for _, c := range s.allContainers() {
			if c.Labels["io.kubernetes.pod.uid"] == string(old.UID) {
				return fmt.Errorf("container %s of the old pod is %s", c.Id, c.State)
			}
		}
		if m := s.containers(); len(m) != 1 {
			return fmt.Errorf("containers: %v", m)
		}
		return nil
	})
	s.deleteAll()
}

// TestFiftyPods creates fifty pods at once and deletes them at once.
func TestFiftyPods(t *testing.T) {
	s := onlyAgent(t, "fifty-pods")
	names := numbered(50)
	s.create(names...)
	s.untilRunning(names...)
	if m := s.containers(); len(m) != 50 {
		t.Errorf("%d containers run, want 50", len(m))
	}
	for _, n := range names {
		if c := s.status(n, "c"); c.RestartCount != 0 {
			t.Errorf("%s was restarted %d times", n, c.RestartCount)
		}
	}
	s.deleteAll()
}

// TestStatic compares a pod from the nodes' own folders.
func TestStatic(t *testing.T) {
	t.Parallel()
	histories := map[string]*recorder{}
	t.Run("on", func(t *testing.T) {
		for role, n := range map[string]*node{"kubelet": stock, "agent": agent} {
			s := newSide(t, "static", role, n)
			histories[role] = s.recorder
			t.Run(role, func(t *testing.T) {
				t.Parallel()
				s := *s
				s.T = t
				s.static()
			})
		}
	})
	theirs, ours := histories["kubelet"].history(), histories["agent"].history()
	for _, d := range compare(theirs, ours, []differs{
		{aspect: "PodReadyToStartContainers$", value: "no pod sandbox exists", why: "whether the sandbox is there before the mirror pod is"},
	}) {
		t.Error(d)
	}
	if t.Failed() {
		t.Logf("the kubelet:\n%s\nthe agent:\n%s", text(theirs), text(ours))
	}
}

const staticYAML = `apiVersion: v1
kind: Pod
metadata: {name: own, namespace: %s}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - {name: c, image: "fairlead.test/busybox:1", command: [sh, -c, "trap 'exit 0' TERM; sleep 1000000 & wait"]}
`

func (s *side) static() {
	path := filepath.Join(s.node.staticPods, "own.yaml")
	if err := os.WriteFile(path, fmt.Appendf(nil, staticYAML, s.ns), 0o644); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { _ = os.Remove(path) })
	name := "own-" + s.node.name
	s.untilRunning(name)
	p, _ := s.pod(name)
	for _, a := range []string{"kubernetes.io/config.mirror", "kubernetes.io/config.hash", "kubernetes.io/config.source"} {
		if p.Annotations[a] == "" {
			s.Errorf("the mirror pod has no annotation %s", a)
		}
	}
	if len(p.OwnerReferences) != 1 || p.OwnerReferences[0].Kind != "Node" || p.OwnerReferences[0].Name != s.node.name {
		s.Errorf("the mirror pod's owners are %v; want the node", p.OwnerReferences)
	}
	// Who deletes the mirror deletes the mirror.
	s.delete(name, new(int64))
	s.until("the mirror is back", func() bool {
		now, gone := s.pod(name)
		return !gone && now.UID != p.UID && s.condition(name, corev1.PodReady) == corev1.ConditionTrue
	})
	s.rest()
	s.freeze()
	if n := len(s.containers()); n != 1 {
		s.Errorf("%d containers run, want 1", n)
	}
	if err := os.Remove(path); err != nil {
		s.Fatal(err)
	}
	s.until("the mirror is gone", func() bool { _, gone := s.pod(name); return gone })
	s.poll("the container is gone", func(context.Context) error {
		if m := s.containers(); len(m) > 0 {
			return fmt.Errorf("containers: %v", m)
		}
		return nil
	})
}

// TestDiskFull fills the agent's disk: what runs stays as it is, Kubernetes is
// told, and what came meanwhile starts once there is room again.
func TestDiskFull(t *testing.T) {
	if agent.edge == nil {
		t.Skip("the kubelet is compared with itself")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	rt, err := newRuntime()
	if err != nil {
		t.Fatal(err)
	}
	e := &stack.Edge{Node: "pods-full", Runtime: rt}
	disk := filepath.Join(rt.Dir, "edge")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("full", disk, "tmpfs", 0, "size=96m"); err != nil {
		t.Fatal(err)
	}
	if _, err := fab.StartPodEdge(ctx, e, agentArgs...); err != nil {
		t.Fatal(err)
	}
	n := &node{name: e.Node, rt: rt, data: e.Dir, edge: e}
	t.Cleanup(func() { n.edge.Stop() })
	if err := n.waitReady(ctx); err != nil {
		t.Fatal(err)
	}
	s := newSide(t, "disk-full", "agent", n)
	s.create("before")
	s.untilRunning("before")
	before := s.containers()

	filler := filepath.Join(disk, "filler")
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	s.create("meanwhile")
	s.poll("Kubernetes is told that the disk is full", func(ctx context.Context) error {
		o, err := kube.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range o.Status.Conditions {
			if (c.Type == "EdgeStoreProblem" || c.Type == corev1.NodeDiskPressure) && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("conditions: %v", o.Status.Conditions)
	})
	if after := s.containers(); !maps.Equal(before, after) {
		t.Errorf("containers before %v, with a full disk %v", before, after)
	}
	select {
	case <-e.Done():
		t.Errorf("the agent ended: %v\n%s", e.Exit(), e.Tail(15))
	default:
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	s.untilRunning("meanwhile")
	for id, c := range before {
		if s.containers()[id] != c {
			t.Errorf("container %s of %s was touched", id, c)
		}
	}
	s.deleteAll()
}

// TestUnreachable kills the agent: its node is not Ready within seconds, its pods
// stay, and with its return all is as before.
func TestUnreachable(t *testing.T) {
	s := onlyAgent(t, "unreachable")
	s.create("a")
	s.untilRunning("a")
	before := s.containers()
	s.node.edge.Kill()
	s.poll("the node is not Ready", func(ctx context.Context) error {
		o, err := kube.CoreV1().Nodes().Get(ctx, s.node.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range o.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				return nil
			}
		}
		return errors.New("the node is Ready")
	})
	if _, err := kube.CoreV1().Pods(s.ns).Get(t.Context(), "a", metav1.GetOptions{}); apierrors.IsNotFound(err) {
		t.Error("the pod was evicted")
	}
	s.restartAgent()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.node.waitReady(ctx); err != nil {
		t.Fatal(err)
	}
	s.untilRunning("a")
	if after := s.containers(); !maps.Equal(before, after) {
		t.Errorf("containers before %v, after %v", before, after)
	}
	s.deleteAll()
}
