package volume

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"
)

func TestEmptyDir(t *testing.T) {
	quantity := func(s string) *resource.Quantity { return ptr.To(resource.MustParse(s)) }
	for _, c := range []struct {
		name   string
		source corev1.EmptyDirVolumeSource
		group  *int64
		want   string
	}{
		{"disk", corev1.EmptyDirVolumeSource{}, nil, "0777 0:0"},
		{"disk of a group", corev1.EmptyDirVolumeSource{SizeLimit: quantity("1Mi")}, ptr.To[int64](3000), "2777 0:3000"},
		{"disk, mode", corev1.EmptyDirVolumeSource{Mode: ptr.To[int32](0o1700)}, nil, "1700 0:0"},
		{"memory", corev1.EmptyDirVolumeSource{Medium: "Memory"}, nil, "1777 0:0 1073741824"},
		{"memory of a group", corev1.EmptyDirVolumeSource{Medium: "Memory", SizeLimit: quantity("64Mi")}, ptr.To[int64](3000), "3777 0:3000 67108864"},
		{"more memory than there is", corev1.EmptyDirVolumeSource{Medium: "Memory", SizeLimit: quantity("4Gi")}, nil, "1777 0:0 1073741824"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVolumes(t, t.TempDir(), &objects{})
			pod := podWith(vol("v", corev1.VolumeSource{EmptyDir: &c.source}))
			pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: c.group}
			dir := v.path(pod, &pod.Spec.Volumes[0])
			look := func() string {
				var st unix.Stat_t
				var fs unix.Statfs_t
				if err := errors.Join(unix.Lstat(dir, &st), unix.Statfs(dir, &fs)); err != nil {
					t.Fatal(err)
				}
				got := fmt.Sprintf("%04o %d:%d", st.Mode&0o7777, st.Uid, st.Gid)
				if must[bool](t)(isMounted(dir, unix.TMPFS_MAGIC)) {
					got += fmt.Sprintf(" %d", int64(fs.Blocks)*fs.Bsize)
				}
				return got
			}
			if err := v.SetUp(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			if got := look(); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			// What the containers make of it stays, and there is one mount.
			write(t, dir+"/kept", "x")
			if err := errors.Join(unix.Chmod(dir, 0o700), os.Chown(dir, 7, 8)); err != nil {
				t.Fatal(err)
			}
			if err := v.SetUp(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			if got := look(); !strings.HasPrefix(got, "0700 7:8") || read(t, dir+"/kept") != "x" {
				t.Errorf("after another SetUp: %s", got)
			}
			if got, want := len(mountsBelow(t, v.cfg.Dir)), strings.Count(c.want, " ")-1; got != want {
				t.Errorf("%d mounts, want %d", got, want)
			}
		})
	}
}

func TestTmpfsSize(t *testing.T) {
	v := &Volumes{cfg: testConfig(t.TempDir(), nil)}
	limit := func(s string) corev1.Container {
		c := corev1.Container{}
		if s != "" {
			c.Resources.Limits = corev1.ResourceList{"memory": resource.MustParse(s)}
		}
		return c
	}
	for _, c := range []struct {
		name       string
		containers []corev1.Container
		init       []corev1.Container
		pod        string
		limit      string
		want       string
	}{
		{name: "the node's", containers: []corev1.Container{limit("")}, want: "1Gi"},
		{name: "the pod's", containers: []corev1.Container{limit("100Mi"), limit("28Mi")}, want: "128Mi"},
		{name: "one container without", containers: []corev1.Container{limit("100Mi"), limit("")}, want: "1Gi"},
		{name: "one init container without", containers: []corev1.Container{limit("100Mi")}, init: []corev1.Container{limit("")}, want: "1Gi"},
		{name: "an init container with more", containers: []corev1.Container{limit("100Mi")}, init: []corev1.Container{limit("200Mi")}, want: "200Mi"},
		{name: "a pod-level limit", containers: []corev1.Container{limit("")}, pod: "300Mi", want: "300Mi"},
		{name: "more than the node has", containers: []corev1.Container{limit("2Gi")}, want: "1Gi"},
		{name: "the volume's", containers: []corev1.Container{limit("100Mi")}, limit: "10Mi", want: "10Mi"},
		{name: "the volume's is more", containers: []corev1.Container{limit("100Mi")}, limit: "101Mi", want: "100Mi"},
		{name: "the volume's is nothing", containers: []corev1.Container{limit("100Mi")}, limit: "0", want: "100Mi"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: c.containers, InitContainers: c.init}}
			if c.pod != "" {
				pod.Spec.Resources = &corev1.ResourceRequirements{Limits: corev1.ResourceList{"memory": resource.MustParse(c.pod)}}
			}
			var q *resource.Quantity
			if c.limit != "" {
				q = ptr.To(resource.MustParse(c.limit))
			}
			want := resource.MustParse(c.want)
			if got := v.tmpfsSize(pod, q); got != want.Value() {
				t.Errorf("got %d, want %s", got, c.want)
			}
		})
	}
	v.cfg.Allocatable = nil
	if got := v.tmpfsSize(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{limit("")}}}, nil); got != 0 {
		t.Errorf("nothing known: %d", got)
	}
}

func TestHugePages(t *testing.T) {
	asks := func(names ...corev1.ResourceName) *corev1.Pod {
		pod := podWith()
		pod.Spec.Containers[0].Resources.Requests = corev1.ResourceList{}
		for _, n := range names {
			pod.Spec.Containers[0].Resources.Requests[n] = resource.MustParse("4Mi")
		}
		return pod
	}
	for _, c := range []struct {
		pod    *corev1.Pod
		medium corev1.StorageMedium
		want   string
	}{
		{asks("hugepages-2Mi"), "HugePages", "2097152"},
		{asks("hugepages-2Mi", "hugepages-1Gi"), "HugePages-1Gi", "1073741824"},
		{asks("hugepages-2Mi", "hugepages-1Gi"), "HugePages", "medium: HugePages can't be used if container requests multiple huge page sizes"},
		{asks("cpu"), "HugePages", "medium HugePages: hugePages storage requested, but there is no resource request for huge pages"},
		{asks("hugepages-2Mi"), "HugePages-1Gi", "medium HugePages-1Gi: hugePages storage requested, but there is no resource request for huge pages"},
	} {
		size, err := pageSize(c.pod, c.medium)
		got := strconv.FormatInt(size, 10)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%s: got %s, want %s", c.medium, got, c.want)
		}
	}

	v := newVolumes(t, t.TempDir(), &objects{})
	if sizes := must[[]string](t)(filepath.Glob("/sys/kernel/mm/hugepages/hugepages-2048kB")); len(sizes) == 0 {
		t.Skip("the kernel has no huge pages of 2 MiB")
	}
	pod := asks("hugepages-2Mi")
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: ptr.To[int64](3000)}
	pod.Spec.Volumes = []corev1.Volume{vol("v", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: "HugePages"}})}
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/v"}}
	for range 2 {
		if err := v.SetUp(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
	}
	dir := v.path(pod, &pod.Spec.Volumes[0])
	if got, want := tree(t, dir), "2775 0:3000 ./\n"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if at := mountsBelow(t, v.cfg.Dir); len(at) != 1 || !must[bool](t)(isMounted(dir, unix.HUGETLBFS_MAGIC)) {
		t.Errorf("mounts: %v", at)
	}
	// Pages of another size than what is there.
	pod.Spec.Volumes[0].EmptyDir.Medium = "HugePages-1Gi"
	pod.Spec.Containers[0].Resources.Requests["hugepages-1Gi"] = resource.MustParse("1Gi")
	if err := v.SetUp(t.Context(), pod); err == nil || !strings.Contains(err.Error(), "is mounted with pages of 2097152 bytes, medium HugePages-1Gi wants 1073741824") {
		t.Errorf("got %v", err)
	}
}

func TestUsage(t *testing.T) {
	o := &objects{maps: map[string]map[string]string{"conf": {"a": strings.Repeat("x", 10000)}}, secrets: map[string]map[string]string{"tls": {"a": "x"}}}
	v := newVolumes(t, t.TempDir(), o)
	pod := podWith(
		vol("disk", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}),
		vol("memory", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: "Memory"}}),
		vol("conf", corev1.VolumeSource{ConfigMap: configMap("conf")}),
		vol("tls", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls"}}),
	)
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	path := func(i int) string { return v.path(pod, &pod.Spec.Volumes[i]) }
	big := t.TempDir() + "/big"
	write(t, big, strings.Repeat("x", 5<<20))
	disk := path(0)
	write(t, disk+"/a/b/file", strings.Repeat("x", 1<<20))
	if err := errors.Join(os.Link(disk+"/a/b/file", disk+"/same"), os.Symlink(big, disk+"/link"), os.Symlink(filepath.Dir(big), disk+"/dirlink"),
		os.WriteFile(disk+"/sparse", nil, 0o600), os.Truncate(disk+"/sparse", 1<<30), unix.Mkfifo(disk+"/fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	write(t, path(1)+"/file", strings.Repeat("x", 3<<20))

	du := func(dir, flag string) int64 { // what others say
		out, err := exec.Command("du", "-s", flag, dir).Output()
		if err != nil {
			t.Fatal(err)
		}
		return must[int64](t)(strconv.ParseInt(strings.Fields(string(out))[0], 10, 64))
	}
	want := map[string]Used{
		"disk":   {Bytes: du(disk, "--block-size=1"), Inodes: du(disk, "--inodes")},
		"conf":   {Bytes: du(path(2), "--block-size=1"), Inodes: du(path(2), "--inodes")},
		"memory": {Bytes: 3 << 20, Inodes: 2, Memory: true},
	}
	got := must[map[string]Used](t)(v.Usage(uid))
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	for name, w := range want {
		if got[name] != w {
			t.Errorf("%s: got %+v, want %+v", name, got[name], w)
		}
	}
	// A mount in the volume is not the volume's.
	if err := errors.Join(os.Mkdir(disk+"/m", 0o755), unix.Mount(filepath.Dir(big), disk+"/m", "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	if again := must[map[string]Used](t)(v.Usage(uid)); again["disk"].Bytes != got["disk"].Bytes {
		t.Errorf("with a mount: %+v, without: %+v", again["disk"], got["disk"])
	}
	if none := must[map[string]Used](t)(v.Usage("none")); len(none) > 0 {
		t.Errorf("of no pod: %v", none)
	}
}
