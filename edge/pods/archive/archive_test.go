package archive_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/archive"
	"github.com/fairlead-io/fairlead/edge/pods/archive/folder"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func TestImport(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	for _, tc := range []struct {
		name, ref string
		archive   []byte
		options   archive.Options
	}{
		{"oci", "fairlead.test/oci:1", image(t, "fairlead.test/oci:1", "oci"), archive.Options{}},
		{"gzip", "fairlead.test/gz:1", gz(t, image(t, "fairlead.test/gz:1", "gzip")), archive.Options{}},
		{"zstd", "fairlead.test/zst:1", zst(t, image(t, "fairlead.test/zst:1", "zstd")), archive.Options{}},
		{"docker", "fairlead.test/docker:1", docker(t, image(t, "x:1", "docker"), "fairlead.test/docker:1"), archive.Options{}},
		{"docker-short", "docker.io/library/short:latest", docker(t, image(t, "x:1", "docker-short"), "short"), archive.Options{}},
		{"named", "fairlead.test/named:2", image(t, "fairlead.test/other:1", "named"), archive.Options{Name: "fairlead.test/named:2"}},
		{"by-ref-name", "fairlead.test/ref:1", replace(t, replace(t, image(t, "fairlead.test/ref:1", "by-ref-name"), "index.json", `"io.containerd.image.name"`, `"x"`),
			"index.json", `ref.name":"1"`, `ref.name":"fairlead.test/ref:1"`), archive.Options{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var last, size int64
			imgs, err := s.ImportFile(t.Context(), write(t, dir, tc.name, tc.archive), tc.options, func(n, of int64) { last, size = n, of })
			if err != nil {
				t.Fatal(err)
			}
			if len(imgs) != 1 || imgs[0].Name != tc.ref || imgs[0].Size == 0 {
				t.Fatalf("got %v", imgs)
			}
			if last != int64(len(tc.archive)) || size != last {
				t.Errorf("progress ended with %d of %d, want %d", last, size, len(tc.archive))
			}
			// No waiting: the next pod finds it.
			if !s.present(tc.ref) {
				t.Fatalf("the CRI has no image %s", tc.ref)
			}
			if got := s.runs(tc.ref); got != tc.name {
				t.Errorf("a container of it says %q, want %q", got, tc.name)
			}
		})
	}
	l, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range l {
		names = append(names, i.Name)
		if !strings.HasPrefix(i.Digest, "sha256:") || i.Size < 1<<20 {
			t.Errorf("listed as %+v", i)
		}
	}
	if !slices.IsSorted(names) || len(names) != 9 || names[0] != "docker.io/library/short:latest" {
		t.Errorf("list has %q", names)
	}
}

// runs runs a container of an image and gives what it says.
func (s *site) runs(ref string) string {
	s.t.Helper()
	ctx := s.t.Context()
	name := strings.NewReplacer("/", "-", ":", "-").Replace(ref)
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: filepath.Join(s.rt.Dir, name),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: s.rt.Cgroup},
	}
	if err := os.RemoveAll(config.LogDirectory); err != nil { // of a container before
		s.t.Fatal(err)
	}
	sandbox, err := s.cri.RunPodSandbox(ctx, config, "")
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() {
		if err := s.cri.RemovePodSandbox(ctx, sandbox); err != nil {
			s.t.Error(err)
		}
	}()
	id, err := s.cri.CreateContainer(ctx, sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main"}, Image: &runtimeapi.ImageSpec{Image: ref}, LogPath: "log",
		Linux: &runtimeapi.LinuxContainerConfig{},
	}, config)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cri.StartContainer(ctx, id); err != nil {
		s.t.Fatal(err)
	}
	for {
		c, err := s.cri.ContainerStatus(ctx, id)
		if err != nil {
			s.t.Fatal(err)
		}
		if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	b, err := os.ReadFile(filepath.Join(config.LogDirectory, "log"))
	if err != nil {
		s.t.Fatal(err)
	}
	_, text, _ := strings.Cut(strings.TrimSpace(string(b)), " stdout P ")
	return text
}

// TestReplace imports another image under a name that is taken.
func TestReplace(t *testing.T) {
	s := start(t)
	const ref = "fairlead.test/app:1"
	for _, text := range []string{"first", "second", "second"} {
		if _, err := s.Import(t.Context(), bytes.NewReader(image(t, ref, text)), archive.Options{}); err != nil {
			t.Fatal(err)
		}
		if got := s.runs(ref); got != text {
			t.Errorf("a container says %q, want %q", got, text)
		}
	}
}

func TestBadArchives(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	good := image(t, "fairlead.test/app:1", "x")
	blob := func(f func(member) bool) func(member) bool {
		return func(m member) bool { return strings.HasPrefix(m.name, "blobs/") && f(m) }
	}
	before := s.clean()
	for name, tc := range map[string]struct {
		archive []byte
		want    string
	}{
		"empty":           {nil, "the file is empty"},
		"text":            {bytes.Repeat([]byte("no archive "), 1000), "no tar file"},
		"tar of no image": {assemble(t, []member{{"readme", []byte("x")}}), "holds no image"},
		"cut off":         {good[:len(good)/2], "not whole"},
		"gzip cut off":    {gz(t, good)[:100_000], "not copied whole"},
		"gzip damaged":    {flip(gz(t, good)), "damaged"},
		"zstd cut off":    {zst(t, good)[:100_000], "not copied whole"},
		"zstd damaged":    {flip(zst(t, good)), "damaged"},
		"no index":        {without(t, good, func(m member) bool { return m.name == "index.json" }), "missing index.json"},
		"index no JSON":   {replace(t, good, "index.json", `"manifests"`, `manifests`), "index.json"},
		"empty index":     {replace(t, good, "index.json", `"manifests"`, `"other"`), "names no image"},
		"bad digest":      {replace(t, good, "index.json", `"sha256:`, `"sha256:z`), "digest"},
		"no manifest": {without(t, good, blob(func(m member) bool {
			return bytes.Contains(m.body, []byte(`"layers"`)) && !bytes.Contains(m.body, []byte("diff_ids"))
		})), "missing or damaged"},
		"no configuration": {without(t, good, blob(func(m member) bool { return bytes.Contains(m.body, []byte("diff_ids")) })), "missing or damaged"},
		"no layer":         {without(t, good, blob(func(m member) bool { return len(m.body) > 100_000 })), "missing or damaged"},
		"bad layer":        {damageLayer(t, good), "missing or damaged"},
		"layer no tar":     {badLayer(t), "a layer of image fairlead.test/app:1 is damaged"},
		"no name":          {replace(t, good, "index.json", `"io.containerd.image.name"`, `"x"`), "--name"},
		"bad name":         {replace(t, good, "index.json", `"fairlead.test/app:1"`, `"fairlead.test/APP:1"`), `"fairlead.test/APP:1"`},
		"docker, no layer": {without(t, docker(t, good, "a:1"), func(m member) bool { return m.name == "a/layer.tar" }), `layer "a/layer.tar" not found`},
		"other platform":   {otherPlatform(t), "but for linux/s390x"},
	} {
		t.Run(name, func(t *testing.T) {
			file := write(t, dir, strings.ReplaceAll(name, " ", "-"), tc.archive)
			_, err := s.ImportFile(t.Context(), file, archive.Options{}, nil)
			var bad *archive.BadArchive
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), file) {
				t.Errorf("got the error %v, want a bad archive with %q", err, tc.want)
			}
			if after := s.has(); after != before {
				t.Errorf("left in containerd:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
	if _, err := s.ImportFile(t.Context(), filepath.Join(dir, "none"), archive.Options{}, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err := s.ImportFile(t.Context(), dir, archive.Options{}, nil); err == nil {
		t.Error("a folder was imported")
	}
	if _, err := s.Import(t.Context(), bytes.NewReader(good), archive.Options{}); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// flip changes a byte in the middle.
func flip(b []byte) []byte {
	b[len(b)/2] ^= 0x55
	return b
}

func damageLayer(t *testing.T, b []byte) []byte {
	t.Helper()
	all := members(t, b)
	for _, m := range all {
		if len(m.body) > 100_000 {
			flip(m.body)
		}
	}
	return assemble(t, all)
}

// badLayer is an image whose layer is not what its configuration says.
func badLayer(t *testing.T) []byte {
	t.Helper()
	d := docker(t, image(t, "fairlead.test/app:1", "x"), "fairlead.test/app:1")
	return assemble(t, append(slices.DeleteFunc(members(t, d), func(m member) bool { return m.name == "a/layer.tar" }),
		member{"a/layer.tar", assemble(t, []member{{"other", []byte("x")}})}))
}

// otherPlatform is an image for a machine that runs no tests of ours.
func otherPlatform(t *testing.T) []byte {
	t.Helper()
	all := members(t, docker(t, image(t, "fairlead.test/app:1", "x"), "fairlead.test/app:1"))
	arch := `"architecture":"`
	_, rest, _ := strings.Cut(string(all[0].body), arch)
	name, _, _ := strings.Cut(rest, `"`)
	return replace(t, assemble(t, all), "config.json", arch+name+`"`, arch+`s390x"`)
}

// TestInterrupted ends an import in the middle of the archive.
func TestInterrupted(t *testing.T) {
	s := start(t)
	before := s.clean()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	file := write(t, t.TempDir(), "a.tar", image(t, "fairlead.test/app:1", "x"))
	_, err := s.ImportFile(ctx, file, archive.Options{}, func(read, size int64) {
		if read > size/2 {
			cancel()
		}
	})
	var bad *archive.BadArchive
	if err == nil || errors.As(err, &bad) {
		t.Errorf("got %v, want an error that is not the archive's", err)
	}
	if after := s.has(); after != before {
		t.Errorf("left in containerd:\n%s\nbefore:\n%s", after, before)
	}
}

// TestFullDisk runs containerd on a small disk.
func TestFullDisk(t *testing.T) {
	if err := testruntime.Missing(); err != nil {
		t.Skip(err)
	}
	disk, err := os.MkdirTemp("", "fld") //nolint:usetesting // short, for containerd's socket
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=48m"); err != nil {
		t.Skip("mount:", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(disk, 0), os.Remove(disk)); err != nil {
			t.Error(err)
		}
	})
	rt, err := testruntime.New(filepath.Join(disk, "r"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Stop(); err != nil {
			t.Error(err)
		}
	})
	s := clients(t, rt)
	before := s.clean()
	for name, size := range map[string]int{"its content": 60 << 20, "its snapshot": 25 << 20} {
		noise := make([]byte, size)
		if _, err := io.ReadFull(rand.Reader, noise); err != nil {
			t.Fatal(err)
		}
		big, err := testruntime.Image("fairlead.test/big:1", []testruntime.File{{Path: "/noise", Body: noise}}, testruntime.Config{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Import(t.Context(), bytes.NewReader(big), archive.Options{})
		var bad *archive.BadArchive
		if !errors.Is(err, archive.ErrNoSpace) || errors.As(err, &bad) {
			t.Errorf("no room for %s: got %v", name, err)
		}
		if after := s.has(); after != before {
			t.Errorf("no room for %s: left in containerd:\n%s\nbefore:\n%s", name, after, before)
		}
	}
	if _, err := s.Import(t.Context(), bytes.NewReader(image(t, "fairlead.test/small:1", "small")), archive.Options{}); err != nil {
		t.Errorf("a small one afterwards: %v", err)
	}

	// An export that does not fit.
	out := filepath.Join(disk, "e")
	if err := os.Mkdir(out, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", out, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(out, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := s.ExportFile(t.Context(), filepath.Join(out, "a.tar"), testruntime.Busybox); !errors.Is(err, archive.ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("export: got %v", err)
	}
	if left, err := os.ReadDir(out); err != nil || len(left) > 0 {
		t.Errorf("export left %v, %v", left, err)
	}
}

func TestExport(t *testing.T) {
	a, b := start(t), start(t)
	for _, ref := range []string{"fairlead.test/app:1", "fairlead.test/app:2"} {
		if _, err := a.Import(t.Context(), bytes.NewReader(image(t, ref, ref)), archive.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "both.tar")
	if err := a.ExportFile(t.Context(), file, "fairlead.test/app:1", "fairlead.test/app:2"); err != nil {
		t.Fatal(err)
	}
	imgs, err := b.ImportFile(t.Context(), file, archive.Options{}, nil)
	if err != nil || len(imgs) != 2 {
		t.Fatalf("imported %v, %v", imgs, err)
	}
	for _, ref := range []string{"fairlead.test/app:1", "fairlead.test/app:2"} {
		if got := b.runs(ref); got != ref {
			t.Errorf("a container says %q, want %q", got, ref)
		}
	}
	if _, err := b.ImportFile(t.Context(), file, archive.Options{Name: "x:1"}, nil); err == nil || !strings.Contains(err.Error(), "2 images") {
		t.Errorf("one name for two images: %v", err)
	}
	err = a.ExportFile(t.Context(), file+".2", "fairlead.test/none:1")
	if err == nil || !strings.Contains(err.Error(), "fairlead.test/none:1 is not present") {
		t.Errorf("an image that is not there: %v", err)
	}
	if _, err := os.Stat(file + ".2"); !os.IsNotExist(err) {
		t.Errorf("the failed export left a file: %v", err)
	}
}

func TestAway(t *testing.T) {
	s := start(t)
	s.rt.Kill()
	if _, err := s.List(t.Context()); !errors.Is(err, archive.ErrAway) || !strings.Contains(err.Error(), s.rt.Socket) {
		t.Errorf("list: got %v", err)
	}
	_, err := s.Import(t.Context(), bytes.NewReader(image(t, "fairlead.test/app:1", "x")), archive.Options{})
	var bad *archive.BadArchive
	if !errors.Is(err, archive.ErrAway) || errors.As(err, &bad) {
		t.Errorf("import: got %v", err)
	}
	if _, err := archive.Dial("tcp://127.0.0.1:1"); err == nil {
		t.Error("a TCP address was taken")
	}
}

func TestFolder(t *testing.T) {
	s := start(t)
	dir := t.TempDir()
	sync := func() map[string]folder.Result {
		t.Helper()
		got := map[string]folder.Result{}
		if err := s.Folder(t.Context(), dir, nil, func(r folder.Result) { got[r.File] = r }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	pinned := func() (names []string) {
		t.Helper()
		l, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range l {
			if i.Pinned && i.Name != testruntime.Pause { // which newer containerds pin themselves
				names = append(names, i.Archive+" "+i.Name)
			}
		}
		return names
	}
	wantPinned := func(want ...string) {
		t.Helper()
		if got := pinned(); !slices.Equal(got, want) {
			t.Errorf("pinned: %q, want %q", got, want)
		}
	}
	write(t, dir, "a;1.tar", image(t, "fairlead.test/a:1", "a"))
	b := write(t, dir, "b.tar.gz", gz(t, image(t, "fairlead.test/b:1", "b")))
	write(t, dir, "bad.tar", []byte("x"))
	write(t, dir, "c.tar.part", []byte("x"))
	write(t, dir, ".hidden.tar", []byte("x"))
	got := sync()
	if len(got) != 3 || !slices.Equal(got["a;1.tar"].Images, []string{"fairlead.test/a:1"}) || got["b.tar.gz"].Error != "" ||
		!strings.Contains(got["bad.tar"].Error, "bad archive") || got["bad.tar"].Retry {
		t.Errorf("first: %v", got)
	}
	wantPinned("a;1.tar fairlead.test/a:1", "b.tar.gz fairlead.test/b:1")

	if got := sync(); len(got) != 1 || got["bad.tar"].Error == "" {
		t.Errorf("once more: %v", got)
	}
	// Another content under the same name.
	write(t, dir, "a;1.tar", image(t, "fairlead.test/a:2", "another a"))
	if got := sync(); len(got) != 2 || !slices.Equal(got["a;1.tar"].Images, []string{"fairlead.test/a:2"}) {
		t.Errorf("replaced: %v", got)
	}
	wantPinned("a;1.tar fairlead.test/a:2", "b.tar.gz fairlead.test/b:1")
	// One that was removed from the runtime comes back.
	if err := s.cri.RemoveImage(t.Context(), &runtimeapi.ImageSpec{Image: "fairlead.test/b:1"}); err != nil {
		t.Fatal(err)
	}
	if got := sync(); len(got) != 2 || !slices.Equal(got["b.tar.gz"].Images, []string{"fairlead.test/b:1"}) || !s.present("fairlead.test/b:1") {
		t.Errorf("removed: %v", got)
	}
	if err := os.Remove(b); err != nil {
		t.Fatal(err)
	}
	if got := sync(); len(got) != 1 || !s.present("fairlead.test/b:1") {
		t.Errorf("archive taken away: %v", got)
	}
	wantPinned("a;1.tar fairlead.test/a:2")

	s.rt.Kill()
	if err := s.Folder(t.Context(), dir, nil, func(folder.Result) {}); !errors.Is(err, archive.ErrAway) {
		t.Errorf("while containerd is away: %v", err)
	}
}
