package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/source"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(killDir); dir != "" {
		killed(dir)
		return
	}
	if dir := os.Getenv(aloneDir); dir != "" { // a process in a mount namespace of its own
		shared := uintptr(unix.MS_PRIVATE)
		if os.Getenv(aloneShared) != "" {
			shared = unix.MS_SHARED
		}
		if err := errors.Join(unix.Mount("tmpfs", dir, "tmpfs", 0, ""), unix.Mount("", dir, "", shared, "")); err != nil {
			panic(err)
		}
		fmt.Print(alone(dir, fmt.Sprintf("/proc/%d/ns/mnt", os.Getppid())))
		return
	}
	os.Exit(m.Run())
}

const (
	aloneDir    = "FAIRLEAD_VOLUME_ALONE_DIR"
	aloneShared = "FAIRLEAD_VOLUME_ALONE_SHARED"
)

// The agent knows when the runtime cannot see its mounts.
func TestAlone(t *testing.T) {
	rootOnly(t)
	for _, c := range []struct {
		flags  uintptr
		shared string
		want   bool
	}{{0, "", false}, {unix.CLONE_NEWNS, "", true}, {unix.CLONE_NEWNS, "yes", false}} {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), aloneDir+"="+dir, aloneShared+"="+c.shared)
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: c.flags}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatal(err, string(out))
		}
		if string(out) != fmt.Sprint(c.want) {
			t.Errorf("%+v: %s", c, out)
		}
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
}

const uid = types.UID("5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11")

// objects is what the cloud has sent.
type objects struct {
	mu      sync.Mutex
	maps    map[string]map[string]string
	secrets map[string]map[string]string
	tokens  map[string]token // by audience
}

type token struct {
	text    string
	expires time.Time
}

func (o *objects) ConfigMap(namespace, name string) (*corev1.ConfigMap, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	m, ok := o.maps[name]
	if !ok || namespace != "line" {
		return nil, fmt.Errorf("configmap %q %w", name, source.ErrNotFound)
	}
	return &corev1.ConfigMap{Data: m}, nil
}

func (o *objects) Secret(namespace, name string) (*corev1.Secret, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	m, ok := o.secrets[name]
	if !ok || namespace != "line" {
		return nil, fmt.Errorf("secret %q %w", name, source.ErrNotFound)
	}
	data := map[string][]byte{}
	for k, v := range m {
		data[k] = []byte(v)
	}
	return &corev1.Secret{Data: data}, nil
}

func (o *objects) Token(namespace, pod string, of types.UID, audience string, _ int64) (string, time.Time, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	t, ok := o.tokens[audience]
	if !ok || namespace != "line" || pod != "press" || of != uid {
		return "", time.Time{}, fmt.Errorf("token of pod %q %w", pod, source.ErrNotFound)
	}
	return t.text, t.expires, nil
}

// rootOnly leaves out tests that mount.
func rootOnly(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: cannot mount")
	}
}

func testConfig(dir string, o *objects) Config {
	return Config{
		Dir:     filepath.Join(dir, "pods"),
		Objects: o,
		Allocatable: func() corev1.ResourceList {
			return corev1.ResourceList{"cpu": resource.MustParse("3500m"), "memory": resource.MustParse("1Gi"), "ephemeral-storage": resource.MustParse("10Gi")}
		},
	}
}

func newVolumes(t testing.TB, dir string, o *objects) *Volumes {
	t.Helper()
	rootOnly(t)
	cfg := testConfig(dir, o)
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	v, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, m := range slices.Backward(mountsBelow(t, dir)) {
			_ = unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
	})
	return v
}

// mountsBelow is what is mounted at the folder or below it.
func mountsBelow(t testing.TB, dir string) (at []string) {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		at = append(at, i.Mountpoint)
	}
	return at
}

// podWith is a pod whose one container mounts each volume at /<its name>.
func podWith(vols ...corev1.Volume) *corev1.Pod {
	c := corev1.Container{Name: "main", TerminationMessagePath: "/dev/termination-log"}
	for _, vol := range vols {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: vol.Name, MountPath: "/" + vol.Name})
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "press", Namespace: "line", UID: uid, Labels: map[string]string{"b": "2", "a": `say "1"`}, Annotations: map[string]string{"note": "x\ny"}},
		Spec:       corev1.PodSpec{Volumes: vols, Containers: []corev1.Container{c}},
	}
}

func vol(name string, s corev1.VolumeSource) corev1.Volume {
	return corev1.Volume{Name: name, VolumeSource: s}
}

// tree lists what is at and below a folder, a line each: mode uid:gid name content.
// The folder that is named by the time is ..stamp.
func tree(t testing.TB, dir string) string {
	t.Helper()
	stamp, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil {
		stamp = "\x00"
	}
	var lines []string
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, content := must[string](t)(filepath.Rel(dir, path)), ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			content = " -> " + must[string](t)(os.Readlink(path))
		case unix.S_IFREG:
			content = fmt.Sprintf(" %q", must[[]byte](t)(os.ReadFile(path)))
		case unix.S_IFDIR:
			rel += "/"
		}
		lines = append(lines, strings.ReplaceAll(fmt.Sprintf("%04o %d:%d %s%s\n", st.Mode&0o7777, st.Uid, st.Gid, rel, content), stamp, "..stamp"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "")
}

// onStep has the function called after each step of what follows in the test.
func onStep(t testing.TB, f func(step string)) {
	t.Helper()
	reached = f
	t.Cleanup(func() { reached = func(string) {} })
}

// nothingLeft fails where there is a mount below the folder of the pods, or anything in it.
func nothingLeft(t testing.TB, v *Volumes) {
	t.Helper()
	if at := mountsBelow(t, v.cfg.Dir); len(at) > 0 {
		t.Errorf("mounts are left: %v", at)
	}
	if left := must[[]os.DirEntry](t)(os.ReadDir(v.cfg.Dir)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	return string(must[[]byte](t)(os.ReadFile(path)))
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
