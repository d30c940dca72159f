package podstatus

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMessageNoFile: what a container put in the place of its message is not waited for.
func TestMessageNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{path, "/dev/zero"} {
		c := FromRuntime(&runtimeapi.ContainerStatus{
			Id: "abc", Metadata: &runtimeapi.ContainerMetadata{Name: "a"}, State: exited, ExitCode: 1,
			Annotations: map[string]string{annotationMessagePath: "/m"},
			Mounts:      []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: at}},
		}, "box", nil)
		if !strings.Contains(c.Message, "not a regular file") {
			t.Errorf("%s: %q", at, c.Message)
		}
	}
}
