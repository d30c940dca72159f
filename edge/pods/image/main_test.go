package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/tools/testregistry"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// site is a real containerd and a registry that it knows as fairlead.test.
type site struct {
	rt  *testruntime.Runtime
	cri *cri.Client
	reg *testregistry.Registry
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{rt: testruntime.Start(t), reg: testregistry.Start(t)}
	s.known(t, "fairlead.test", s.reg)
	var err error
	if s.cri, err = cri.Dial(s.rt.Socket, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.cri.Close() })
	return s
}

func (s *site) known(t *testing.T, host string, reg *testregistry.Registry) {
	t.Helper()
	if err := s.rt.Registry(host, reg.URL); err != nil {
		t.Fatal(err)
	}
}

// push puts a small image, whose content are the name and the text, into the
// registry.
func push(t *testing.T, reg *testregistry.Registry, name, content string) (digest string) {
	t.Helper()
	archive, err := testruntime.Image(name, []testruntime.File{{Path: "/content", Body: []byte(name + content)}}, testruntime.Config{Cmd: []string{"/content"}})
	if err != nil {
		t.Fatal(err)
	}
	if digest, err = reg.Push(archive); err != nil {
		t.Fatal(err)
	}
	return digest
}

// id asks the runtime what it has under a name; "" is nothing.
func (s *site) id(t *testing.T, name string) string {
	t.Helper()
	img, err := s.cri.ImageStatus(t.Context(), &runtimeapi.ImageSpec{Image: name})
	if err != nil {
		t.Fatal(err)
	}
	return img.GetId()
}

// agent is the Images of an agent that runs on a site, with its events and a
// clock that the test moves.
type agent struct {
	t *testing.T
	*site
	*Images

	mu     sync.Mutex
	events []string
	node   []string
	clock  time.Time
}

func (s *site) agent(t *testing.T, change ...func(*Config)) *agent {
	t.Helper()
	a := &agent{t: t, site: s, clock: time.UnixMilli(1790000000000)}
	cfg := Config{
		Runtime: s.cri,
		Event: func(pod *corev1.Pod, c *corev1.Container, typ, reason, message string) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.events = append(a.events, typ+" "+reason+" "+took.ReplaceAllString(message, "in T (T including"))
		},
		NodeEvent: func(typ, reason, message string) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.node = append(a.node, typ+" "+reason+" "+message)
		},
		Now: func() time.Time {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.clock
		},
	}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if a.Images, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	return a
}

// took matches the times in an event of a pull.
var took = regexp.MustCompile(`in [0-9.]+m?s \([0-9.]+m?s including`)

func (a *agent) pass(d time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clock = a.clock.Add(d)
}

// wantEvents checks the events since the last check.
func (a *agent) wantEvents(want ...string) {
	a.t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Equal(a.events, want) {
		a.t.Errorf("want events\n%q\ngot\n%q", want, a.events)
	}
	a.events = nil
}

// a workload is a pod with one container.
type workload struct {
	pod     *corev1.Pod
	image   string
	policy  corev1.PullPolicy
	secrets []*corev1.Secret
}

func work(uid, image string, policy corev1.PullPolicy, secrets ...*corev1.Secret) workload {
	return workload{&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "pod-" + uid, UID: types.UID(uid)}}, image, policy, secrets}
}

func (a *agent) ensure(ctx context.Context, w workload) (string, error) {
	return a.Ensure(ctx, w.pod, &corev1.Container{Name: "app", Image: w.image, ImagePullPolicy: w.policy}, w.secrets, &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: w.pod.Name, Namespace: w.pod.Namespace, Uid: string(w.pod.UID)},
	})
}

// must ensures, and checks that the runtime knows what comes back.
func (a *agent) must(w workload) string {
	a.t.Helper()
	ref, err := a.ensure(a.t.Context(), w)
	if err != nil {
		a.t.Fatal(err)
	}
	if id := a.id(a.t, ref); ref == "" || id != ref {
		a.t.Fatalf("want the ID of an image that is there, got %q: the runtime has %q", ref, id)
	}
	return ref
}

// refused ensures, and checks the reason why not.
func (a *agent) refused(w workload, reason string) Error {
	a.t.Helper()
	ref, err := a.ensure(a.t.Context(), w)
	var e *Error
	if !errors.As(err, &e) || e.Reason != reason {
		a.t.Fatalf("want %s, got %q, %v", reason, ref, err)
	}
	return *e
}

func secret(uid, name string, auths string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(uid)}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{` + auths + `}}`)}}
}

func auth(where, user, password string) string {
	return fmt.Sprintf(`%q:{"auth":%q}`, where, base64.StdEncoding.EncodeToString([]byte(user+":"+password)))
}

// manifests counts the requests for a repository's manifests.
func manifests(reg *testregistry.Registry, repository string) (n int) {
	for _, q := range reg.Requests() {
		if q.Repository == repository && q.Kind == "manifests" {
			n++
		}
	}
	return n
}

type (
	imageSpec     = runtimeapi.ImageSpec
	authConfig    = runtimeapi.AuthConfig
	sandboxConfig = runtimeapi.PodSandboxConfig
)

func (a *agent) specOf(name string) *imageSpec { return &imageSpec{Image: name} }

func itoa(n uint64) string { return strconv.FormatUint(n, 10) }

func gauge(t *testing.T, g prometheus.Gauge) float64 {
	t.Helper()
	var m dto.Metric
	if err := g.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetGauge().GetValue()
}
