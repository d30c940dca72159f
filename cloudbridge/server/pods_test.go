package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/cloudbridge/server"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// runsPods is what a node reports whose agent runs pods.
func runsPods(t *testing.T, n *node) (payload.Node, *seal.Key) {
	t.Helper()
	k, err := seal.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return payload.Node{
		Agent: "v1", OS: "linux", Arch: "amd64", CPUs: 2, MemoryBytes: 1 << 30, Hostname: n.name, Pods: true, SealKey: k.Public(),
		Conditions: []payload.NodeCondition{{Type: "Ready", Status: "True", Reason: "KubeletReady", Message: "kubelet is posting ready status", Since: 1}},
	}, k
}

// enrol connects a node that runs pods and waits until it is Ready.
func enrol(t *testing.T, c *cluster, cl *cloud, name string) (*node, *seal.Key) {
	t.Helper()
	n := newNode(name)
	r, k := runsPods(t, n)
	n.report(topic.ReportedNode(name), r)
	n.connect(t, cl.addresses[0], makeToken(t, c, name))
	eventually(t, "the node is Ready", func() bool {
		r, ok := c.ready(t, name)
		return ok && r.Status == corev1.ConditionTrue
	})
	return n, k
}

func (c *cluster) pod(t *testing.T, ns, node string, change func(*corev1.Pod)) *corev1.Pod {
	t.Helper()
	automount := false
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.PodSpec{NodeName: node, AutomountServiceAccountToken: &automount, Containers: []corev1.Container{{Name: "c", Image: "fairlead.test/i"}}},
	}
	if change != nil {
		change(p)
	}
	made, err := c.kube.CoreV1().Pods(ns).Create(t.Context(), p, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func (c *cluster) getPod(t *testing.T, ns, name string) *corev1.Pod {
	t.Helper()
	p, err := c.kube.CoreV1().Pods(ns).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func podCondition(p *corev1.Pod, typ corev1.PodConditionType) corev1.PodCondition {
	for _, c := range p.Status.Conditions {
		if c.Type == typ {
			return c
		}
	}
	return corev1.PodCondition{}
}

func (n *node) sealed(tp topic.Topic) payload.Sealed {
	var s payload.Sealed
	if b, ok := n.has(tp); ok {
		_ = payload.Decode(b, &s)
	}
	return s
}

func open[T any](t *testing.T, k *seal.Key, tp topic.Topic, s payload.Sealed) (v T) {
	t.Helper()
	b, err := k.OpenPayload(tp, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := payload.Decode(b, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// log keeps what the server logs.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// TestSecrets: a Secret goes to the nodes whose pods refer to it, each time
// sealed to the node's key, and never before there is one.
func TestSecrets(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-secret")
	cfg := server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}}
	l := &log{}
	logged := slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cl := startLogged(t, c, cfg, logged)
	n := newNode("secret-1") // an agent that has no key yet
	tok := makeToken(t, c, n.name)
	n.connect(t, cl.addresses[0], tok)
	eventually(t, "the node", func() bool { _, ok := c.ready(t, n.name); return ok })

	immutable := true
	large := bytes.Repeat([]byte("lo\x00ng"), 1<<20/5-64)
	for name, data := range map[string][]byte{"by-env": []byte("v1-env-marker"), "by-volume": []byte("v1-volume-marker"), "pull": []byte("{}"), "unused": []byte("x"), "large": large} {
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string][]byte{"k": data}}
		if name == "pull" {
			s.Type, s.Data, s.Immutable = corev1.SecretTypeDockerConfigJson, map[string][]byte{corev1.DockerConfigJsonKey: data}, &immutable
		}
		if _, err := c.kube.CoreV1().Secrets(ns).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	c.pod(t, ns, n.name, func(p *corev1.Pod) {
		ref := func(n string) corev1.LocalObjectReference { return corev1.LocalObjectReference{Name: n} }
		p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{ref("pull")}
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: ref("by-env")}}}
		p.Spec.Volumes = []corev1.Volume{
			{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "by-volume"}}},
			{Name: "l", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "large"}}},
		}
	})
	eventually(t, "the pod, and nothing secret", func() bool {
		return slices.Equal(n.holds(), []string{"pod/" + ns + "/web"}) && n.inStep()
	})

	r, k := runsPods(t, n)
	n.report(topic.ReportedNode(n.name), r)
	tp := func(name string) topic.Topic { return topic.DesiredSecret(n.name, ns, name) }
	eventually(t, "the secrets", func() bool { return len(n.holds()) == 5 && n.inStep() })
	if _, ok := n.has(tp("unused")); ok {
		t.Error("a Secret that no pod refers to")
	}
	for name, want := range map[string]string{"by-env": "v1-env-marker", "by-volume": "v1-volume-marker", "large": string(large)} {
		if d := open[payload.SecretData](t, k, tp(name), n.sealed(tp(name))); d.Type != "Opaque" || string(d.Data["k"]) != want {
			t.Errorf("%s: type %s, %d bytes", name, d.Type, len(d.Data["k"]))
		}
	}
	if d := open[payload.SecretData](t, k, tp("pull"), n.sealed(tp("pull"))); d.Type != string(corev1.SecretTypeDockerConfigJson) || string(d.Data[corev1.DockerConfigJsonKey]) != "{}" {
		t.Errorf("%+v", d)
	}
	first := n.sealed(tp("by-env"))

	// A change is sealed anew; what did not change is not.
	unchanged, _ := n.has(tp("by-env"))
	if _, err := c.kube.CoreV1().Secrets(ns).Patch(t.Context(), "by-volume", types.MergePatchType, []byte(`{"stringData":{"k":"v2"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the changed secret", func() bool {
		s := n.sealed(tp("by-volume"))
		b, err := k.OpenPayload(tp("by-volume"), s)
		return err == nil && strings.Contains(string(b), `"k":"djI="`)
	})

	// A new cloud process finds on the broker what is good still.
	addr := strings.TrimPrefix(cl.addresses[0], "mqtt://")
	cl.stop()
	cfg.MQTT = []string{addr}
	cl = startLogged(t, c, cfg, logged)
	_, err := c.kube.CoreV1().Secrets(ns).Patch(t.Context(), "by-volume", types.MergePatchType, []byte(`{"stringData":{"k":"v3"}}`), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the secret changed after the restart", func() bool {
		b, err := k.OpenPayload(tp("by-volume"), n.sealed(tp("by-volume")))
		return err == nil && strings.Contains(string(b), `"k":"djM="`) && n.inStep()
	})
	if now, _ := n.has(tp("by-env")); !bytes.Equal(now, unchanged) {
		t.Errorf("sealed anew at a restart\n was %.200s\n is  %.200s", unchanged, now)
	}

	// With another key all is sealed to that one, under the same revs.
	r2, k2 := runsPods(t, n)
	n.report(topic.ReportedNode(n.name), r2)
	eventually(t, "the secrets for the new key", func() bool {
		for _, name := range []string{"by-env", "by-volume", "pull", "large"} {
			if n.sealed(tp(name)).Key != k2.ID() {
				return false
			}
		}
		return n.inStep()
	})
	if s := n.sealed(tp("by-env")); s.Rev != first.Rev || string(open[payload.SecretData](t, k2, tp("by-env"), s).Data["k"]) != "v1-env-marker" {
		t.Errorf("%+v", s)
	}

	now := int64(0)
	if err := c.kube.CoreV1().Pods(ns).Delete(t.Context(), "web", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all is gone", func() bool { return len(n.holds()) == 0 && n.inStep() })
	cl.stop()
	for _, s := range []string{"v1-env-marker", "djEtZW52LW1hcmtlcg", "v1-volume-marker", "djEtdm9sdW1lLW1hcmtlcg"} {
		if strings.Contains(l.b.String(), s) {
			t.Errorf("the log holds %s", s)
		}
	}
}

// TestTokens: a pod's projected tokens are issued bound to it, sealed to its
// node, and outlive a restart of the cloud.
func TestTokens(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-token")
	cfg := server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}}
	cl := start(t, c, cfg)
	n, k := enrol(t, c, cl, "token-1")
	seconds := int64(7200)
	p := c.pod(t, ns, n.name, func(p *corev1.Pod) {
		p.Spec.AutomountServiceAccountToken = nil // the API server adds its own projection
		p.Spec.Volumes = []corev1.Volume{{Name: "vault", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "vault", ExpirationSeconds: &seconds, Path: "t"}}}}}}}
	})
	tp := topic.DesiredToken(n.name, ns, "web")
	eventually(t, "the tokens", func() bool { return n.sealed(tp).UID == string(p.UID) && n.inStep() })
	s := n.sealed(tp)
	now := time.Now()
	if life := time.UnixMilli(s.Exp).Sub(now); life < 50*time.Minute || life > 61*time.Minute {
		t.Errorf("the first expires in %s", life)
	}
	if renew := time.UnixMilli(s.Renew).Sub(now); renew < 40*time.Minute || renew > 49*time.Minute {
		t.Errorf("renewed in %s", renew)
	}
	tokens := open[payload.PodTokens](t, k, tp, s).Tokens
	if len(tokens) != 2 || tokens[0].Audience != "" || tokens[0].Seconds != 3607 || tokens[1].Audience != "vault" || tokens[1].Seconds != 7200 {
		t.Fatalf("%d tokens", len(tokens))
	}
	for _, tok := range tokens {
		var audiences []string
		if tok.Audience != "" {
			audiences = []string{tok.Audience}
		}
		rv, err := c.kube.AuthenticationV1().TokenReviews().Create(t.Context(), &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: tok.Token, Audiences: audiences}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if u := rv.Status.User; !rv.Status.Authenticated || u.Username != "system:serviceaccount:"+ns+":default" || !slices.Equal(u.Extra["authentication.kubernetes.io/pod-uid"], []string{string(p.UID)}) {
			t.Errorf("audience %q: %+v", tok.Audience, rv.Status)
		}
	}
	held, _ := n.has(tp)

	addr := strings.TrimPrefix(cl.addresses[0], "mqtt://")
	cl.stop()
	cfg.MQTT = []string{addr}
	start(t, c, cfg)
	c.pod(t, ns, n.name, func(p *corev1.Pod) { p.Name = "other" })
	eventually(t, "the new process's work", func() bool { return len(n.holds()) == 4 && n.inStep() }) // with kube-root-ca.crt
	if is, _ := n.has(tp); !bytes.Equal(is, held) {
		t.Errorf("issued anew at a restart\n was %.120s\n is  %.120s", held, is)
	}

	r2, k2 := runsPods(t, n) // the node lost its key, and with it the token
	n.report(topic.ReportedNode(n.name), r2)
	eventually(t, "tokens for the new key", func() bool { return n.sealed(tp).Key == k2.ID() })
	if again := n.sealed(tp); again.Rev <= s.Rev || len(open[payload.PodTokens](t, k2, tp, again).Tokens) != 2 {
		t.Errorf("rev %d after %d", again.Rev, s.Rev)
	}
	zero := int64(0)
	if err := c.kube.CoreV1().Pods(ns).Delete(t.Context(), "web", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the tokens are gone", func() bool { _, ok := n.has(tp); return !ok })
}

// TestPodDown: what the node is told of a pod beside its spec.
func TestPodDown(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-down")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n, _ := enrol(t, c, cl, "down-1")
	svc := func(name, ip string) {
		t.Helper()
		_, err := c.kube.CoreV1().Services(ns).Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
			ClusterIP: ip, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	svc("backend", "")
	svc("headless", "None")
	read := func(name string) (p payload.Pod, m metav1.ObjectMeta, s corev1.PodSpec) {
		if b, ok := n.has(topic.DesiredPod(n.name, ns, name)); ok {
			_ = payload.Decode(b, &p)
			_ = json.Unmarshal(p.Metadata, &m)
			_ = json.Unmarshal(p.Spec, &s)
		}
		return
	}
	services := func(p payload.Pod) (out []string) {
		for _, s := range p.Services {
			out = append(out, s.Name)
		}
		return out
	}
	// The Service may come to the cloud after the pod: what counts is what it knew then.
	var pod payload.Pod
	eventually(t, "the services are known", func() bool {
		zero := int64(0)
		_ = c.kube.CoreV1().Pods(ns).Delete(t.Context(), "web", metav1.DeleteOptions{GracePeriodSeconds: &zero})
		made := c.pod(t, ns, n.name, func(p *corev1.Pod) {
			p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/line-free"}}
		})
		eventually(t, "the pod", func() bool { pod, _, _ = read("web"); return pod.UID == string(made.UID) })
		return len(pod.Services) == 2
	})
	if got := services(pod); !slices.Equal(got, []string{"backend", "kubernetes"}) || pod.Services[0].IP == "" || len(pod.Services[0].Ports) != 1 || pod.Services[0].Ports[0] != (payload.ServicePort{Name: "http", Port: 80, Protocol: "TCP"}) {
		t.Errorf("services %+v", pod.Services)
	}
	if _, m, _ := read("web"); m.Generation != 1 || m.CreationTimestamp.IsZero() || len(m.ManagedFields) > 0 {
		t.Errorf("metadata %+v", m)
	}
	if len(pod.Gates) != 0 || pod.Phase != "" {
		t.Errorf("gates %v, phase %q", pod.Gates, pod.Phase)
	}
	no := false
	c.pod(t, ns, n.name, func(p *corev1.Pod) { p.Name, p.Spec.EnableServiceLinks = "alone", &no })
	eventually(t, "a pod without links", func() bool { p, _, _ := read("alone"); return slices.Equal(services(p), []string{"kubernetes"}) })

	// A gate's condition goes down, a new image and an ephemeral container do, a
	// new Service does not.
	svc("later", "")
	if _, err := c.kube.CoreV1().Pods(ns).Patch(t.Context(), "web", types.StrategicMergePatchType, []byte(`{"status":{"conditions":[{"type":"example.com/line-free","status":"True"}]}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the gate", func() bool {
		p, _, _ := read("web")
		return p.Gates["example.com/line-free"] == "True" && p.Rev > pod.Rev
	})
	if _, err := c.kube.CoreV1().Pods(ns).Patch(t.Context(), "web", types.StrategicMergePatchType, []byte(`{"spec":{"containers":[{"name":"c","image":"fairlead.test/j"}]}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the image", func() bool {
		_, m, s := read("web")
		return m.Generation == 2 && s.Containers[0].Image == "fairlead.test/j"
	})
	if _, err := c.kube.CoreV1().Pods(ns).Patch(t.Context(), "web", types.StrategicMergePatchType, []byte(`{"spec":{"ephemeralContainers":[{"name":"d","image":"fairlead.test/d","targetContainerName":"c"}]}}`), metav1.PatchOptions{}, "ephemeralcontainers"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the ephemeral container", func() bool { _, _, s := read("web"); return len(s.EphemeralContainers) == 1 })
	if p, _, _ := read("web"); len(p.Services) != 2 {
		t.Errorf("services %v", services(p))
	}

	// Its end: the grace, the report that it is gone, and that by force.
	n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: pod.UID, Rev: 1, Status: json.RawMessage(`{"phase":"Running"}`)})
	eventually(t, "Running", func() bool { return c.getPod(t, ns, "web").Status.Phase == corev1.PodRunning })
	if err := c.kube.CoreV1().Pods(ns).Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the deletion", func() bool {
		_, m, _ := read("web")
		return m.DeletionTimestamp != nil && m.DeletionGracePeriodSeconds != nil && *m.DeletionGracePeriodSeconds == 30
	})
	n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: "another", Status: json.RawMessage(`{"phase":"Failed"}`), Gone: true})
	n.report(topic.ReportedPod(n.name, ns, "alone"), payload.ReportedPod{UID: string(c.getPod(t, ns, "alone").UID), Status: json.RawMessage(`{"phase":"Succeeded"}`), Gone: true})
	eventually(t, "a phase that is final goes down", func() bool { p, _, _ := read("alone"); return p.Phase == "Succeeded" })
	if c.getPod(t, ns, "web").DeletionTimestamp == nil || c.getPod(t, ns, "alone").DeletionTimestamp != nil {
		t.Error("a pod was deleted for a report about another one, or that nobody wanted to be gone")
	}
	n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: pod.UID, Status: json.RawMessage(`{"phase":"Failed"}`), Gone: true})
	eventually(t, "the pod is gone", func() bool {
		_, err := c.kube.CoreV1().Pods(ns).Get(t.Context(), "web", metav1.GetOptions{})
		_, held := n.has(topic.DesiredPod(n.name, ns, "web"))
		return apierrors.IsNotFound(err) && !held
	})
	zero := int64(0)
	if err := c.kube.CoreV1().Pods(ns).Delete(t.Context(), "alone", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "deleted by force", func() bool { return len(n.holds()) == 0 && n.inStep() })
}

// TestPodStatus: Kubernetes has what the node reports, no more and no less, but
// for what others write there.
func TestPodStatus(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-status")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n, _ := enrol(t, c, cl, "status-1")
	p := c.pod(t, ns, n.name, func(p *corev1.Pod) {
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/line-free"}}
	})
	report := func(s corev1.PodStatus) {
		t.Helper()
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: string(p.UID), Rev: 1, Status: b})
	}
	then := metav1.NewTime(time.Unix(1790000000, 0))
	cond := func(typ corev1.PodConditionType, st corev1.ConditionStatus, reason string) corev1.PodCondition {
		return corev1.PodCondition{Type: typ, Status: st, Reason: reason, LastTransitionTime: then, ObservedGeneration: 1}
	}
	// Others write before and meanwhile.
	if _, err := c.kube.CoreV1().Pods(ns).Patch(t.Context(), "web", types.StrategicMergePatchType, []byte(
		`{"status":{"conditions":[{"type":"example.com/line-free","status":"True"},{"type":"PodScheduled","status":"True"},{"type":"DisruptionTarget","status":"True","reason":"PreemptionByScheduler","lastTransitionTime":"`+time.Now().UTC().Format(time.RFC3339)+`"}]}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	first := corev1.PodStatus{
		Phase: corev1.PodPending, Reason: "R", Message: "M", HostIP: "192.0.2.1", HostIPs: []corev1.HostIP{{IP: "192.0.2.1"}, {IP: "2001:db8::1"}},
		PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "2001:db8::2"}}, StartTime: &then, ObservedGeneration: 1,
		Conditions: []corev1.PodCondition{
			cond(corev1.PodReadyToStartContainers, "True", ""), cond(corev1.PodReady, "False", "ContainersNotReady"), cond(corev1.PodResizePending, "True", "Deferred"),
			{Type: "example.com/line-free", Status: "False"}, // what the node saw is old
		},
		ContainerStatuses:          []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ContainerCreating", Message: "x"}}}},
		InitContainerStatuses:      []corev1.ContainerStatus{{Name: "i"}},
		EphemeralContainerStatuses: []corev1.ContainerStatus{{Name: "e"}},
	}
	report(first)
	eventually(t, "the first status", func() bool {
		p := c.getPod(t, ns, "web")
		return p.Status.PodIP == "10.0.0.1" && len(p.Status.PodIPs) == 2 && len(p.Status.HostIPs) == 2 && podCondition(p, corev1.PodResizePending).Reason == "Deferred"
	})
	second := corev1.PodStatus{
		ObservedGeneration: 1, // the API server does not let it go
		Phase:              corev1.PodRunning, HostIP: "192.0.2.1", HostIPs: []corev1.HostIP{{IP: "192.0.2.1"}}, PodIP: "10.0.0.9", PodIPs: []corev1.PodIP{{IP: "10.0.0.9"}}, StartTime: &then,
		Conditions:        []corev1.PodCondition{cond(corev1.PodReadyToStartContainers, "True", ""), cond(corev1.PodReady, "True", "")},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "c", Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: then}}}},
	}
	report(second)
	check := func(when string) {
		t.Helper()
		var last corev1.PodStatus
		end := time.Now().Add(deadline)
		for time.Now().Before(end) {
			last = c.getPod(t, ns, "web").Status
			got := *last.DeepCopy()
			got.QOSClass = ""
			kept := 0
			got.Conditions = slices.DeleteFunc(got.Conditions, func(x corev1.PodCondition) bool {
				foreign := x.Type == "example.com/line-free" && x.Status == "True" || x.Type == corev1.PodScheduled && x.Status == "True" || x.Type == corev1.DisruptionTarget && x.Reason == "PreemptionByScheduler"
				if foreign {
					kept++
				}
				return foreign
			})
			slices.SortFunc(got.Conditions, func(a, b corev1.PodCondition) int { return strings.Compare(string(a.Type), string(b.Type)) })
			want := *second.DeepCopy()
			slices.SortFunc(want.Conditions, func(a, b corev1.PodCondition) int { return strings.Compare(string(a.Type), string(b.Type)) })
			if kept == 3 && equality.Semantic.DeepEqual(got, want) {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		b, _ := json.Marshal(last)
		t.Fatalf("%s: %s", when, b)
	}
	check("the second status")

	// Somebody else's hand is corrected, as the node lifecycle controller's is.
	if _, err := c.kube.CoreV1().Pods(ns).Patch(t.Context(), "web", types.StrategicMergePatchType, []byte(
		`{"status":{"podIP":"10.9.9.9","podIPs":[{"$patch":"replace"},{"ip":"10.9.9.9"}],"conditions":[{"type":"Ready","status":"False"}]}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	check("after another hand")

	// A report that cannot be read, or that Kubernetes refuses, changes nothing.
	n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: string(p.UID), Status: json.RawMessage(`{"phase":7}`)})
	n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: string(p.UID), Status: json.RawMessage(`{"phase":"Running","podIPs":[{"ip":"nonsense"}]}`)})
	eventually(t, "reports settled", func() bool { return n.out.Pending() == 0 })
	check("after reports that are no good")
}

// TestOffline: a node out of reach makes its pods say so, nobody evicts them, and
// with the link everything is as before.
func TestOffline(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-offline")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n, _ := enrol(t, c, cl, "offline-1")
	enrol(t, c, cl, "offline-2") // where no node is well, the controller evicts nobody
	tolerate := func(p *corev1.Pod) {
		p.Spec.Tolerations = []corev1.Toleration{{Key: "node-role.kubernetes.io/edge", Operator: corev1.TolerationOpExists}}
	}
	p := c.pod(t, ns, n.name, tolerate)
	c.pod(t, ns, n.name, func(p *corev1.Pod) { p.Name = "waiting"; tolerate(p) })
	second := int64(1)
	c.pod(t, ns, n.name, func(p *corev1.Pod) {
		p.Name = "impatient"
		tolerate(p)
		p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &second})
	})
	then := metav1.NewTime(time.Unix(1790000000, 0))
	status := corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &then,
		Conditions:        []corev1.PodCondition{{Type: corev1.PodReady, Status: "True", LastTransitionTime: then}, {Type: corev1.ContainersReady, Status: "True", LastTransitionTime: then}},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "c", Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: then}}}}}
	b, err := json.Marshal(status)
	if err != nil {
		t.Fatal(err)
	}
	n.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: string(p.UID), Status: b})
	ready := func() corev1.PodCondition { return podCondition(c.getPod(t, ns, "web"), corev1.PodReady) }
	eventually(t, "Ready", func() bool { return ready().Status == "True" })

	n.stop()
	tok := makeToken(t, c, n.name)
	offline(t, cl.addresses[0], n.name, tok)
	eventually(t, "the pods say that their node is out of reach", func() bool {
		a, b := c.getPod(t, ns, "web"), c.getPod(t, ns, "waiting")
		return a.Status.Reason == "NodeLost" && b.Status.Reason == "NodeLost" && podCondition(a, corev1.PodReady).Status == "False"
	})
	a := c.getPod(t, ns, "web")
	node, err := c.kube.CoreV1().Nodes().Get(t.Context(), n.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var since time.Time
	for _, x := range node.Status.Conditions {
		if x.Type == corev1.NodeReady {
			since = x.LastTransitionTime.Time
		}
	}
	if r := podCondition(a, corev1.PodReady); r.Reason != "NodeLost" || !r.LastTransitionTime.Time.Equal(since) {
		t.Errorf("%+v, want it since %s", r, since)
	}
	if want := "since " + since.UTC().Format(time.RFC3339); !strings.Contains(a.Status.Message, want) {
		t.Errorf("message %q, want %q", a.Status.Message, want)
	}
	if a.Status.Phase != corev1.PodRunning || len(a.Status.ContainerStatuses) != 1 || podCondition(a, corev1.ContainersReady).Status != "True" {
		t.Errorf("the last report does not stand: %+v", a.Status)
	}
	for _, args := range [][]string{{"get", "pod", "-o", "wide"}, {"describe", "pod", "web"}} {
		out, err := exec.Command(c.binary, append([]string{"kubectl", "--kubeconfig", c.kubeconfig, "-n", ns}, args...)...).Output()
		if err != nil || !strings.Contains(string(out), "NodeLost") {
			t.Errorf("kubectl %v: %v\n%s", args, err, out)
		}
		t.Logf("kubectl %s:\n%s", strings.Join(args, " "), out)
	}
	// The taint is there when the one is evicted that asked for it, and the others
	// are not.
	eventually(t, "the eviction", func() bool { return c.getPod(t, ns, "impatient").DeletionTimestamp != nil })
	for _, name := range []string{"web", "waiting"} {
		p := c.getPod(t, ns, name)
		for _, tol := range p.Spec.Tolerations {
			if tol.TolerationSeconds != nil || p.DeletionTimestamp != nil {
				t.Errorf("%s is evicted: %+v", name, tol)
			}
		}
	}

	back := newNode(n.name)
	r, _ := runsPods(t, back)
	back.report(topic.ReportedNode(n.name), r)
	back.report(topic.ReportedPod(n.name, ns, "web"), payload.ReportedPod{UID: string(p.UID), Status: b})
	back.connect(t, cl.addresses[0], tok)
	eventually(t, "all is as before", func() bool {
		a, b := c.getPod(t, ns, "web"), c.getPod(t, ns, "waiting")
		r := podCondition(a, corev1.PodReady)
		return a.Status.Reason == "" && a.Status.Message == "" && b.Status.Reason == "" && r.Status == "True" && r.LastTransitionTime.Equal(&then)
	})

	// The runtime is down: the node is not Ready for the reason that it gives, and
	// the pods are what it says.
	r.Conditions[0] = payload.NodeCondition{Type: "Ready", Status: "False", Reason: "KubeletNotReady", Message: "container runtime is down", Since: 2}
	back.report(topic.ReportedNode(n.name), r)
	eventually(t, "not Ready", func() bool {
		x, ok := c.ready(t, n.name)
		return ok && x.Status == "False" && x.Reason == "KubeletNotReady" && x.Message == "container runtime is down"
	})
	r.Conditions[0] = payload.NodeCondition{Type: "Ready", Status: "True", Reason: "KubeletReady", Since: 3}
	back.report(topic.ReportedNode(n.name), r)
	eventually(t, "Ready again", func() bool {
		x, ok := c.ready(t, n.name)
		return ok && x.Status == "True" && ready().Status == "True"
	})
}

// TestEvents: what a node tells of its pods and itself becomes Events, once each.
func TestEvents(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-event")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n, _ := enrol(t, c, cl, "event-1")
	p := c.pod(t, ns, n.name, nil)
	foreign := c.pod(t, ns, "elsewhere", func(p *corev1.Pod) { p.Name = "foreign" })
	tell := func(e payload.KubernetesEvent) {
		t.Helper()
		at := e.Namespace
		if at == "" {
			at = "default"
		}
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		if err := n.c.Publish(ctx, client.Message{Topic: topic.EventKubernetes(n.name, at, e.Kind, e.Name), QoS: 1, Payload: payload.Encode(e)}); err != nil {
			t.Fatal(err)
		}
	}
	e := payload.KubernetesEvent{ID: "web.17", Kind: "Pod", Namespace: ns, Name: "web", UID: string(p.UID), FieldPath: "spec.containers{c}",
		Reason: "BackOff", Message: "Back-off", Type: "Warning", First: 1790000000000, Last: 1790000000000, Count: 1, Component: "kubelet"}
	tell(e)
	get := func(ns, id string) *corev1.Event {
		got, err := c.kube.CoreV1().Events(ns).Get(t.Context(), id, metav1.GetOptions{})
		if err != nil {
			return &corev1.Event{}
		}
		return got
	}
	eventually(t, "the event", func() bool { return get(ns, "web.17").Count == 1 })
	got := get(ns, "web.17")
	if o := got.InvolvedObject; o.Kind != "Pod" || o.Namespace != ns || o.Name != "web" || o.UID != p.UID || o.FieldPath != "spec.containers{c}" || o.APIVersion != "v1" {
		t.Errorf("about %+v", o)
	}
	if got.Reason != "BackOff" || got.Message != "Back-off" || got.Type != "Warning" || got.Source.Component != "kubelet" || got.Source.Host != n.name ||
		got.ReportingController != "kubelet" || got.ReportingInstance != n.name || got.FirstTimestamp.UnixMilli() != 1790000000000 {
		t.Errorf("%+v", got)
	}
	tell(e) // once more, as after a broker that does not know what it had
	e.Count, e.Last, e.Message = 7, 1790000060000, "Back-off 5m"
	tell(e)
	eventually(t, "it happened again", func() bool { return get(ns, "web.17").Count == 7 })
	if got := get(ns, "web.17"); got.LastTimestamp.UnixMilli() != 1790000060000 || got.FirstTimestamp.UnixMilli() != 1790000000000 || got.Message != "Back-off 5m" {
		t.Errorf("%+v", got)
	}
	if l, err := c.kube.CoreV1().Events(ns).List(t.Context(), metav1.ListOptions{}); err != nil || len(l.Items) != 1 {
		t.Errorf("%d events, %v", len(l.Items), err)
	}
	out, err := exec.Command(c.binary, "kubectl", "--kubeconfig", c.kubeconfig, "-n", ns, "describe", "pod", "web").Output()
	if err != nil || !strings.Contains(string(out), "(x7 over ") {
		t.Errorf("%v\n%s", err, out)
	}

	// None of these becomes an Event, and the one behind them does.
	if _, err := c.kube.CoreV1().Events(ns).Create(t.Context(), &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "foreign.1"}, InvolvedObject: corev1.ObjectReference{Namespace: ns}, Message: "somebody else's"}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bad := e
	bad.ID, bad.Name, bad.UID = "foreign.2", "foreign", string(foreign.UID)
	tell(bad)
	bad = e
	bad.ID = "foreign.1"
	tell(bad)
	bad = e
	bad.ID, bad.Namespace = "nowhere.1", "no-such-namespace"
	tell(bad)
	bad = e
	bad.ID, bad.Kind = "secret.1", "Secret"
	tell(bad)
	tell(payload.KubernetesEvent{ID: "other.1", Kind: "Node", Name: "other", Reason: "R", Type: "Normal", Count: 1, Component: "kubelet"})
	tell(payload.KubernetesEvent{ID: n.name + ".1", Kind: "Node", Name: n.name, UID: n.name, Reason: "Rebooted", Message: "m", Type: "Warning", First: 1790000000000, Last: 1790000000000, Count: 1, Component: "kubelet"})
	eventually(t, "the node's own", func() bool { return get("default", n.name+".1").Reason == "Rebooted" })
	if get(ns, "foreign.2").Name != "" || get(ns, "secret.1").Name != "" || get("default", "other.1").Name != "" {
		t.Error("a node told of what is not its own")
	}
	if get(ns, "foreign.1").Message != "somebody else's" {
		t.Error("a node changed somebody else's Event")
	}
}

// TestNodeObject: the Node says what the node reports.
func TestNodeObject(t *testing.T) {
	c := control(t)
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n, _ := enrol(t, c, cl, "object-1")
	if _, err := c.kube.CoreV1().Nodes().Patch(t.Context(), n.name, types.MergePatchType, []byte(`{"status":{"capacity":{"example.com/other":"3"}}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	r, _ := runsPods(t, n)
	r.Capacity = map[string]string{"cpu": "4", "memory": "1Gi", "pods": "20", "ephemeral-storage": "10Gi", "fairlead.dev/rs485": "2", "bad": "lots"}
	r.Allocatable = map[string]string{"cpu": "3500m", "memory": "900Mi", "pods": "20", "fairlead.dev/rs485": "2"}
	r.Conditions = append(r.Conditions, payload.NodeCondition{Type: "MemoryPressure", Status: "True", Reason: "KubeletHasInsufficientMemory", Message: "low", Since: 5})
	r.Addresses = []payload.NodeAddress{{Type: "InternalIP", Address: "192.0.2.9"}, {Type: "InternalIP", Address: "2001:db8::9"}, {Type: "Hostname", Address: "gw"}}
	r.MachineID, r.SystemUUID, r.BootID = "machine", "system", "boot"
	r.Runtime, r.SwapBytes, r.VolumesInUse = "containerd://1.6.20", 1<<20, []string{"kubernetes.io/csi/x^1"}
	for range 60 {
		r.Images = append(r.Images, payload.NodeImage{Names: []string{"fairlead.test/i"}, Size: 7})
	}
	n.report(topic.ReportedNode(n.name), r)
	get := func() corev1.NodeStatus {
		o, err := c.kube.CoreV1().Nodes().Get(t.Context(), n.name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return o.Status
	}
	eventually(t, "the report", func() bool { return get().NodeInfo.ContainerRuntimeVersion == "containerd://1.6.20" })
	s := get()
	for name, want := range map[corev1.ResourceName]string{"cpu": "4", "memory": "1Gi", "pods": "20", "ephemeral-storage": "10Gi", "fairlead.dev/rs485": "2", "example.com/other": "3"} {
		if q := s.Capacity[name]; q.Cmp(resource.MustParse(want)) != 0 {
			t.Errorf("capacity %s: %s, want %s", name, q.String(), want)
		}
	}
	if i := s.NodeInfo; i.MachineID != "machine" || i.SystemUUID != "system" || i.BootID != "boot" {
		t.Errorf("%+v", i)
	}
	if q := s.Allocatable["cpu"]; q.String() != "3500m" || len(s.Capacity) != 6 {
		t.Errorf("allocatable %v, capacity %v", s.Allocatable, s.Capacity)
	}
	if len(s.Addresses) != 3 || s.Addresses[1].Address != "2001:db8::9" {
		t.Errorf("addresses %v", s.Addresses)
	}
	if len(s.Images) != 50 || len(s.VolumesInUse) != 1 || s.NodeInfo.Swap == nil || *s.NodeInfo.Swap.Capacity != 1<<20 {
		t.Errorf("%d images, %v, %v", len(s.Images), s.VolumesInUse, s.NodeInfo.Swap)
	}
	pressure := func() (out corev1.NodeCondition) {
		for _, x := range get().Conditions {
			if x.Type == corev1.NodeMemoryPressure {
				out = x
			}
		}
		return out
	}
	if x := pressure(); x.Status != "True" || x.Message != "low" {
		t.Errorf("%+v", x)
	}
	// What is gone goes.
	r.Capacity, r.Allocatable, r.Images, r.Addresses = map[string]string{"cpu": "4", "memory": "1Gi", "pods": "20"}, nil, r.Images[:1], r.Addresses[1:]
	r.Conditions[1].Status, r.Conditions[1].Reason = "False", "KubeletHasSufficientMemory"
	n.report(topic.ReportedNode(n.name), r)
	eventually(t, "less", func() bool {
		s := get()
		_, device := s.Capacity["fairlead.dev/rs485"]
		_, allocatable := s.Allocatable["fairlead.dev/rs485"]
		_, other := s.Capacity["example.com/other"]
		return !device && !allocatable && other && len(s.Images) == 1 && len(s.Addresses) == 2 && pressure().Status == "False"
	})
}

// TestStatic: a static pod of a node has a mirror pod, that stands for it alone.
func TestStatic(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-static")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n, _ := enrol(t, c, cl, "static-1")
	if _, err := c.kube.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "loot"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	name := "web-" + n.name
	report := func(name, uid, spec string) {
		n.report(topic.ReportedPod(n.name, ns, name), payload.ReportedPod{UID: uid, Status: json.RawMessage(`{"phase":"Running","podIP":"10.0.0.7","podIPs":[{"ip":"10.0.0.7"}]}`), Static: &payload.StaticPod{
			Metadata: json.RawMessage(`{"name":"` + name + `","namespace":"` + ns + `","labels":{"app":"web"},"annotations":{"kubernetes.io/config.hash":"` + uid + `","kubernetes.io/config.source":"file"}}`),
			Spec:     json.RawMessage(spec)}})
	}
	const alone = `{"containers":[{"name":"c","image":"fairlead.test/i"}],"tolerations":[{"operator":"Exists","effect":"NoExecute"}]}`
	mirror := func(name string) *corev1.Pod {
		p, err := c.kube.CoreV1().Pods(ns).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return &corev1.Pod{}
		}
		return p
	}
	is := func(uid string) func() bool {
		return func() bool {
			p := mirror(name)
			return p.Annotations[corev1.MirrorPodAnnotationKey] == uid && p.Status.Phase == corev1.PodRunning && p.Status.PodIP == "10.0.0.7"
		}
	}
	report(name, "hash-1", alone)
	eventually(t, "the mirror pod with its status", is("hash-1"))
	p := mirror(name)
	if p.Spec.NodeName != n.name || p.Labels["app"] != "web" || p.Annotations["kubernetes.io/config.source"] != "file" || len(p.OwnerReferences) != 1 || p.OwnerReferences[0].Kind != "Node" {
		t.Errorf("%+v", p.ObjectMeta)
	}
	// Deleted by somebody, it is there again; a changed file makes another.
	if err := c.kube.CoreV1().Pods(ns).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the mirror pod again", func() bool { return is("hash-1")() && mirror(name).UID != p.UID })
	report(name, "hash-2", alone)
	eventually(t, "another mirror pod", is("hash-2"))

	// What a node must not make.
	report("web", "hash-3", alone)
	report("env-"+n.name, "hash-4", `{"containers":[{"name":"c","image":"i","envFrom":[{"secretRef":{"name":"loot"}}]}]}`)
	report("vol-"+n.name, "hash-5", `{"containers":[{"name":"c","image":"i"}],"volumes":[{"name":"v","secret":{"secretName":"loot"}}]}`)
	report("account-"+n.name, "hash-6", `{"containers":[{"name":"c","image":"i"}],"serviceAccountName":"default"}`)
	report("last-"+n.name, "hash-7", alone)
	eventually(t, "the last one", func() bool { return mirror("last-"+n.name).Name != "" })
	for _, no := range []string{"web", "env-" + n.name, "vol-" + n.name, "account-" + n.name} {
		if mirror(no).Name != "" {
			t.Errorf("%s has a mirror pod", no)
		}
	}
	// A mirror pod that somebody makes by hand gets its node no Secret.
	c.pod(t, ns, n.name, func(p *corev1.Pod) {
		p.Name, p.Annotations = "forged", map[string]string{corev1.MirrorPodAnnotationKey: "x"}
		p.Spec.EnableServiceLinks = nil
	})
	n.report(topic.ReportedPod(n.name, ns, name), nil)
	eventually(t, "its end", func() bool { return mirror(name).Name == "" && mirror("forged").Name == "" })
	if len(n.holds()) != 0 || !n.inStep() {
		t.Errorf("the node was sent %v", n.holds())
	}
	// The cloud's service account makes mirror pods and no others.
	eventually(t, "the policy", func() bool {
		err := kubectlAs(c, ns, c.limited, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"containers":[{"name":"c","image":"i"}]}}`)
		return err != nil && strings.Contains(err.Error(), "creates mirror pods only")
	})
}

func kubectlAs(c *cluster, ns, kubeconfig, object string) error {
	cmd := exec.Command(c.binary, "kubectl", "--kubeconfig", kubeconfig, "-n", ns, "create", "--dry-run=server", "-f", "-")
	cmd.Stdin = strings.NewReader(object)
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Run(); err != nil {
		return &kubectlError{out.String()}
	}
	return nil
}

type kubectlError struct{ text string }

func (e *kubectlError) Error() string { return e.text }

// TestAdmission: a pod that tolerates the edge by name is not evicted from a node
// out of reach, unless it says otherwise.
func TestAdmission(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-admission")
	edge := corev1.Toleration{Key: "node-role.kubernetes.io/edge", Operator: corev1.TolerationOpExists}
	text := func(tols []corev1.Toleration) string {
		var out []string
		for _, x := range tols {
			s := strings.TrimPrefix(x.Key, "node.kubernetes.io/") + ":" + string(x.Effect)
			if x.TolerationSeconds != nil {
				s += ":" + time.Duration(*x.TolerationSeconds*int64(time.Second)).String()
			}
			out = append(out, s)
		}
		return strings.Join(out, " ")
	}
	seconds := int64(60)
	const optOut = "fairlead.dev/evict-when-unreachable"
	for _, tc := range []struct {
		name   string
		change func(*corev1.Pod)
		want   string
	}{
		{"tolerates the edge", func(p *corev1.Pod) { p.Spec.Tolerations = []corev1.Toleration{edge} },
			"node-role.kubernetes.io/edge: not-ready:NoExecute unreachable:NoExecute"},
		{"with the effect", func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Key: edge.Key, Operator: corev1.TolerationOpEqual, Effect: corev1.TaintEffectNoSchedule}}
		}, "node-role.kubernetes.io/edge:NoSchedule not-ready:NoExecute unreachable:NoExecute"},
		{"does not", func(*corev1.Pod) {}, "not-ready:NoExecute:5m0s unreachable:NoExecute:5m0s"},
		{"another effect of that key", func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Key: edge.Key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}}
		}, "node-role.kubernetes.io/edge:NoExecute not-ready:NoExecute:5m0s unreachable:NoExecute:5m0s"},
		{"annotated", func(p *corev1.Pod) {
			p.Spec.Tolerations, p.Annotations = []corev1.Toleration{edge}, map[string]string{optOut: "true"}
		}, "node-role.kubernetes.io/edge: not-ready:NoExecute:5m0s unreachable:NoExecute:5m0s"},
		{"labelled", func(p *corev1.Pod) {
			p.Spec.Tolerations, p.Labels = []corev1.Toleration{edge}, map[string]string{optOut: "true"}
		}, "node-role.kubernetes.io/edge: not-ready:NoExecute:5m0s unreachable:NoExecute:5m0s"},
		{"annotated no", func(p *corev1.Pod) {
			p.Spec.Tolerations, p.Annotations = []corev1.Toleration{edge}, map[string]string{optOut: "false"}
		}, "node-role.kubernetes.io/edge: not-ready:NoExecute unreachable:NoExecute"},
		{"a time of its own", func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{edge, {Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &seconds}}
		}, "node-role.kubernetes.io/edge: unreachable:NoExecute:1m0s not-ready:NoExecute"},
		{"everything", func(p *corev1.Pod) { p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}} }, ":"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got string
			eventually(t, "the policy: "+tc.want, func() bool { // a policy works some time after it was stored
				p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
				tc.change(p)
				made, err := c.kube.CoreV1().Pods(ns).Create(t.Context(), p, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
				if err != nil {
					t.Fatal(err)
				}
				got = text(made.Spec.Tolerations)
				return got == tc.want || t.Failed()
			})
		})
	}
}
