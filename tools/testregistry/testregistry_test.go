package testregistry

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The pulling half of https://github.com/opencontainers/distribution-spec as a
// client sees it; that containerd is content is seen in edge/pods/image.
func TestRegistry(t *testing.T) {
	r := Start(t)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	archive, err := testruntime.Image("fairlead.test/team/app:1", []testruntime.File{{Path: "/hello", Body: []byte("hello")}}, testruntime.Config{})
	if err != nil {
		t.Fatal(err)
	}
	digest, err := r.Push(archive)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(method, path string, header ...string) (status int, body string, h http.Header) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b), resp.Header
	}
	status, manifest, h := ask("GET", "/v2/team/app/manifests/1")
	if status != http.StatusOK || h.Get("Docker-Content-Digest") != digest || h.Get("Content-Type") != "application/vnd.oci.image.manifest.v1+json" {
		t.Errorf("got %d %v", status, h)
	}
	if status, body, _ := ask("GET", "/v2/team/app/manifests/"+digest); status != http.StatusOK || body != manifest {
		t.Errorf("got %d %s", status, body)
	}
	if status, body, h := ask("HEAD", "/v2/team/app/manifests/1"); status != http.StatusOK || body != "" || h.Get("Docker-Content-Digest") != digest {
		t.Errorf("got %d %s", status, body)
	}
	_, layer, _ := strings.Cut(manifest, `"layers":[{`)
	_, layer, _ = strings.Cut(layer, `"digest":"`)
	layer, _, _ = strings.Cut(layer, `"`)
	_, whole, _ := ask("GET", "/v2/team/app/blobs/"+layer)
	if !strings.Contains(whole, "hello") {
		t.Errorf("the layer has no hello")
	}
	if status, part, _ := ask("GET", "/v2/team/app/blobs/"+layer, "Range", "bytes=3-"); status != http.StatusPartialContent || part != whole[3:] {
		t.Errorf("got %d and %d bytes of %d", status, len(part), len(whole))
	}
	for _, path := range []string{"/v2/team/app/manifests/2", "/v2/other/manifests/" + digest, "/v2/team/app/blobs/sha256:0", "/v1/", "/v2/x"} {
		if status, _, _ := ask("GET", path); status != http.StatusNotFound {
			t.Errorf("%s: got %d", path, status)
		}
	}

	r.Private("team/app", "ann", "right")
	status, _, h = ask("GET", "/v2/team/app/manifests/1")
	if status != http.StatusUnauthorized || !strings.HasPrefix(h.Get("WWW-Authenticate"), "Basic ") {
		t.Errorf("got %d %v", status, h)
	}
	if status, _, _ := ask("GET", "/v2/team/app/manifests/1", "Authorization", "Basic YW5uOnJpZ2h0"); status != http.StatusOK {
		t.Errorf("got %d", status)
	}
	if q := r.Requests(); q[len(q)-1].User != "ann" || q[len(q)-2].User != "" || q[0].Repository != "team/app" || q[0].Kind != "manifests" || q[0].Reference != "1" {
		t.Errorf("got %+v", q)
	}
	r.Private("team/app", "", "")
	r.Before(func(w http.ResponseWriter, q Request) bool {
		w.WriteHeader(http.StatusTeapot)
		return q.Method == http.MethodGet
	})
	if status, _, _ := ask("GET", "/v2/team/app/manifests/1"); status != http.StatusTeapot {
		t.Errorf("got %d", status)
	}
}

func TestPushRefuses(t *testing.T) {
	r := Start(t)
	nameless, err := testruntime.Image("app", nil, testruntime.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for what, archive := range map[string][]byte{"no archive": []byte("x"), "an empty one": nil, "an image without a tag": nameless} {
		if d, err := r.Push(archive); err == nil {
			t.Errorf("%s was taken: %s", what, d)
		}
	}
}
