package pods_test

import (
	"os"
	"path/filepath"
	"testing"
)

// TestRuntimeClass: a pod runs with the handler that the cloud found for its class.
// Without one it does not run, and a static pod has the class's name for a handler.
func TestRuntimeClass(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("classy", forever, "", "runtimeClassName: fast"))
	s.apply(p)
	s.eventually("no such class", func() bool {
		return s.heard("FailedCreatePodSandBox", `Failed to create pod sandbox: runtimeclass.node.k8s.io "fast" not found`)
	})
	c := s.runtime()
	if boxes, err := c.ListPodSandbox(t.Context(), nil); err != nil || len(boxes) != 0 {
		t.Fatalf("sandboxes %v, %v", boxes, err)
	}
	s.applyHandler(p, "nope")
	s.eventually("no such handler", func() bool { return s.heard("FailedCreatePodSandBox", `no runtime for "nope" is configured`) })
	s.applyHandler(p, "runc")
	s.until(p, "running", running)
	boxes, err := c.ListPodSandbox(t.Context(), nil)
	if err != nil || len(boxes) != 1 || boxes[0].RuntimeHandler != "runc" {
		t.Fatalf("sandboxes %v, %v", boxes, err)
	}

	if err := os.WriteFile(filepath.Join(s.static, "own.yaml"), []byte(manifest("own", forever, "", "runtimeClassName: runc")), 0o600); err != nil {
		t.Fatal(err)
	}
	s.until(pod(t, manifest("own-"+node, forever, "", "")), "running", running)
}
