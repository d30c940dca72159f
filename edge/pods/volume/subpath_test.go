package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// subPathPod is a pod that mounts a sub path of an emptyDir, and its parts.
func subPathPod(t testing.TB, sub string) (v *Volumes, pod *corev1.Pod, dir string, mount func() (string, error)) {
	t.Helper()
	v = newVolumes(t, t.TempDir(), mountObjects)
	pod = podWith(vol("empty", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}))
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	pod.Spec.Containers[0].VolumeMounts[0].SubPath = sub
	return v, pod, v.path(pod, &pod.Spec.Volumes[0]), func() (string, error) {
		mounts, err := v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]})
		if err != nil {
			return "", err
		}
		return mounts[0].HostPath, nil
	}
}

func TestSubPath(t *testing.T) {
	v, pod, dir, mount := subPathPod(t, "a/b")
	if err := unix.Chmod(dir, 0o2770); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 0, 3000); err != nil {
		t.Fatal(err)
	}
	bound := must[string](t)(mount())
	write(t, dir+"/a/b/file", "x")
	if got := read(t, bound+"/file"); got != "x" {
		t.Errorf("got %q", got)
	}
	// What is made has the volume's mode, and its group by the setgid bit.
	if got, want := tree(t, dir+"/a"), "2770 0:3000 ./\n2770 0:3000 b/\n0644 0:3000 b/file \"x\"\n"; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	// The next container of that name: bound once.
	must[string](t)(mount())
	if at := mountsBelow(t, v.cfg.Dir); len(at) != 1 {
		t.Errorf("mounts: %v", at)
	}
	// The folder is another one by now.
	if err := os.Rename(dir+"/a/b", dir+"/old"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/a/b/file", "y")
	if got := read(t, must[string](t)(mount())+"/file"); got != "y" {
		t.Errorf("got %q", got)
	}
	// ... and then a file.
	if err := os.Rename(dir+"/a/b", dir+"/old2"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/a/b", "z")
	if got := read(t, must[string](t)(mount())); got != "z" {
		t.Errorf("got %q", got)
	}
	if at := mountsBelow(t, v.cfg.Dir); len(at) != 1 {
		t.Errorf("mounts: %v", at)
	}
	if err := v.TearDown(t.Context(), pod.UID); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, v)
}

// One key of a ConfigMap: as it is when the container starts.
func TestSubPathOfContent(t *testing.T) {
	o := &objects{maps: map[string]map[string]string{"conf": {"a": "1"}}}
	v := newVolumes(t, t.TempDir(), o)
	pod := podWith(vol("conf", corev1.VolumeSource{ConfigMap: configMap("conf")}))
	pod.Spec.Containers[0].VolumeMounts[0].SubPath = "a"
	mount := func() string {
		if err := v.SetUp(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		return must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]}))[0].HostPath
	}
	bound := mount()
	o.maps["conf"]["a"] = "2"
	if _, err := v.Update(pod); err != nil {
		t.Fatal(err)
	}
	if got := read(t, bound); got != "1" {
		t.Errorf("while it runs: %q", got)
	}
	if got := read(t, mount()); got != "2" {
		t.Errorf("after a restart: %q", got)
	}
}

// Links that containers make may lead somewhere in the volume, and nowhere else.
func TestSubPathLinks(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/secret", "host")
	v, _, dir, mount := subPathPod(t, "x")
	write(t, dir+"/real/file", "mine")
	for link, want := range map[string]string{
		"real":                      "",
		"./real/../real":            "",
		dir + "/real":               "",
		outside:                     "failed to prepare",
		outside + "/none":           "failed to create",
		"/":                         "failed to prepare",
		"..":                        "failed to prepare",
		"../../../..":               "failed to prepare",
		"../" + filepath.Base(dir):  "",
		"gone":                      "failed to create",
		"../../etc-hosts":           "failed to create",
		"x":                         "failed to create",
		"real/file/below":           "failed to create",
		"/proc/self/root" + outside: "failed to prepare",
	} {
		_ = os.Remove(dir + "/x")
		if err := os.Symlink(link, dir+"/x"); err != nil {
			t.Fatal(err)
		}
		bound, err := mount()
		if (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want+" ") {
			t.Errorf("%s: got %q %v, want %q", link, bound, err, want)
		}
		if err != nil && (strings.Contains(err.Error(), outside) || strings.Contains(err.Error(), v.cfg.Dir)) {
			t.Errorf("%s: the error tells of the host: %v", link, err)
		}
		if _, err := os.Stat(outside + "/none"); err == nil {
			t.Errorf("%s: made outside", link)
		}
	}
}

// A container swaps its folder for a link to the host between the steps.
func TestSubPathSwap(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/b/secret", "host")
	for _, step := range []string{"resolved", "subPath folder", "subPath target"} {
		for _, sub := range []string{"a", "a/b", "a/b/c"} {
			_, _, dir, mount := subPathPod(t, sub)
			if step == "resolved" {
				write(t, dir+"/"+sub+"/file", "mine")
			}
			swapped := false
			onStep(t, func(s string) {
				if s == step && !swapped {
					swapped = true
					if os.Rename(dir+"/a", dir+"/was") != nil || os.Symlink(outside, dir+"/a") != nil {
						t.Error("cannot swap")
					}
				}
			})
			bound, err := mount()
			if !swapped {
				t.Fatalf("%s %s: not reached", step, sub)
			}
			reached = func(string) {}
			if err != nil {
				continue
			}
			var in, out unix.Stat_t
			if unix.Stat(bound, &in) != nil || unix.Stat(filepath.Join(outside, strings.TrimPrefix(sub, "a")), &out) == nil && in.Ino == out.Ino && in.Dev == out.Dev {
				t.Errorf("%s %s: the host's folder is bound", step, sub)
			}
			if left := must[[]string](t)(filepath.Glob(outside + "/b/c")); len(left) > 0 {
				t.Errorf("%s %s: made outside", step, sub)
			}
		}
	}
}

// The same without end, while the sub path is bound again and again.
func TestSubPathRace(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/b/secret", "host")
	_, _, dir, mount := subPathPod(t, "a/b")
	write(t, dir+"/a/b/file", "mine")
	if err := os.Symlink(outside, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var flips atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			if unix.Renameat2(unix.AT_FDCWD, dir+"/a", unix.AT_FDCWD, dir+"/link", unix.RENAME_EXCHANGE) == nil {
				flips.Add(1)
			}
		}
	})
	good, refused := 0, 0
	for range 3000 {
		bound, err := mount()
		if err != nil {
			refused++
			continue
		}
		good++
		if _, err := os.Stat(bound + "/secret"); err == nil {
			t.Fatal("the host's folder is bound")
		}
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d bound, %d refused, %d flips", good, refused, flips.Load())
	if good == 0 || refused == 0 {
		t.Errorf("%d bound, %d refused: there was no race", good, refused)
	}
}

// On a full disk a sub path is not made, and says why; the file for the termination
// message is left out.
func TestMountsDiskFull(t *testing.T) {
	rootOnly(t)
	for _, sub := range []string{"", "there", "new"} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		v := newVolumes(t, dir, mountObjects)
		pod := podWith(vol("empty", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}))
		if err := v.SetUp(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		write(t, v.path(pod, &pod.Spec.Volumes[0])+"/there/file", "x")
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT, fmt.Sprintf("nr_inodes=%d", st.Files-st.Ffree)); err != nil {
			t.Fatal(err)
		}
		pod.Spec.Containers[0].VolumeMounts[0].SubPath = sub
		mounts, err := v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]})
		if sub == "" {
			if err != nil || len(mounts) != 1 {
				t.Errorf("got %v, %v", mounts, err)
			}
			continue
		}
		if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), `volumeMount "empty" of container "main": no space left on device`) {
			t.Errorf("%s: got %v", sub, err)
		}
		if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "nr_inodes=10000"); err != nil {
			t.Fatal(err)
		}
		if _, err := v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]}); err != nil {
			t.Errorf("%s, with room again: %v", sub, err)
		}
	}
}

func TestReadFile(t *testing.T) {
	outside := t.TempDir()
	write(t, outside+"/secret", "host")
	v, pod, dir, _ := subPathPod(t, "x")
	write(t, dir+"/sub/env", "A='1'")
	write(t, dir+"/large", strings.Repeat("x", envFile+1))
	if err := errors.Join(os.Symlink("sub/env", dir+"/link"), os.Symlink(outside+"/secret", dir+"/out"), unix.Mkfifo(dir+"/fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	pod.Spec.Volumes = append(pod.Spec.Volumes, vol("host", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: outside}}))
	for _, path := range []string{"sub/env", "link"} {
		if got, err := v.ReadFile(pod, "empty", path); err != nil || string(got) != "A='1'" {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
	for path, volume := range map[string]string{"out": "empty", "none": "empty", "fifo": "empty", "sub": "empty", "large": "empty", "../../../etc-hosts": "empty", "/etc/passwd": "empty", "secret": "host", "x": "no"} {
		if got, err := v.ReadFile(pod, volume, path); err == nil {
			t.Errorf("%s of %s: %q", path, volume, got)
		}
	}
}
