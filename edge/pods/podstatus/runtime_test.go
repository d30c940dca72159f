package podstatus

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestFromRuntime(t *testing.T) {
	s := &runtimeapi.ContainerStatus{
		Id: "abc", Metadata: &runtimeapi.ContainerMetadata{Name: "a", Attempt: 1}, State: running,
		CreatedAt: t0.UnixNano(), StartedAt: t0.Add(time.Second).UnixNano(), FinishedAt: 5,
		Image: &runtimeapi.ImageSpec{Image: "fairlead.test/a:1"}, ImageRef: "sha256:1",
		Labels:      map[string]string{"io.kubernetes.container.name": "a"},
		Annotations: map[string]string{"io.kubernetes.container.hash": "4f", "io.kubernetes.container.restartCount": "3"},
	}
	c := FromRuntime(s, "box", nil)
	if c.Name != "a" || c.ID != "abc" || c.SandboxID != "box" || c.Hash != "4f" || c.Restarts != 3 || !c.Created.Equal(t0) || !c.Started.Equal(t0.Add(time.Second)) ||
		!c.Finished.IsZero() || c.Image != "fairlead.test/a:1" || c.ImageRef != "sha256:1" {
		t.Errorf("%+v", c)
	}
	s.State, s.ExitCode, s.Reason, s.FinishedAt = exited, 137, "OOMKilled", t0.Add(time.Minute).UnixNano()
	if c = FromRuntime(s, "box", nil); c.ExitCode != 137 || c.Reason != "OOMKilled" || !c.Finished.Equal(t0.Add(time.Minute)) {
		t.Errorf("ended: %+v", c)
	}
	s.State, s.Labels, s.Annotations = created, nil, nil
	if c = FromRuntime(s, "box", nil); c.Name != "a" || c.Restarts != 1 || !c.Started.IsZero() {
		t.Errorf("without labels, not started: %+v", c)
	}
}

func TestTerminationMessage(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	said, empty, long := write("said", "it broke"), write("empty", ""), write("long", strings.Repeat("a", 5000)+"end")
	for _, tc := range []struct {
		name     string
		file     string
		fallback bool
		code     int32
		message  string // the runtime's
		reason   string
		log      string
		logErr   error
		want     string
	}{
		{name: "file", file: said, code: 1, want: "it broke"},
		{name: "file of a success", file: said, want: "it broke"},
		{name: "file and the runtime's word", file: said, code: 1, message: "oci error", want: "oci error: it broke"},
		{name: "the end of a long file", file: long, code: 1, want: strings.Repeat("a", 4096-3) + "end"},
		{name: "file before log", file: said, fallback: true, code: 1, log: "log", want: "it broke"},
		{name: "log for an empty file", file: empty, fallback: true, code: 1, log: "last words", want: "last words"},
		{name: "log for no file", file: filepath.Join(dir, "none"), fallback: true, code: 1, log: "last words", want: "last words"},
		{name: "no log without the policy", file: empty, code: 1, log: "last words"},
		{name: "no log on success", file: empty, fallback: true, log: "last words"},
		{name: "no log when it never ran", file: empty, fallback: true, code: 128, reason: "ContainerCannotRun", log: "last words"},
		{name: "the end of a long log", file: empty, fallback: true, code: 1, log: strings.Repeat("b", 3000) + "end", want: strings.Repeat("b", 2048-3) + "end"},
		{name: "unreadable log", file: empty, fallback: true, code: 1, logErr: errors.New("disk error"), want: "Error on reading termination message from logs: disk error"},
		{name: "unreadable file", file: dir, fallback: true, code: 1, log: "log", want: "Error on reading termination log " + dir + ": read " + dir + ": is a directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			policy := "File"
			if tc.fallback {
				policy = "FallbackToLogsOnError"
			}
			s := &runtimeapi.ContainerStatus{
				State: exited, ExitCode: tc.code, Message: tc.message, Reason: tc.reason, LogPath: "/logs/0.log",
				Mounts: []*runtimeapi.Mount{{ContainerPath: "/other", HostPath: said}, {ContainerPath: "/dev/termination-log", HostPath: tc.file}},
				Annotations: map[string]string{
					"io.kubernetes.container.terminationMessagePath": "dev/termination-log", "io.kubernetes.container.terminationMessagePolicy": policy,
				},
			}
			got := FromRuntime(s, "", func(path string) (string, error) {
				if path != "/logs/0.log" {
					t.Errorf("log %s", path)
				}
				return tc.log, tc.logErr
			})
			if got.Message != tc.want {
				t.Errorf("got %.100q (%d), want %.100q (%d)", got.Message, len(got.Message), tc.want, len(tc.want))
			}
		})
	}
}
