package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/edge/pods/archive"
	"github.com/fairlead-io/fairlead/edge/pods/archive/folder"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// asCommand makes the test binary the command itself.
const asCommand = "FAIRLEAD_IMAGES_TEST_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestBadUse(t *testing.T) {
	for _, x := range []struct{ args, out, err string }{
		{"--help", "images export REF", ""},
		{"", "Usage:", "want images import, export or list"},
		{"remove x", "Usage:", "want images import, export or list"},
		{"import", "", "want archives, or a folder"},
		{"import a.tar --folder b", "", "want archives, or a folder"},
		{"import a.tar b.tar --name x", "", "--name wants one archive"},
		{"export", "", "want images, and the archive"},
		{"export x:1", "", "--file"},
		{"export -o x.tar", "", "want images"},
		{"list x", "", "takes no arguments"},
		{"list --output yaml", "", "want text or json"},
		{"list --socket tcp://127.0.0.1:1", "", "want a unix socket"},
		{"list --socket /nowhere/containerd.sock", "", "/nowhere/containerd.sock"},
		{"list --nod x", "", "unknown flag: --nod"},
	} {
		var out bytes.Buffer
		err := run(strings.Fields(x.args), strings.NewReader(""), &out)
		if !strings.Contains(out.String(), x.out) {
			t.Errorf("%s: want %q, got %q", x.args, x.out, out.String())
		}
		if (err == nil) != (x.err == "") || err != nil && !strings.Contains(err.Error(), x.err) {
			t.Errorf("%s: want the error %q, got %v", x.args, x.err, err)
		}
	}
}

func TestRun(t *testing.T) {
	rt := testruntime.Start(t)
	dir := t.TempDir()
	command := func(wantErr string, args ...string) string {
		t.Helper()
		var out bytes.Buffer
		err := run(append([]string{"--socket", rt.Socket}, args...), strings.NewReader(""), &out)
		if (err == nil) != (wantErr == "") || err != nil && !strings.Contains(err.Error(), wantErr) {
			t.Fatalf("%s: want the error %q, got %v", args, wantErr, err)
		}
		return out.String()
	}
	file, junk := filepath.Join(dir, "busybox.tar"), filepath.Join(dir, "junk.tar")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	command("", "export", testruntime.Busybox, "--file", file)
	// The good one is imported although the other one is bad.
	out := command("junk.tar: bad archive", "import", junk, file)
	if out != file+": imported fairlead.test/busybox:1\n" {
		t.Errorf("import printed %q", out)
	}
	command("", "import", file, "--name", "fairlead.test/renamed:1", "--pin")

	list := command("", "list")
	for _, want := range []string{"NAME ", "fairlead.test/busybox:1 ", "fairlead.test/renamed:1 ", "sha256:", " MB", "(pinned)"} {
		if !strings.Contains(list, want) {
			t.Errorf("want %q in the list\n%s", want, list)
		}
	}
	var images []archive.Image
	if err := json.Unmarshal([]byte(command("", "list", "--output", "json")), &images); err != nil {
		t.Fatal(err)
	}
	if len(images) != 3 || images[2].Name != "fairlead.test/renamed:1" || !images[2].Pinned || images[0].Pinned || images[0].Size < 1<<20 {
		t.Errorf("list as JSON: %+v", images)
	}

	// Through pipes, as over ssh.
	var archived bytes.Buffer
	if err := run([]string{"--socket", rt.Socket, "export", "fairlead.test/renamed:1", "-o", "-"}, nil, &archived); err != nil {
		t.Fatal(err)
	}
	var printed bytes.Buffer
	if err := run([]string{"--socket", rt.Socket, "import", "-", "--name", "fairlead.test/piped:1", "--output", "json"}, &archived, &printed); err != nil {
		t.Fatal(err)
	}
	if want := `{"file":"-","images":["fairlead.test/piped:1"]}` + "\n"; printed.String() != want {
		t.Errorf("printed %q, want %q", printed.String(), want)
	}
}

// TestFolder has the agent's side of the folder run this command.
func TestFolder(t *testing.T) {
	rt := testruntime.Start(t)
	t.Setenv(asCommand, "1")
	dir, out := t.TempDir(), t.TempDir()
	if err := run([]string{"--socket", rt.Socket, "export", testruntime.Busybox, "-o", filepath.Join(out, "a.tar")}, nil, os.Stderr); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	results, done := make(chan folder.Result, 10), make(chan struct{})
	go func() {
		defer close(done)
		folder.Watch(ctx, folder.Config{
			Dir: dir, Command: append([]string{os.Args[0]}, folder.Arguments(dir, rt.Socket)...), Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Done: func(r folder.Result) { results <- r },
		})
	}()
	defer func() { cancel(); <-done }()
	if err := os.WriteFile(filepath.Join(dir, "junk.tar"), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(out, "a.tar"), filepath.Join(dir, "a.tar")); err != nil {
		t.Fatal(err)
	}
	for got := map[string]folder.Result{}; got["a.tar"].Images == nil || got["junk.tar"].Error == ""; {
		select {
		case r := <-results:
			got[r.File] = r
		case <-time.After(time.Minute):
			t.Fatalf("the folder's archives are not imported: %v", got)
		}
	}
}
