package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fullPod is a pod with one of each kind of volume and mount that the agent makes.
func fullPod() *corev1.Pod {
	pod := podWith(
		vol("conf", corev1.VolumeSource{ConfigMap: configMap("conf")}),
		vol("tls", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls"}}),
		vol("disk", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}),
		vol("memory", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: "Memory"}}),
	)
	m := pod.Spec.Containers[0].VolumeMounts
	m[0].SubPath = "a.conf"
	m[2].SubPath = "logs/main"
	m[3].SubPath = "x"
	pod.Spec.Containers[0].VolumeMounts = append(slices.Clone(m), corev1.VolumeMount{Name: "conf", MountPath: "/all"}, corev1.VolumeMount{Name: "disk", MountPath: "/all/below"})
	return pod
}

func setUpFull(t testing.TB) (*Volumes, *corev1.Pod, []*runtimeapi.Mount) {
	t.Helper()
	v := newVolumes(t, t.TempDir(), mountObjects)
	pod := fullPod()
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	must[string](t)(v.Hosts(pod, []string{"10.88.0.7"}, "press", ""))
	return v, pod, must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]}))
}

func TestTearDown(t *testing.T) {
	v, pod, mounts := setUpFull(t)
	if got := len(mountsBelow(t, v.cfg.Dir)); got != 5 { // two tmpfs, three sub paths
		t.Errorf("%d mounts", got)
	}
	if got := must[[]types.UID](t)(v.Pods()); !slices.Equal(got, []types.UID{uid}) {
		t.Errorf("pods: %v", got)
	}
	// A program still uses what is in memory, and what is bound.
	busy := must[*os.File](t)(os.Create(v.path(pod, &pod.Spec.Volumes[3]) + "/busy"))
	busy2 := must[*os.File](t)(os.Open(mounts[2].HostPath))
	defer func() { _, _ = busy.Close(), busy2.Close() }()
	for range 2 {
		if err := v.TearDown(t.Context(), uid); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, v)
	}
	if err := v.TearDown(t.Context(), "never-seen"); err != nil {
		t.Error(err)
	}
	for _, bad := range []types.UID{"", ".", "..", "../pods", "a/b"} {
		if err := v.TearDown(t.Context(), bad); err == nil {
			t.Errorf("uid %q is taken", bad)
		}
	}
}

// The host's folders that a pod's lead to survive it: by symlink, by bind mounts of
// the same file system, one upon another, with blanks in their names.
func TestTearDownSparesTheHost(t *testing.T) {
	v, pod, _ := setUpFull(t)
	host := filepath.Join(filepath.Dir(v.cfg.Dir), "host")
	write(t, host+"/a/precious", "x")
	disk := v.path(pod, &pod.Spec.Volumes[2])
	neighbour := v.cfg.Dir + "/" + string(uid) + "-2/precious"
	write(t, neighbour, "x")
	if err := errors.Join(
		os.Symlink(host, disk+"/link"),
		os.Symlink(host+"/a/precious", disk+"/filelink"),
		os.Mkdir(disk+"/m", 0o755), unix.Mount(host, disk+"/m", "", unix.MS_BIND, ""),
		unix.Mount(host, disk+"/m/a", "", unix.MS_BIND, ""),
		unix.Mount(host, disk+"/m", "", unix.MS_BIND|unix.MS_REC, ""),
		os.Mkdir(disk+"/with blank\n", 0o755), unix.Mount(host+"/a", disk+"/with blank\n", "", unix.MS_BIND, ""),
		os.WriteFile(disk+"/f", nil, 0o600), unix.Mount(host+"/a/precious", disk+"/f", "", unix.MS_BIND, ""),
	); err != nil {
		t.Fatal(err)
	}
	if err := v.TearDown(t.Context(), uid); err != nil {
		t.Fatal(err)
	}
	if at := mountsBelow(t, v.cfg.Dir); len(at) > 0 {
		t.Errorf("mounts are left: %v", at)
	}
	for _, path := range []string{host + "/a/precious", neighbour} {
		if got := read(t, path); got != "x" {
			t.Errorf("%s: %q", path, got)
		}
	}
	if got := must[[]types.UID](t)(v.Pods()); !slices.Equal(got, []types.UID{uid + "-2"}) {
		t.Errorf("pods: %v", got)
	}
}

// What is mounted on the host below a shared hostPath comes to the sub path's bind, and
// does not go with it.
func TestTearDownShared(t *testing.T) {
	v := newVolumes(t, t.TempDir(), mountObjects)
	host := filepath.Join(filepath.Dir(v.cfg.Dir), "host")
	if err := errors.Join(os.Mkdir(host, 0o755), unix.Mount("tmpfs", host, "tmpfs", 0, ""), unix.Mount("", host, "", unix.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	pod := podWith(vol("host", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: host}}))
	pod.Spec.Containers[0].VolumeMounts[0].SubPath = "sub"
	for _, end := range []func(){
		func() { // the container starts again, when the folder is another one
			if err := os.Rename(host+"/sub", host+"/was"); err != nil {
				t.Fatal(err)
			}
			must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]}))
			if err := errors.Join(os.Remove(host+"/sub"), os.Rename(host+"/was", host+"/sub")); err != nil {
				t.Fatal(err)
			}
		},
		func() {
			if err := v.TearDown(t.Context(), uid); err != nil {
				t.Fatal(err)
			}
		},
	} {
		bound := must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]}))[0].HostPath
		usb := host + "/sub/usb"
		if err := errors.Join(os.MkdirAll(usb, 0o755), unix.Mount("tmpfs", usb, "tmpfs", 0, "")); err != nil {
			t.Fatal(err)
		}
		if !must[bool](t)(isMounted(bound+"/usb", unix.TMPFS_MAGIC)) {
			t.Fatal("the host's mount has not come")
		}
		end()
		if !must[bool](t)(isMounted(usb, unix.TMPFS_MAGIC)) {
			t.Error("the host's mount is gone")
		}
		if err := unix.Unmount(usb, 0); err != nil {
			t.Error(err)
		}
	}
	nothingLeft(t, v)
}

// openers are the two ways to enter a folder.
var openers = map[string]func(int, string) (int, error){
	"openat2":          openFolder,
	"before Linux 5.6": openFolderByMount,
}

// Something is mounted while the tree is being removed.
func TestTearDownMountMeanwhile(t *testing.T) {
	for name, open := range openers {
		t.Run(name, func(t *testing.T) {
			was := openFolder
			openFolder = open
			t.Cleanup(func() { openFolder = was })
			v, pod, _ := setUpFull(t)
			host := filepath.Join(filepath.Dir(v.cfg.Dir), "host")
			write(t, host+"/precious", "x")
			disk := v.path(pod, &pod.Spec.Volumes[2])
			for i := range 10 {
				write(t, fmt.Sprintf("%s/%d/file", disk, i), "x")
			}
			mounted := ""
			onStep(t, func(step string) {
				left, _ := filepath.Glob(disk + "/[0-9]")
				if step == "removed" && mounted == "" && len(left) > 0 && len(left) < 10 {
					mounted = left[len(left)/2]
					if err := unix.Mount(host, mounted, "", unix.MS_BIND, ""); err != nil {
						t.Error(err)
					}
				}
			})
			err := v.TearDown(t.Context(), uid)
			if mounted == "" || err == nil || !strings.Contains(err.Error(), "still a mount point") {
				t.Errorf("mounted at %q, got %v", mounted, err)
			}
			if err := v.TearDown(t.Context(), uid); err != nil {
				t.Error(err)
			}
			nothingLeft(t, v)
			if got := read(t, host+"/precious"); got != "x" {
				t.Errorf("the host's: %q", got)
			}
		})
	}
}

// A program that is still there swaps a folder for a link to the host's, just
// before it is entered.
func TestTearDownSwap(t *testing.T) {
	for name, open := range openers {
		for depth, folder := range []string{"a", "a/b", "a/b/c"} {
			t.Run(name+" "+folder, func(t *testing.T) {
				was := openFolder
				openFolder = open
				t.Cleanup(func() { openFolder = was })
				dir, host := t.TempDir(), t.TempDir()
				write(t, host+"/precious", "x")
				write(t, dir+"/a/b/c/file", "x")
				found := 0
				onStep(t, func(step string) {
					if step != "folder found" {
						return
					}
					if found++; found == depth+1 {
						if err := errors.Join(os.Rename(dir+"/"+folder, dir+"/was"), os.Symlink(host, dir+"/"+folder)); err != nil {
							t.Error(err)
						}
					}
				})
				_ = removeTree(t.Context(), dir, "a") // refused, or the link is removed
				if got := read(t, host+"/precious"); got != "x" || found <= depth {
					t.Errorf("the host's: %q, %d found", got, found)
				}
				if err := removeTree(t.Context(), dir, "a"); err != nil {
					t.Fatal(err)
				}
				if _, err := os.Lstat(dir + "/a"); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("left: %v", err)
				}
			})
		}
	}
}

// Folders in folders, more than a process may have open and longer than a path may be.
func TestTearDownDeep(t *testing.T) {
	v, pod, _ := setUpFull(t)
	fd := must[int](t)(unix.Open(v.path(pod, &pod.Spec.Volumes[2]), unix.O_PATH, 0))
	name := strings.Repeat("d", 200)
	for i := range 1000 {
		if err := errors.Join(unix.Mkdirat(fd, name, 0o700), unix.Mknodat(fd, "file", unix.S_IFREG|0o400, 0)); err != nil {
			t.Fatal(i, err)
		}
		next := must[int](t)(unix.Openat(fd, name, unix.O_PATH, 0))
		_ = unix.Close(fd)
		fd = next
	}
	_ = unix.Close(fd)
	if _, err := v.Usage(uid); err != nil {
		t.Error(err)
	}
	var lim, small unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	small = unix.Rlimit{Cur: 256, Max: lim.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &small); err != nil {
		t.Fatal(err)
	}
	err := v.TearDown(t.Context(), uid)
	if err := errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, v)
}

func TestTearDownEnds(t *testing.T) {
	v, _, _ := setUpFull(t)
	ctx, cancel := context.WithCancel(t.Context())
	steps := 0
	onStep(t, func(step string) {
		if steps++; steps == 8 {
			cancel()
		}
	})
	if err := v.TearDown(ctx, uid); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := v.TearDown(t.Context(), uid); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, v)
}

// A file that cannot be removed is named.
func TestTearDownImmutable(t *testing.T) {
	v, pod, _ := setUpFull(t)
	name := v.path(pod, &pod.Spec.Volumes[2]) + "/fixed"
	write(t, name, "x")
	f := must[*os.File](t)(os.Open(name))
	defer func() { _ = f.Close() }()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|0x10 /* FS_IMMUTABLE_FL */))
	}
	if err != nil {
		t.Skip("the file system knows no immutable files: ", err)
	}
	err = v.TearDown(t.Context(), uid)
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "fixed") {
		t.Errorf("got %v", err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)); err != nil {
		t.Fatal(err)
	}
	if err := v.TearDown(t.Context(), uid); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, v)
}
