package pods

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/fairlead-io/fairlead/tools/stack"
)

// scenario is a manifest, what happens to it, and in what the two nodes may differ.
type scenario struct {
	name string // testdata/NAME.yaml
	// do waits for what is to come, and does what the user would. Then the pods are
	// deleted, and what was seen is compared.
	do      func(*side)
	differs []differs
}

// side is a scenario on one of the nodes.
type side struct {
	*testing.T
	*recorder
	ctx  context.Context
	node *node
	ns   string
	// names stand in manifests for what differs between the nodes.
	names map[string]string
	// port is HOSTPORT, a free one of the host, and dir HOSTDIR.
	port int
	dir  string
}

// quiet is how long nothing may change for the record to be whole: the kubelet
// writes a status and an event within milliseconds.
const quiet = 1500 * time.Millisecond

// sameOnBoth runs scenarios on both nodes at the same time, several scenarios
// side by side, and compares what Kubernetes got to see.
func sameOnBoth(t *testing.T, scenarios []scenario) {
	t.Helper()
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			seen := map[string]map[string][]string{}
			var sides []*side
			t.Run("on", func(t *testing.T) {
				for role, n := range map[string]*node{"kubelet": stock, "agent": agent} {
					s := newSide(t, sc.name, role, n)
					sides = append(sides, s)
					t.Run(role, func(t *testing.T) {
						t.Parallel()
						s := *s
						s.T = t
						s.run(sc)
					})
				}
			})
			for _, s := range sides {
				role := "agent"
				if s.node == stock {
					role = "kubelet"
				}
				seen[role] = s.history()
			}
			for _, d := range compare(seen["kubelet"], seen["agent"], sc.differs) {
				t.Error(d)
			}
			if t.Failed() {
				t.Logf("the kubelet:\n%s\nthe agent:\n%s", text(seen["kubelet"]), text(seen["agent"]))
			}
		})
	}
}

// newSide makes a namespace for a scenario on a node, and begins to record.
func newSide(t *testing.T, name, role string, n *node) *side {
	t.Helper()
	s := &side{T: t, node: n, ns: name + "-" + role, dir: filepath.Join(n.rt.Dir, "host", name)}
	ctx, cancel := context.WithCancel(context.Background())
	s.ctx = ctx
	var err error
	if s.port, err = stack.FreePort(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if name == "propagation" {
		shared(t, s.dir)
	}
	s.names = map[string]string{
		"HOSTPORT": fmt.Sprint(s.port), "HOSTDIR": s.dir, "NODE": n.name, "RUNTIMECLASS": s.ns, "CASE": name,
	}
	if _, err := kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// What every pod needs, the controllers make a moment later.
	s.poll("the namespace's service account and root certificates", func(ctx context.Context) error {
		_, err := kube.CoreV1().ServiceAccounts(s.ns).Get(ctx, "default", metav1.GetOptions{})
		_, err2 := kube.CoreV1().ConfigMaps(s.ns).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		return errors.Join(err, err2)
	})
	back := map[string]string{n.rt.Dir: "DIR", n.data: "DATA", hostIP(): "HOST-IP"}
	for to, from := range s.names {
		if to != "CASE" { // the same on both
			back[from] = to
		}
	}
	back[s.ns] = "NAMESPACE"
	rec, done, err := record(ctx, kube, s.ns, normalizer(back))
	if err != nil {
		t.Fatal(err)
	}
	s.recorder = rec
	t.Cleanup(func() {
		cancel()
		<-done
		_ = kube.CoreV1().Namespaces().Delete(context.Background(), s.ns, metav1.DeleteOptions{}) // it is empty, and the cluster ends soon
	})
	return s
}

// hostIP is what both nodes say is theirs.
func hostIP() string {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return ""
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && n.IP.To4() != nil && !strings.HasPrefix(n.IP.String(), "10.87.") {
			return n.IP.String()
		}
	}
	return ""
}

func (s *side) run(sc scenario) {
	manifest, err := os.ReadFile(filepath.Join("testdata", sc.name+".yaml"))
	if err != nil {
		s.Fatal(err)
	}
	s.apply(string(manifest))
	sc.do(s)
	s.rest()
	s.deleteAll()
	s.rest()
}

func (s *side) rest() {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	if err := s.settle(ctx, quiet); err != nil {
		s.Fatalf("it never comes to rest: %v\n%s", err, text(s.history()))
	}
}

// deleteAll deletes the pods as kubectl delete does and waits until they are gone.
func (s *side) deleteAll() {
	s.Helper()
	l, err := kube.CoreV1().Pods(s.ns).List(s.ctx, metav1.ListOptions{})
	if err != nil {
		s.Fatal(err)
	}
	for _, p := range l.Items {
		s.delete(p.Name, nil)
	}
	for _, p := range l.Items {
		s.until(p.Name+" is gone", func() bool { _, gone := s.pod(p.Name); return gone })
	}
}

func (s *side) delete(pod string, grace *int64) {
	s.Helper()
	if err := kube.CoreV1().Pods(s.ns).Delete(s.ctx, pod, metav1.DeleteOptions{GracePeriodSeconds: grace}); err != nil && !apierrors.IsNotFound(err) {
		s.Fatal(err)
	}
}

// apply creates what a manifest has, after putting the node's own names in.
func (s *side) apply(manifest string) {
	s.Helper()
	for name, value := range s.names {
		manifest = strings.ReplaceAll(manifest, name, value)
	}
	r := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(manifest)))
	for {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			s.Fatal(err)
		}
		if len(bytes.TrimSpace(doc)) == 0 {
			continue
		}
		o, _, err := scheme.Codecs.UniversalDeserializer().Decode(doc, nil, nil)
		if err != nil {
			s.Fatalf("%v in\n%s", err, doc)
		}
		switch o := o.(type) {
		case *corev1.Pod:
			_, err = kube.CoreV1().Pods(s.ns).Create(s.ctx, o, metav1.CreateOptions{})
		case *corev1.ConfigMap:
			_, err = kube.CoreV1().ConfigMaps(s.ns).Create(s.ctx, o, metav1.CreateOptions{})
		case *corev1.Secret:
			_, err = kube.CoreV1().Secrets(s.ns).Create(s.ctx, o, metav1.CreateOptions{})
		case *corev1.Service:
			_, err = kube.CoreV1().Services(s.ns).Create(s.ctx, o, metav1.CreateOptions{})
		case *nodev1.RuntimeClass:
			_, err = kube.NodeV1().RuntimeClasses().Create(s.ctx, o, metav1.CreateOptions{})
		default:
			err = fmt.Errorf("no idea how to create a %T", o)
		}
		if err != nil {
			s.Fatal(err)
		}
	}
}

// until waits until ok, which is asked after each change of the record.
func (s *side) until(what string, ok func() bool) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	if err := s.wait(ctx, ok); err != nil {
		s.Fatalf("never: %s (%v); seen:\n%s", what, err, text(s.history()))
	}
}

// poll repeats f until it gives no error.
func (s *side) poll(what string, f func(context.Context) error) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	for {
		err := f(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			s.Fatalf("never: %s: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// status is one of a pod's containers, of any kind; nil before it is reported.
func (s *side) status(pod, name string) *corev1.ContainerStatus {
	p, _ := s.pod(pod)
	if p == nil {
		return nil
	}
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// The ends of scenarios.

func phase(want corev1.PodPhase) func(*side) {
	return func(s *side) {
		s.Helper()
		s.until("a is "+string(want), func() bool { p, _ := s.pod("a"); return p != nil && p.Status.Phase == want })
	}
}

// ended ends when the pod does, in whatever way.
func ended(s *side) {
	s.Helper()
	s.until("a has ended", func() bool {
		p, _ := s.pod("a")
		return p != nil && (p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed)
	})
}

func condition(kind corev1.PodConditionType, want corev1.ConditionStatus) func(*side) {
	return func(s *side) {
		s.Helper()
		s.until(fmt.Sprintf("%s of a is %s", kind, want), func() bool { return s.condition("a", kind) == want })
	}
}

func (s *side) condition(pod string, kind corev1.PodConditionType) corev1.ConditionStatus {
	p, _ := s.pod(pod)
	if p == nil {
		return ""
	}
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c.Status
		}
	}
	return ""
}

func ready(s *side) {
	s.Helper()
	condition(corev1.PodReady, corev1.ConditionTrue)(s)
}

// waiting ends when a container waits for this reason.
func waiting(name, reason string) func(*side) {
	return func(s *side) {
		s.Helper()
		s.until(fmt.Sprintf("%s waits with %s", name, reason), func() bool {
			c := s.status("a", name)
			return c != nil && c.State.Waiting != nil && c.State.Waiting.Reason == reason
		})
	}
}

// crashLoop ends when a container waits before its next restart, and the event of
// that is there.
func crashLoop(name string) func(*side) {
	return then(waiting(name, "CrashLoopBackOff"), event("a Warning BackOff"), func(s *side) { s.freeze() })
}

// pullLoop ends when a container waits for the second attempt to pull its image.
func pullLoop(s *side) {
	s.Helper()
	waiting("c", "ImagePullBackOff")(s)
	event("Error: ImagePullBackOff")(s)
	s.rest()
	s.freeze()
}

// event ends when an event has this text: "a Warning BackOff".
func event(text string) func(*side) {
	return func(s *side) {
		s.Helper()
		s.until("the event "+text, func() bool { return s.recorder.event(text) })
	}
}

// then does one after the other.
func then(steps ...func(*side)) func(*side) {
	return func(s *side) {
		s.Helper()
		for _, step := range steps {
			step(s)
		}
	}
}

func (n *node) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		o, err := kube.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
		if err == nil {
			err = fmt.Errorf("its conditions are %v", o.Status.Conditions)
			for _, c := range o.Status.Conditions {
				if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
					return nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s was never Ready: %w", n.name, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// shared makes a folder a shared mount, whatever the one is that it lies on.
func shared(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(unix.Mount(dir, dir, "", unix.MS_BIND, ""), unix.Mount("", dir, "", unix.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}
