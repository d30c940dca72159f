package image

import (
	"context"
	"errors"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// container makes a container, which need not run to use its image.
func (s *site) container(t *testing.T, name, image string) (remove func()) {
	t.Helper()
	box := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: s.rt.Cgroup}}
	sandbox, err := s.cri.RunPodSandbox(t.Context(), box, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.cri.CreateContainer(t.Context(), sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "app"}, Image: &runtimeapi.ImageSpec{Image: s.id(t, image)}, Linux: &runtimeapi.LinuxContainerConfig{},
	}, box); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := errors.Join(s.cri.StopPodSandbox(t.Context(), sandbox), s.cri.RemovePodSandbox(t.Context(), sandbox)); err != nil {
			t.Fatal(err)
		}
	}
}

// disk is the file system that the test claims the images to be on.
type disk struct {
	at                  string
	capacity, available uint64
	err                 error
}

func (d *disk) stat(path string) (uint64, uint64, error) {
	d.at = path
	return d.capacity, d.available, d.err
}

// pinning is a runtime that pins an image, which containerd 1.6 cannot.
type pinning struct {
	Runtime
	pinned string
}

func (p *pinning) ListImages(ctx context.Context, filter *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	images, err := p.Runtime.ListImages(ctx, filter)
	for _, i := range images {
		i.Pinned = slices.Contains(i.RepoTags, p.pinned)
	}
	return images, err
}

func TestCollect(t *testing.T) {
	s := newSite(t)
	fs := &disk{capacity: 1 << 40, available: 1 << 39}
	digest := push(t, s.reg, "fairlead.test/digested:1", "")
	desired := []string{"fairlead.test/wanted", testruntime.Busybox, "fairlead.test/digested:1@" + digest}
	pins := &pinning{Runtime: s.cri}
	a := s.agent(t, func(c *Config) {
		c.Runtime = pins
		c.Stat = fs.stat
		c.Desired = func() []string { return desired }
	})
	const wanted, used, before, first, second, young = "fairlead.test/wanted:latest", "fairlead.test/used:1", "fairlead.test/used-before:1",
		"fairlead.test/first:1", "fairlead.test/second:1", "fairlead.test/young:1"
	const digested = "fairlead.test/digested:1"
	all := []string{testruntime.Pause, testruntime.Busybox, digested, wanted, used, before, first, second, young}
	pull := func(name string) (size int64) {
		t.Helper()
		push(t, s.reg, name, "")
		a.must(work("u", name, ifNotPresent))
		img, err := s.cri.ImageStatus(t.Context(), a.specOf(name))
		if err != nil {
			t.Fatal(err)
		}
		return int64(img.Size)
	}
	gone := func(when string, want ...string) {
		t.Helper()
		for _, name := range all {
			if there := s.id(t, name) != ""; there == slices.Contains(want, name) {
				t.Errorf("%s: %s is there: %v", when, name, there)
			}
		}
	}
	collect := func() {
		t.Helper()
		if err := a.Collect(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	pull(digested)
	pull(wanted)
	pull(used)
	beforeSize := pull(before)
	s.container(t, "user", used)
	unuse := s.container(t, "user-before", before)
	collect() // sees them, with the disk half full
	if !strings.HasPrefix(fs.at, filepath.Join(s.rt.Dir, "root")+string(filepath.Separator)) {
		t.Errorf("the space at %s was asked for", fs.at)
	}
	unuse()
	a.pass(time.Minute)
	pull(first)
	collect()
	a.pass(time.Minute)
	pull(second)
	collect()
	a.pass(2 * time.Minute)
	youngSize := pull(young)
	gone("at the start")

	// At 85 percent and not before, down to 80: one image is enough for that.
	fs.capacity, fs.available = 10_000, 1_600
	collect()
	gone("at 84 percent")
	fs.available = 1_500
	collect()
	gone("at 85 percent", first) // never used, and seen before the others
	collect()
	gone("at 85 percent again", first, second)

	// More than there is: what is too young, used, desired or the sandboxes' stays.
	fs.capacity, fs.available = 10<<30, 1536<<20
	err := a.Collect(t.Context())
	insufficient := "Insufficient free disk space on the node's image filesystem (85% of 10.0 GiB used). Failed to free sufficient space by deleting unused images (freed " +
		itoa(uint64(beforeSize)) + " bytes). Investigate disk usage, as it could be used by active images, logs, volumes, or other data."
	if err == nil || err.Error() != insufficient {
		t.Errorf("want %q, got %v", insufficient, err)
	}
	if want := []string{"Warning FreeDiskSpaceFailed " + insufficient}; !slices.Equal(a.node, want) {
		t.Errorf("want %q, got %q", want, a.node)
	}
	gone("short of space", first, second, before)

	// For an eviction, everything.
	a.pass(2 * time.Minute)
	freed, err := a.FreeSpace(t.Context(), math.MaxInt64)
	if err != nil || freed != youngSize {
		t.Errorf("freed %d bytes, want %d: %v", freed, youngSize, err)
	}
	gone("evicting", first, second, before, young)
	if n := len(a.Images.mu.access); n != 3 {
		t.Errorf("the pulls of %d images are remembered, of 3 that are left", n)
	}
	desired, pins.pinned = nil, testruntime.Busybox
	for _, want := range [][]string{{wanted, digested}, {wanted, digested, testruntime.Busybox}} {
		if _, err := a.FreeSpace(t.Context(), math.MaxInt64); err != nil {
			t.Error(err)
		}
		gone("nothing desired", append(want, first, second, before, young)...)
		pins.pinned = ""
	}

	a.node = nil
	fs.capacity = 0
	if err := a.Collect(t.Context()); err == nil || !slices.Equal(a.node, []string{"Warning InvalidDiskCapacity invalid capacity 0 on image filesystem"}) {
		t.Errorf("got %v and %q", err, a.node)
	}
	fs.err = errors.New("input/output error")
	if err := a.Collect(t.Context()); !errors.Is(err, fs.err) {
		t.Errorf("got %v", err)
	}
	off := s.agent(t, func(c *Config) { c.High, c.Stat = 100, fs.stat })
	if err := off.Collect(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestSize(t *testing.T) {
	for _, test := range []struct {
		bytes uint64
		want  string
	}{
		{0, "0 B"}, {1023, "1023 B"}, {1024, "1.0 KiB"}, {1536, "1.5 KiB"}, {1 << 20, "1.0 MiB"}, {10 << 30, "10.0 GiB"}, {1 << 50, "1024.0 TiB"},
	} {
		if got := size(test.bytes); got != test.want {
			t.Errorf("%d: want %s, got %s", test.bytes, test.want, got)
		}
	}
}

func TestStatfs(t *testing.T) {
	capacity, available, err := statfs(t.TempDir())
	if err != nil || capacity == 0 || available > capacity {
		t.Errorf("got %d, %d, %v", capacity, available, err)
	}
}
