package cloudbridge

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func newSealTo(t *testing.T) (sealTo, *seal.Key) {
	t.Helper()
	k, err := seal.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return sealTo{k.Public(), k.ID()}, k
}

// serve gives the bench an API server that answers one request.
func (b *bench) serve(t *testing.T, answer func(r *http.Request) any) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := answer(r)
		if v == nil {
			http.Error(w, "no", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}))
	client := &http.Client{Transport: &http.Transport{}}
	t.Cleanup(func() { client.CloseIdleConnections(); srv.Close() })
	kube, err := kubernetes.NewForConfigAndClient(&rest.Config{Host: srv.URL, ContentConfig: rest.ContentConfig{ContentType: "application/json"}}, client)
	if err != nil {
		t.Fatal(err)
	}
	b.kube = kube
}

func withSecret(p *corev1.Pod, names ...string) *corev1.Pod {
	for _, n := range names {
		p.Spec.ImagePullSecrets = append(p.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: n})
	}
	return p
}

// TestSecretTopics: when a Secret is sealed anew, and what stays as it is.
func TestSecretTopics(t *testing.T) {
	key, open := newSealTo(t)
	other, _ := newSealTo(t)
	tp := topic.DesiredSecret("n", "default", "s")
	held := func(to sealTo, rev int64) []byte {
		s, err := seal.Seal(to.public, tp, "s-uid", rev, payload.Encode(payload.SecretData{Data: map[string][]byte{"k": []byte("held")}}))
		if err != nil {
			t.Fatal(err)
		}
		return payload.Encode(s)
	}
	for _, tc := range []struct {
		name   string
		key    sealTo
		boot   []byte
		answer bool   // the API server answers
		want   string // what the node can open; "held": as it was on the broker, byte for byte; empty: nothing
		err    bool
	}{
		{"new", key, nil, true, "v", false},
		{"no key yet", sealTo{}, nil, true, "", false},
		{"no key known, and the broker has one sealed", sealTo{}, held(key, 7), true, "held", false},
		{"the broker has it", key, held(key, 7), false, "held", false},
		{"the broker has an older one", key, held(key, 6), true, "v", false},
		{"the broker has an older one, and nobody answers", key, held(key, 6), false, "held", true},
		{"the broker has it for another key", key, held(other, 7), true, "v", false},
		{"the broker has nonsense", key, []byte("nonsense"), true, "v", false},
		{"nobody answers", key, nil, false, "", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			b.serve(t, func(r *http.Request) any {
				if !tc.answer || r.URL.Path != "/api/v1/namespaces/default/secrets/s" {
					return nil
				}
				return &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: metaFor("s", "7"), Type: "Opaque", Data: map[string][]byte{"k": []byte("v")}}
			})
			b.keys["n"] = tc.key
			b.add(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, withSecret(podOn("n", "p", "1"), "s"))
			if err := b.in.secrets.GetIndexer().Add(&metav1.PartialObjectMetadata{ObjectMeta: metaFor("s", "7")}); err != nil {
				t.Fatal(err)
			}
			if tc.boot != nil {
				b.truth.setBoot(map[topic.Topic][]byte{tp: tc.boot})
			}
			if _, err := b.pod(t.Context(), "default/p"); err != nil {
				t.Fatal(err)
			}
			if err := b.secret(t.Context(), "default/s"); (err != nil) != tc.err {
				t.Errorf("%v", err)
			}
			got, ok := b.truth.get(tp)
			switch {
			case ok != (tc.want != ""):
				t.Fatalf("published %t: %.100s", ok, got)
			case tc.want == "held":
				if !bytes.Equal(got, tc.boot) {
					t.Errorf("sealed anew: %s", got)
				}
			case ok:
				var s payload.Sealed
				if err := payload.Decode(got, &s); err != nil || s.Rev != 7 || s.UID != "s-uid" {
					t.Fatalf("%s, %v", got, err)
				}
				plain, err := open.OpenPayload(tp, s)
				if err != nil || string(plain) != `{"type":"Opaque","data":{"k":"dg=="}}` {
					t.Errorf("%s, %v", plain, err)
				}
			}
		})
	}
}

func projecting(p *corev1.Pod, audience string, seconds *int64) *corev1.Pod {
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "t", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: audience, ExpirationSeconds: seconds}}}}}})
	return p
}

func TestTokensOf(t *testing.T) {
	hour, day := int64(3607), int64(86400)
	p := projecting(projecting(projecting(projecting(podOn("n", "p", "1"), "vault", &day), "", &hour), "vault", nil), "", &hour)
	want := []tokenAsk{{"", 3607}, {"vault", 3600}, {"vault", 86400}}
	if got := tokensOf(p); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := tokensOf(podOn("n", "p", "1", "cm")); len(got) > 0 {
		t.Errorf("%v", got)
	}
}

func TestRenewal(t *testing.T) {
	issued := time.UnixMilli(at)
	for _, tc := range []struct {
		life time.Duration
		luck float64
		want time.Duration
	}{
		{time.Hour, 0, 48 * time.Minute},
		{time.Hour, 1, 43*time.Minute + 12*time.Second},
		{10 * time.Minute, 0, 8 * time.Minute},
		{24 * 365 * time.Hour, 0, 24 * time.Hour},
		{30 * time.Hour, 0, 24 * time.Hour},
		{29 * time.Hour, 0, 23*time.Hour + 12*time.Minute},
	} {
		if got := renewal(issued, issued.Add(tc.life), tc.luck).Sub(issued); got != tc.want {
			t.Errorf("a life of %s, luck %g: after %s, want %s", tc.life, tc.luck, got, tc.want)
		}
	}
}

// TestTokenThroughTime follows a pod's token: issued when the link is up, kept,
// issued anew when it is time, and gone with the pod.
func TestTokenThroughTime(t *testing.T) {
	b := newBench(t)
	now := time.UnixMilli(at)
	b.desired.now = func() time.Time { return now }
	key, open := newSealTo(t)
	issued, works := 0, true
	b.serve(t, func(r *http.Request) any {
		if !works || r.URL.Path != "/api/v1/namespaces/default/serviceaccounts/robot/token" {
			return nil
		}
		var tr authenticationv1.TokenRequest
		if json.NewDecoder(r.Body).Decode(&tr) != nil || tr.Spec.BoundObjectRef == nil || tr.Spec.BoundObjectRef.UID != "p-uid" || *tr.Spec.ExpirationSeconds != 3607 || len(tr.Spec.Audiences) != 0 {
			return nil
		}
		issued++
		tr.TypeMeta = metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenRequest"}
		tr.Status = authenticationv1.TokenRequestStatus{Token: strings.Repeat("t", issued), ExpirationTimestamp: metav1.NewTime(now.Add(time.Hour))}
		return tr
	})
	hour := int64(3607)
	p := projecting(podOn("n", "p", "1"), "", &hour)
	p.Spec.ServiceAccountName = "robot"
	b.add(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, p)
	tp := topic.DesiredToken("n", "default", "p")
	look := func(when string, wantIssued int, wantToken string) (s payload.Sealed) {
		t.Helper()
		if err := b.token(t.Context(), "default/p"); err != nil && works {
			t.Fatalf("%s: %v", when, err)
		}
		raw, ok := b.truth.get(tp)
		if issued != wantIssued || ok != (wantToken != "") {
			t.Fatalf("%s: %d issued, published %t", when, issued, ok)
		}
		if !ok {
			return s
		}
		if err := payload.Decode(raw, &s); err != nil {
			t.Fatal(err)
		}
		plain, err := open.OpenPayload(tp, s)
		if err != nil || !strings.Contains(string(plain), `"token":"`+wantToken+`"`) {
			t.Fatalf("%s: %s, %v", when, plain, err)
		}
		return s
	}
	look("no key", 0, "")
	b.keys["n"] = key
	look("the link is down", 0, "")
	b.up = true
	first := look("up", 1, "t")
	if first.Exp != payload.Millis(now.Add(time.Hour)) || first.Renew < payload.Millis(now.Add(43*time.Minute)) || first.Renew > payload.Millis(now.Add(48*time.Minute)) {
		t.Errorf("%+v", first)
	}
	look("again", 1, "t")
	boot, _ := b.truth.get(tp) // another process finds it on the broker
	b.truth = newTruth()
	b.truth.setBoot(map[topic.Topic][]byte{tp: boot})
	look("after a restart", 1, "t")
	now = now.Add(50 * time.Minute)
	b.up = false
	look("time to renew, the link is down", 1, "t")
	b.up, works = true, false
	look("time to renew, the API server does not answer", 1, "t")
	works = true
	if again := look("renewed", 2, "tt"); again.Rev <= first.Rev || again.Exp <= first.Exp {
		t.Errorf("%+v after %+v", again, first)
	}
	p = p.DeepCopy()
	p.DeletionTimestamp = &metav1.Time{Time: now}
	b.add(t, p)
	now = now.Add(50 * time.Minute)
	look("ending", 2, "tt")
	other := p.DeepCopy()
	other.UID, other.DeletionTimestamp = "q-uid", nil
	b.add(t, other)
	works = false // a token of the pod before must not stay
	look("another pod of that name", 2, "")
	if err := b.in.pods.GetIndexer().Delete(other); err != nil {
		t.Fatal(err)
	}
	look("gone", 2, "")
}

func TestMirrorPodsAreNotSentDown(t *testing.T) {
	b := newBench(t)
	hour := int64(3607)
	p := projecting(withSecret(podOn("n", "p", "1", "cm"), "s"), "", &hour)
	p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	b.add(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, p)
	b.keys["n"], _ = newSealTo(t)
	b.up = true
	touched, err := b.pod(t.Context(), "default/p")
	if err != nil || !slices.Equal(touched, []key{{kindToken, "default/p"}}) {
		t.Errorf("%v, %v", touched, err)
	}
	if err := b.token(t.Context(), "default/p"); err != nil { // the API server does not exist
		t.Error(err)
	}
	if b.truth.len() > 0 {
		t.Errorf("%v", b.truth.topics())
	}
}

func TestServicesFor(t *testing.T) {
	b := newBench(t)
	svc := func(ns, name, ip string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Port: 80, Protocol: "TCP"}}}}
	}
	b.add(t, svc("default", "kubernetes", "10.0.0.1"), svc("default", "other", "10.0.0.2"), svc("plant", "b", "10.0.0.3"), svc("plant", "a", "10.0.0.4"),
		svc("plant", "headless", "None"), svc("plant", "external", ""), svc("own", "kubernetes", "10.0.0.9"))
	no := false
	for _, tc := range []struct {
		namespace string
		links     *bool
		want      []string
	}{
		{"plant", nil, []string{"a 10.0.0.4", "b 10.0.0.3", "kubernetes 10.0.0.1"}},
		{"plant", &no, []string{"kubernetes 10.0.0.1"}},
		{"default", nil, []string{"kubernetes 10.0.0.1", "other 10.0.0.2"}},
		{"own", nil, []string{"kubernetes 10.0.0.9"}},
		{"own", &no, []string{"kubernetes 10.0.0.1"}},
	} {
		p := podOn("n", "p", "1")
		p.Namespace, p.Spec.EnableServiceLinks = tc.namespace, tc.links
		var got []string
		for _, s := range b.in.servicesFor(p) {
			got = append(got, s.Name+" "+s.IP)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.namespace, got, tc.want)
		}
	}
}

// TestPodPayloadIsSteady: what the node need not know does not reach it.
func TestPodPayloadIsSteady(t *testing.T) {
	b := newBench(t)
	gated := func(version, gate string, phase corev1.PodPhase) *corev1.Pod {
		p := podOn("n", "p", version)
		p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/gate"}}
		p.Status = corev1.PodStatus{Phase: phase, PodIP: "10.0.0." + version, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: "True"}}}
		if gate != "" {
			p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: "example.com/gate", Status: corev1.ConditionStatus(gate)})
		}
		return p
	}
	b.add(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}})
	rev := func(p *corev1.Pod) (out payload.Pod) {
		t.Helper()
		b.add(t, p)
		if _, err := b.pod(t.Context(), "default/p"); err != nil {
			t.Fatal(err)
		}
		raw, _ := b.truth.get(topic.DesiredPod("n", "default", "p"))
		if err := payload.Decode(raw, &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if p := rev(gated("5", "", corev1.PodPending)); p.Rev != 5 || len(p.Gates) != 0 {
		t.Errorf("%+v", p)
	}
	b.add(t, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "late"}, Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1"}})
	if p := rev(gated("6", "", corev1.PodRunning)); p.Rev != 5 || len(p.Services) != 0 {
		t.Errorf("a status write or a Service went down: %+v", p)
	}
	if p := rev(gated("7", "True", corev1.PodRunning)); p.Rev != 7 || p.Gates["example.com/gate"] != "True" || len(p.Gates) != 1 {
		t.Errorf("%+v", p)
	}
	if p := rev(gated("8", "True", corev1.PodFailed)); p.Rev != 8 || p.Phase != "Failed" {
		t.Errorf("%+v", p)
	}
	again := gated("9", "", corev1.PodPending)
	again.UID = "q-uid"
	if p := rev(again); p.Rev != 9 || len(p.Services) != 1 || p.Phase != "" {
		t.Errorf("another pod: %+v", p)
	}
}
