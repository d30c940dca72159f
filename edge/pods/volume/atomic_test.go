package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// A program that watches the volume, as those in containers do, hears of ..data
// once per change, and finds everything new there when it does.
func TestWatch(t *testing.T) {
	o := &objects{maps: map[string]map[string]string{"conf": {"keep": "1", "drop": "1"}}}
	v := newVolumes(t, t.TempDir(), o)
	pod := podWith(vol("v", corev1.VolumeSource{ConfigMap: configMap("conf")}))
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	dir := v.path(pod, &pod.Spec.Volumes[0])
	fd := must[int](t)(unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC))
	defer func() { _ = unix.Close(fd) }()
	must[int](t)(unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE|unix.IN_MODIFY))

	swaps := 0
	onStep(t, func(step string) {
		switch step {
		case "new ..data":
			if got := read(t, dir+"/keep") + read(t, dir+"/drop"); got != "11" {
				t.Errorf("before the change: %s", got)
			}
		case "swapped":
			swaps++
			if got := read(t, dir+"/keep") + read(t, dir+"/add") + read(t, dir+"/more/x"); got != "222" {
				t.Errorf("at the change: %s", got)
			}
		}
	})
	o.maps["conf"] = map[string]string{"keep": "2", "add": "2", "x": "2"}
	pod.Spec.Volumes[0].ConfigMap.Items = []corev1.KeyToPath{key("keep", "keep", nil), key("add", "add", nil), key("x", "more/x", nil)}
	for range 2 { // the second one changes nothing
		if _, err := v.Update(pod); err != nil {
			t.Fatal(err)
		}
	}
	if swaps != 1 {
		t.Errorf("%d swaps, want 1", swaps)
	}
	var heard []string
	buf := make([]byte, 1<<16)
	for b := buf[:must[int](t)(unix.Read(fd, buf))]; len(b) > 0; {
		mask, n := binary.NativeEndian.Uint32(b[4:]), binary.NativeEndian.Uint32(b[12:])
		if name := string(bytes.TrimRight(b[16:16+n], "\x00")); name == dataLink {
			heard = append(heard, fmt.Sprintf("%#x", mask))
		}
		b = b[16+n:]
	}
	if want := []string{fmt.Sprintf("%#x", unix.IN_MOVED_TO)}; !slices.Equal(heard, want) {
		t.Errorf("events of ..data: %v, want %v", heard, want)
	}
}

// On a full disk a volume has its old content, all of it, and the error says where.
func TestDiskFull(t *testing.T) {
	rootOnly(t)
	old := map[string]string{"a": "1", "b": strings.Repeat("1", 9000)}
	fresh := map[string]string{"b": strings.Repeat("2", 40000), "c": "2", "d": "2"}
	items := []corev1.KeyToPath{key("b", "b", nil), key("c", "x/c", nil), key("d", "d", nil)}
	for _, limit := range []string{"nr_inodes=%d", "size=%d"} {
		failed := 0
		for n := 1; ; n++ {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			o := &objects{maps: map[string]map[string]string{"conf": old}}
			v := newVolumes(t, dir, o)
			pod := podWith(vol("v", corev1.VolumeSource{ConfigMap: configMap("conf")}))
			if err := v.SetUp(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			volume := v.path(pod, &pod.Spec.Volumes[0])
			was := tree(t, volume)
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err != nil {
				t.Fatal(err)
			}
			bound := uint64(n) + st.Files - st.Ffree
			if strings.HasPrefix(limit, "size") {
				bound = (uint64(n) + st.Blocks - st.Bfree) * uint64(st.Bsize)
			}
			if err := unix.Mount("", dir, "", unix.MS_REMOUNT, fmt.Sprintf(limit, bound)); err != nil {
				t.Fatal(err)
			}
			o.maps["conf"] = fresh
			pod.Spec.Volumes[0].ConfigMap.Items = items
			_, err := v.Update(pod)
			if err == nil {
				if got := tree(t, volume); strings.Contains(got, " a ") || !strings.Contains(got, "x/c \"2\"") {
					t.Errorf("%s %d: %s", limit, n, got)
				}
				break
			}
			failed++
			if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), `volume "v"`) || !strings.Contains(err.Error(), volume) {
				t.Errorf("%s %d: %v", limit, n, err)
			}
			if diff := cmp.Diff(was, tree(t, volume)); diff != "" {
				t.Errorf("%s %d: %s", limit, n, diff)
			}
			if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "nr_inodes=10000,size=10000000"); err != nil {
				t.Fatal(err)
			}
			if _, err := v.Update(pod); err != nil {
				t.Errorf("%s %d, with room again: %v", limit, n, err)
			}
			if got := read(t, volume+"/x/c"); got != "2" {
				t.Errorf("%s %d, with room again: %s", limit, n, got)
			}
		}
		if failed < 5 {
			t.Errorf("%s: failed at %d places only", limit, failed)
		}
	}
}

// A secret that does not fit into the memory that its pod may have.
func TestSecretTooLarge(t *testing.T) {
	o := &objects{secrets: map[string]map[string]string{"big": {"a": strings.Repeat("x", 9000)}}}
	v := newVolumes(t, t.TempDir(), o)
	pod := podWith(vol("v", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "big"}}))
	pod.Spec.Containers[0].Resources.Limits = corev1.ResourceList{"memory": resource.MustParse("4096")}
	err := v.SetUp(t.Context(), pod)
	dir := v.path(pod, &pod.Spec.Volumes[0])
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v", err)
	}
	if left := must[[]os.DirEntry](t)(os.ReadDir(dir)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What a call before has left, or somebody has put there, is cleared.
func TestSweep(t *testing.T) {
	o := &objects{maps: map[string]map[string]string{"conf": {"a": "1"}}}
	v := newVolumes(t, t.TempDir(), o)
	pod := podWith(vol("v", corev1.VolumeSource{ConfigMap: configMap("conf")}))
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	dir := v.path(pod, &pod.Spec.Volumes[0])
	want := tree(t, dir)
	outside := t.TempDir()
	write(t, outside+"/a", "host")
	spoil := map[string]func() error{
		"half-written folder":    func() error { write(t, dir+"/..2020_01_01_00_00_00.1/a", "x"); return nil },
		"new link left":          func() error { return os.Symlink("..2020", filepath.Join(dir, newDataLink)) },
		"new link is a folder":   func() error { return os.MkdirAll(filepath.Join(dir, newDataLink, "x"), 0o755) },
		"name without content":   func() error { return os.Symlink("..data/gone", dir+"/gone") },
		"name missing":           func() error { return os.Remove(dir + "/a") },
		"name leads elsewhere":   func() error { return errors.Join(os.Remove(dir+"/a"), os.Symlink(outside+"/a", dir+"/a")) },
		"..data leads elsewhere": func() error { return errors.Join(os.Remove(dir+"/..data"), os.Symlink(outside, dir+"/..data")) },
		"..data is gone":         func() error { return os.Remove(dir + "/..data") },
		"the content is another": func() error { return os.WriteFile(dir+"/..data/a", []byte("2"), 0o600) },
		"the content is cut":     func() error { return os.Truncate(dir+"/..data/a", 0) },
		"a file is a link": func() error {
			return errors.Join(os.Remove(dir+"/..data/a"), os.Symlink(outside+"/a", dir+"/..data/a"))
		},
	}
	for name, f := range spoil {
		t.Run(name, func(t *testing.T) {
			if err := f(); err != nil {
				t.Fatal(err)
			}
			if err := v.SetUp(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
			if got := read(t, outside+"/a"); got != "host" {
				t.Errorf("outside: %q", got)
			}
		})
	}
}
