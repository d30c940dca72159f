package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/archive"
	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a runtime with a client of its images and one of its CRI.
type site struct {
	*archive.Client
	t   *testing.T
	rt  *testruntime.Runtime
	cri *cri.Client
}

func start(t *testing.T) *site {
	t.Helper()
	return clients(t, testruntime.Start(t))
}

func clients(t *testing.T, rt *testruntime.Runtime) *site {
	t.Helper()
	s := &site{t: t, rt: rt}
	var err error
	if s.Client, err = archive.Dial(rt.Socket); err != nil {
		t.Fatal(err)
	}
	if s.cri, err = cri.Dial(rt.Socket, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := s.cri.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// present says whether the CRI has an image.
func (s *site) present(name string) bool {
	s.t.Helper()
	i, err := s.cri.ImageStatus(s.t.Context(), &runtimeapi.ImageSpec{Image: name})
	if err != nil {
		s.t.Fatal(err)
	}
	return i != nil
}

// has is all that containerd has of images: names, content, snapshots and what is
// being written.
func (s *site) has() string {
	s.t.Helper()
	var all []string
	for _, args := range []string{"images list -q", "content list -q", "snapshots list", "content active", "leases list -q"} {
		lines := strings.Split(s.ctr(args), "\n")
		slices.Sort(lines)
		all = append(all, lines...)
	}
	return strings.Join(all, "\n")
}

// clean has containerd collect what the test's own images have left, and gives
// what it has then.
func (s *site) clean() string {
	s.t.Helper()
	s.ctr("leases delete --sync " + s.ctr("leases create"))
	return s.has()
}

func (s *site) ctr(args string) string {
	s.t.Helper()
	all := append([]string{"--address", strings.TrimPrefix(s.rt.Socket, "unix://"), "--namespace", "k8s.io"}, strings.Fields(args)...)
	out, err := exec.Command("ctr", all...).Output()
	if err != nil {
		s.t.Fatalf("ctr %s: %v: %s", all, err, out)
	}
	return strings.TrimSpace(string(out))
}

// image makes an archive of an image of busybox with a file of its own.
func image(t *testing.T, name, text string) []byte {
	t.Helper()
	files, err := testruntime.BusyboxFiles()
	if err != nil {
		t.Skip(err)
	}
	files = append(files, testruntime.File{Path: "/text", Mode: 0o644, Body: []byte(text)})
	b, err := testruntime.Image(name, files, testruntime.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"cat", "/text"}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// member is a file of an archive.
type member struct {
	name string
	body []byte
}

// members takes an archive apart.
func members(t *testing.T, b []byte) (all []member) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err != nil {
			return all
		}
		var body bytes.Buffer
		if _, err := body.ReadFrom(r); err != nil {
			t.Fatal(err)
		}
		all = append(all, member{h.Name, body.Bytes()})
	}
}

// assemble puts an archive together.
func assemble(t *testing.T, all []member) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, m := range all {
		if err := w.WriteHeader(&tar.Header{Name: m.name, Mode: 0o644, Size: int64(len(m.body))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// without leaves the members out that drop is true for.
func without(t *testing.T, b []byte, drop func(member) bool) []byte {
	t.Helper()
	return assemble(t, slices.DeleteFunc(members(t, b), drop))
}

// replace changes the bytes of a member of an archive.
func replace(t *testing.T, b []byte, name, before, after string) []byte {
	t.Helper()
	all := members(t, b)
	i := slices.IndexFunc(all, func(m member) bool { return m.name == name })
	if !bytes.Contains(all[i].body, []byte(before)) {
		t.Fatalf("%s has no %q: %s", name, before, all[i].body)
	}
	all[i].body = bytes.ReplaceAll(all[i].body, []byte(before), []byte(after))
	return assemble(t, all)
}

func gz(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zst(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	return w.EncodeAll(b, nil)
}

// docker makes the archive that docker save would, of the image in an OCI one.
func docker(t *testing.T, b []byte, name string) []byte {
	t.Helper()
	var config, layer member
	for _, m := range members(t, b) {
		switch {
		case bytes.Contains(m.body, []byte(`"diff_ids"`)):
			config = m
		case len(m.body) > 100_000:
			layer = m
		}
	}
	return assemble(t, []member{
		{"config.json", config.body}, {"a/layer.tar", layer.body},
		{"manifest.json", []byte(`[{"Config":"config.json","RepoTags":["` + name + `"],"Layers":["a/layer.tar"]}]`)},
	})
}

func write(t *testing.T, dir, name string, b []byte) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
