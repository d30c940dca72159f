package pods_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/edge/pods"
	"github.com/fairlead-io/fairlead/edge/pods/shutdown"
	"github.com/fairlead-io/fairlead/edge/pods/spec"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

const (
	node     = "plant-7"
	patience = 90 * time.Second
)

// site is a node: a containerd, a broker with a store, and the engine between
// them, which may be stopped and started.
type site struct {
	t       *testing.T
	rt      *testruntime.Runtime
	bus     *broker.Broker
	key     *seal.Key
	dir     string
	static  string
	settled atomic.Bool
	rev     int64
	engine  *pods.Engine // the one that runs, or ran last

	cancel context.CancelFunc
	ended  chan error

	mu     sync.Mutex
	events []payload.KubernetesEvent
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, rt: testruntime.Start(t), rev: 1}
	s.dir = filepath.Join(s.rt.Dir, "agent") // the runtime takes down what is mounted there
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s.settled.Store(true)
	var err error
	if s.key, err = seal.NewKey(); err != nil {
		t.Fatal(err)
	}
	s.static = filepath.Join(s.dir, "static")
	if err := os.Mkdir(s.static, 0o700); err != nil {
		t.Fatal(err)
	}
	if s.bus, err = broker.Open(broker.Options{Dir: filepath.Join(s.dir, "store"), Node: node, Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, nil }}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.bus.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err = s.bus.Watch(t.Context(), topic.Filter("fl/"+node+"/event/kubernetes/#"), func(m broker.Message) {
		var e payload.KubernetesEvent
		if payload.Decode(m.Payload, &e) == nil {
			s.mu.Lock()
			s.events = append(s.events, e)
			s.mu.Unlock()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *site) host() spec.Node {
	return spec.Node{
		HostIPs: []string{"192.0.2.7"}, CPUs: 2, Memory: 8 << 30,
		Resolv: &spec.Resolv{Nameservers: []string{"192.0.2.53"}},
		Allocatable: corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("2"), corev1.ResourceMemory: resource.MustParse("8Gi"), corev1.ResourcePods: resource.MustParse("110"),
		},
	}
}

func (s *site) start() {
	s.t.Helper()
	var log *slog.Logger
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(s.t.Output(), nil))
	}
	e, err := pods.New(pods.Config{
		Node: node, Dir: s.dir, Bus: s.bus, Runtime: s.rt.Socket, Key: s.key, Host: s.host,
		LogRoot: filepath.Join(s.dir, "logs"), CgroupRoot: s.rt.Cgroup, StaticPods: s.static, Settled: s.settled.Load, Logger: log,
		Shutdown: []shutdown.Period{{Priority: 0, Grace: 20 * time.Second}, {Priority: 2_000_000_000, Grace: 10 * time.Second}},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.engine = e
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	s.ended = make(chan error, 1)
	ended := s.ended
	go func() { ended <- e.Run(ctx) }()
}

// stop stops the engine; containers live on.
func (s *site) stop() {
	if s.cancel == nil {
		return
	}
	s.cancel()
	s.cancel = nil
	if err := <-s.ended; err != nil {
		s.t.Errorf("the engine ended with %v", err)
	}
}

// pod reads a pod's manifest, with the API server's defaults that matter.
func pod(t *testing.T, manifest string) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{}
	if err := yaml.UnmarshalStrict([]byte(manifest), p); err != nil {
		t.Fatal(err)
	}
	if p.Namespace == "" {
		p.Namespace = "default"
	}
	if p.UID == "" {
		p.UID = types.UID("11111111-2222-3333-4444-" + typesUID(p.Name))
	}
	pods.Defaults(p)
	return p
}

func (s *site) publish(t topic.Topic, b []byte) {
	s.t.Helper()
	if err := s.bus.Publish(s.t.Context(), broker.Message{Topic: t, Payload: b, QoS: 1, Retain: true}); err != nil {
		s.t.Fatal(err)
	}
}

// apply publishes a pod as the cloud does.
func (s *site) apply(p *corev1.Pod) {
	s.t.Helper()
	s.applyHandler(p, "")
}

// applyHandler does so for a pod whose RuntimeClass has a handler.
func (s *site) applyHandler(p *corev1.Pod, handler string) {
	s.t.Helper()
	s.rev++
	m, err := json.Marshal(p.ObjectMeta)
	if err != nil {
		s.t.Fatal(err)
	}
	sp, err := json.Marshal(p.Spec)
	if err != nil {
		s.t.Fatal(err)
	}
	s.publish(topic.DesiredPod(node, p.Namespace, p.Name), payload.Encode(payload.Pod{UID: string(p.UID), Rev: s.rev, Metadata: m, Spec: sp, Handler: handler}))
}

// withdraw takes a pod out of the desired state.
func (s *site) withdraw(p *corev1.Pod) {
	s.t.Helper()
	s.publish(topic.DesiredPod(node, p.Namespace, p.Name), nil)
}

// report is what the node says of a pod.
func (s *site) report(p *corev1.Pod) (r payload.ReportedPod, st corev1.PodStatus, ok bool) {
	s.t.Helper()
	b, ok := s.bus.Retained(topic.ReportedPod(node, p.Namespace, p.Name))
	if !ok {
		return r, st, false
	}
	if err := payload.Decode(b, &r); err != nil {
		s.t.Fatal(err)
	}
	if err := json.Unmarshal(r.Status, &st); err != nil {
		s.t.Fatal(err)
	}
	return r, st, true
}

func (s *site) eventually(what string, cond func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("not within %s: %s\nevents:\n%s", patience, what, s.said())
		}
	}
}

// until waits for a status.
func (s *site) until(p *corev1.Pod, what string, cond func(st *corev1.PodStatus) bool) corev1.PodStatus {
	s.t.Helper()
	var last corev1.PodStatus
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if _, st, ok := s.report(p); ok {
			if last = st; cond(&st) {
				return st
			}
		}
		if time.Now().After(deadline) {
			b, _ := yaml.Marshal(last)
			s.t.Fatalf("%s: not within %s: %s\n%s\nevents:\n%s", p.Name, patience, what, b, s.said())
		}
	}
}

// said lists the events so far.
func (s *site) said() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	for _, e := range s.events {
		fmt.Fprintf(&b, "  %s %s %s/%s: %s\n", e.Type, e.Reason, e.Kind, e.Name, e.Message)
	}
	return b.String()
}

// heard tells whether an event of the reason came whose message has the text.
func (s *site) heard(reason, text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if e.Reason == reason && strings.Contains(e.Message, text) {
			return true
		}
	}
	return false
}

func running(st *corev1.PodStatus) bool {
	if st.Phase != corev1.PodRunning {
		return false
	}
	for _, c := range st.ContainerStatuses {
		if !c.Ready {
			return false
		}
	}
	return true
}

// typesUID makes twelve hexadecimal digits of a name.
func typesUID(name string) string {
	return fmt.Sprintf("%012x", []byte(name))[:12]
}

const sleeper = `
apiVersion: v1
kind: Pod
metadata: {name: sleeper}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: "fairlead.test/busybox:1", command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 0.1; done"]}
`

func TestRunAndDelete(t *testing.T) {
	s := newSite(t)
	p := pod(t, sleeper)
	s.apply(p)
	st := s.until(p, "running", running)
	if st.PodIP == "" || st.ContainerStatuses[0].ContainerID == "" {
		t.Errorf("status: %+v", st)
	}
	now := metav1.Now()
	p.DeletionTimestamp = &now
	p.DeletionGracePeriodSeconds = p.Spec.TerminationGracePeriodSeconds
	s.apply(p)
	s.eventually("gone", func() bool { r, _, ok := s.report(p); return ok && r.Gone })
	s.withdraw(p)
	s.eventually("retracted", func() bool { _, _, ok := s.report(p); return !ok })
}
