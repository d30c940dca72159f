package cloudbridge

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

type answer func(*http.Request) (*http.Response, error)

func (a answer) RoundTrip(r *http.Request) (*http.Response, error) { return a(r) }

// TestRuntimeClassAbsent: a class that is not there is asked for again after a
// while, one that cannot be asked for leaves the pod's topic as it is, and one that
// was found is not asked for any more.
func TestRuntimeClassAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		var asked int
		var down, exists bool
		kube, err := kubernetes.NewForConfig(&rest.Config{Host: "http://cluster", Transport: answer(func(r *http.Request) (*http.Response, error) {
			asked++
			code, body := http.StatusOK, `{"apiVersion":"node.k8s.io/v1","kind":"RuntimeClass","metadata":{"name":"fast"},"handler":"runsc"}`
			switch {
			case r.URL.Path != "/apis/node.k8s.io/v1/runtimeclasses/fast":
				t.Errorf("asked for %s", r.URL.Path)
			case down:
				return nil, errors.New("no route to host")
			case !exists:
				code, body = http.StatusNotFound, `{"apiVersion":"v1","kind":"Status","status":"Failure","reason":"NotFound","code":404}`
			}
			return &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		b.kube = kube
		p := podOn("n", "p", "3")
		p.Spec.RuntimeClassName = new("fast")
		b.add(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}, p)
		tp := topic.DesiredPod("n", "default", "p")
		look := func(wantErr, wantThere bool, handler string) {
			t.Helper()
			_, err := b.pod(t.Context(), "default/p")
			var got payload.Pod
			raw, ok := b.truth.get(tp)
			if ok {
				if err := payload.Decode(raw, &got); err != nil {
					t.Fatal(err)
				}
			}
			if (err != nil) != wantErr || ok != wantThere || got.Handler != handler {
				t.Errorf("error %v, there %t, handler %q", err, ok, got.Handler)
			}
		}
		down = true
		look(true, false, "") // nothing is said of it before the class can be asked for
		down = false
		look(false, true, "")
		time.Sleep(classRetry)
		synctest.Wait()
		if b.pods.Len() != 1 {
			t.Fatal("not looked at again")
		}
		down = true
		look(true, true, "")
		down, exists = false, true
		look(false, true, "runsc")
		was := asked
		down = true
		look(false, true, "runsc")
		if asked != was {
			t.Error("a known handler was asked for again")
		}
	})
}
