package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"
)

// text writes mounts a line each, without what tests cannot know.
func text(v *Volumes, mounts []*runtimeapi.Mount) string {
	var b strings.Builder
	for _, m := range mounts {
		host := strings.ReplaceAll(m.HostPath, filepath.Join(v.cfg.Dir, string(uid)), "POD")
		host = regexp.MustCompile(`(/containers/\w+/)[0-9a-f]{8}$`).ReplaceAllString(host, "${1}HASH")
		fmt.Fprintf(&b, "%s <- %s", m.ContainerPath, host)
		if m.Image != nil {
			fmt.Fprintf(&b, " image %s %q", m.Image.Image, m.ImageSubPath)
		}
		if m.Readonly {
			b.WriteString(" ro")
		}
		if m.RecursiveReadOnly {
			b.WriteString(" recursive")
		}
		if m.Propagation != 0 {
			b.WriteString(" " + m.Propagation.String())
		}
		if m.SelinuxRelabel {
			b.WriteString(" relabel")
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func mountPod() *corev1.Pod {
	return podWith(
		vol("conf", corev1.VolumeSource{ConfigMap: configMap("conf")}),
		vol("tls", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls"}}),
		vol("empty", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}),
		vol("host", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/srv/data"}}),
		vol("model", corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "fairlead.test/model"}}),
		vol("claim", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{}}),
	)
}

var mountObjects = &objects{
	maps:    map[string]map[string]string{"conf": {"a.conf": "A"}},
	secrets: map[string]map[string]string{"tls": {"key": "K"}},
}

func TestMounts(t *testing.T) {
	v := newVolumes(t, t.TempDir(), mountObjects)
	v.cfg.RecursiveReadOnly = func(p *corev1.Pod) bool { return p.Spec.RuntimeClassName != nil }
	pod := mountPod()
	c := &pod.Spec.Containers[0]
	m := func(m corev1.VolumeMount, with ...func(*corev1.VolumeMount)) corev1.VolumeMount {
		for _, f := range with {
			f(&m)
		}
		return m
	}
	prop := func(p corev1.MountPropagationMode) func(*corev1.VolumeMount) {
		return func(m *corev1.VolumeMount) { m.MountPropagation = &p }
	}
	rro := func(p corev1.RecursiveReadOnlyMode) func(*corev1.VolumeMount) {
		return func(m *corev1.VolumeMount) { m.RecursiveReadOnly = &p }
	}
	expand := func(s string) (string, error) {
		if s == "$(NO)" {
			return "", errors.New("missing value for NO")
		}
		return strings.ReplaceAll(s, "$(POD)", "press"), nil
	}
	at := func(name, path string) corev1.VolumeMount { return corev1.VolumeMount{Name: name, MountPath: path} }
	ro := func(m *corev1.VolumeMount) { m.ReadOnly = true }
	sub := func(path string) func(*corev1.VolumeMount) {
		return func(m *corev1.VolumeMount) { m.SubPath = path }
	}
	expr := func(path string) func(*corev1.VolumeMount) {
		return func(m *corev1.VolumeMount) { m.SubPathExpr = path }
	}
	for _, c2 := range []struct {
		name   string
		mounts []corev1.VolumeMount
		class  *string
		hosts  string
		want   string
		err    string
	}{
		{name: "nothing", want: "/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "hosts", hosts: "/x/etc-hosts", want: "/etc/hosts <- /x/etc-hosts\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "hosts of its own", hosts: "/x/etc-hosts", mounts: []corev1.VolumeMount{m(at("conf", "/etc/hosts"), sub("a.conf"))},
			want: "/etc/hosts <- POD/subpaths/conf/main/0 ro\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "kinds", mounts: []corev1.VolumeMount{at("conf", "/a"), at("tls", "b"), at("empty", "/c"), m(at("empty", "/c2/"), ro), at("host", "/d"), m(at("host", "/e"), ro)},
			want: "/a <- POD/volumes/kubernetes.io~configmap/conf ro\n/b <- POD/volumes/kubernetes.io~secret/tls ro\n/c <- POD/volumes/kubernetes.io~empty-dir/empty\n" +
				"/c2 <- POD/volumes/kubernetes.io~empty-dir/empty ro\n/d <- /srv/data\n/e <- /srv/data ro\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "image", mounts: []corev1.VolumeMount{m(at("model", "/model"), sub("weights"))},
			want: "/model <-  image sha256:1 \"weights\" ro\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "sub paths", mounts: []corev1.VolumeMount{m(at("empty", "/a"), sub("x/y")), at("conf", "/b"), m(at("empty", "/c"), expr("logs/$(POD)")), m(at("empty", "/d"), sub("."))},
			want: "/a <- POD/subpaths/empty/main/0\n/b <- POD/volumes/kubernetes.io~configmap/conf ro\n/c <- POD/subpaths/empty/main/2\n/d <- POD/subpaths/empty/main/3\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "propagation", mounts: []corev1.VolumeMount{m(at("host", "/a"), prop("None")), m(at("host", "/b"), prop("HostToContainer")), m(at("host", "/c"), prop("Bidirectional"))},
			want: "/a <- /srv/data\n/b <- /srv/data PROPAGATION_HOST_TO_CONTAINER\n/c <- /srv/data PROPAGATION_BIDIRECTIONAL\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "recursive", class: ptr.To("x"), mounts: []corev1.VolumeMount{m(at("host", "/a"), ro, rro("Enabled")), m(at("host", "/b"), ro, rro("IfPossible")), m(at("host", "/c"), rro("Disabled"))},
			want: "/a <- /srv/data ro recursive\n/b <- /srv/data ro recursive\n/c <- /srv/data\n/dev/termination-log <- POD/containers/main/HASH\n"},
		{name: "recursive if possible", mounts: []corev1.VolumeMount{m(at("host", "/b"), ro, rro("IfPossible"))}, want: "/b <- /srv/data ro\n/dev/termination-log <- POD/containers/main/HASH\n"},

		{name: "no such volume", mounts: []corev1.VolumeMount{at("no", "/a")}, err: `cannot find volume "no" to mount into container "main"`},
		{name: "not served", mounts: []corev1.VolumeMount{at("claim", "/a")}, err: `cannot find volume "claim" to mount into container "main"`},
		{name: "absolute", mounts: []corev1.VolumeMount{m(at("empty", "/a"), sub("/etc"))}, err: "error SubPath `/etc` must not be an absolute path"},
		{name: "back", mounts: []corev1.VolumeMount{m(at("empty", "/a"), sub("a/../../x"))}, err: "unable to provision SubPath `a/../../x`: must not contain '..'"},
		{name: "no variable", mounts: []corev1.VolumeMount{m(at("empty", "/a"), expr("$(NO)"))}, err: "missing value for NO"},
		{name: "odd propagation", mounts: []corev1.VolumeMount{m(at("host", "/a"), prop("Sideways"))}, err: `invalid MountPropagation mode: "Sideways"`},
		{name: "recursive, writable", class: ptr.To("x"), mounts: []corev1.VolumeMount{m(at("host", "/a"), rro("Enabled"))},
			err: `failed to resolve recursive read-only mode: volume "host" requested recursive read-only mode, but it is not read-only`},
		{name: "recursive, propagated", class: ptr.To("x"), mounts: []corev1.VolumeMount{m(at("host", "/a"), ro, prop("HostToContainer"), rro("Enabled"))},
			err: `failed to resolve recursive read-only mode: volume "host" requested recursive read-only mode, but it is not compatible with propagation "HostToContainer"`},
		{name: "recursive, cannot", mounts: []corev1.VolumeMount{m(at("host", "/a"), ro, rro("Enabled"))},
			err: `failed to resolve recursive read-only mode: volume "host" requested recursive read-only mode, but it is not supported by the runtime`},
		{name: "recursive, odd", class: ptr.To("x"), mounts: []corev1.VolumeMount{m(at("host", "/a"), ro, rro("Maybe"))},
			err: `failed to resolve recursive read-only mode: unknown recursive read-only mode "Maybe"`},
	} {
		t.Run(c2.name, func(t *testing.T) {
			c.VolumeMounts = []corev1.VolumeMount{at("conf", "/x"), at("tls", "/y"), at("empty", "/z")}
			if err := v.SetUp(t.Context(), pod); err != nil {
				t.Fatal(err)
			}
			c.VolumeMounts, pod.Spec.RuntimeClassName = c2.mounts, c2.class
			mounts, err := v.Mounts(MountInput{Pod: pod, Container: c, Expand: expand, Hosts: c2.hosts, Images: map[string]*runtimeapi.ImageSpec{"model": {Image: "sha256:1"}}})
			got := ""
			if err != nil {
				got = err.Error()
			}
			if got != c2.err {
				t.Fatalf("got error %s\nwant %s", got, c2.err)
			}
			if diff := cmp.Diff(c2.want, text(v, mounts)); diff != "" {
				t.Error(diff)
			}
		})
	}
	c.VolumeMounts = []corev1.VolumeMount{at("model", "/m")}
	if _, err := v.Mounts(MountInput{Pod: pod, Container: c}); err == nil || err.Error() != `the image of volume "model", which container "main" mounts, has not been pulled` {
		t.Errorf("got %v", err)
	}
	v.selinux = true
	c.VolumeMounts = []corev1.VolumeMount{at("empty", "/a"), at("empty", "/b"), at("host", "/c")}
	want := "/a <- POD/volumes/kubernetes.io~empty-dir/empty relabel\n/b <- POD/volumes/kubernetes.io~empty-dir/empty\n/c <- /srv/data\n/etc/hosts <- /h relabel\n/dev/termination-log <- POD/containers/main/HASH relabel\n"
	if diff := cmp.Diff(want, text(v, must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: c, Hosts: "/h"})))); diff != "" {
		t.Error(diff)
	}
}

func TestMessageFile(t *testing.T) {
	v := newVolumes(t, t.TempDir(), &objects{})
	pod := podWith()
	make1 := func() string {
		t.Helper()
		mounts := must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: &pod.Spec.Containers[0]}))
		return mounts[0].HostPath
	}
	first := make1()
	if info := must[os.FileInfo](t)(os.Stat(first)); info.Mode() != 0o666 || info.Size() != 0 {
		t.Errorf("mode %v, %d bytes", info.Mode(), info.Size())
	}
	// A container that crashes again and again.
	var last string
	for i := range 3 * messageFiles {
		last = make1()
		when := time.Unix(int64(1_790_000_000+i), 0)
		if err := os.Chtimes(last, when, when); err != nil {
			t.Fatal(err)
		}
	}
	kept := must[[]string](t)(filepath.Glob(filepath.Dir(last) + "/*"))
	if len(kept) != messageFiles {
		t.Errorf("%d files are kept, want %d", len(kept), messageFiles)
	}
	if !slices.Contains(kept, last) {
		t.Error("the newest is gone")
	}
}

func TestHosts(t *testing.T) {
	dir := t.TempDir()
	v := newVolumes(t, dir, &objects{})
	v.cfg.HostsFile = dir + "/hosts"
	write(t, v.cfg.HostsFile, "127.0.0.1 localhost gateway\n")
	aliases := []corev1.HostAlias{{IP: "10.1.2.3", Hostnames: []string{"plc", "plc.plant"}}, {IP: "10.1.2.4", Hostnames: []string{"hmi"}}}
	const local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
	const aliasText = "\n# Entries added by HostAliases.\n10.1.2.3\tplc\tplc.plant\n10.1.2.4\thmi\n"
	for _, c := range []struct {
		name, domain string
		ips          []string
		hostNetwork  bool
		aliases      []corev1.HostAlias
		want         string
	}{
		{name: "no address"},
		{name: "address", ips: []string{"10.88.0.7"}, want: "# Kubernetes-managed hosts file.\n" + local + "10.88.0.7\tpress\n"},
		{name: "two, a domain and aliases", ips: []string{"10.88.0.7", "fd00::7"}, domain: "shop.line.svc.cluster.local", aliases: aliases,
			want: "# Kubernetes-managed hosts file.\n" + local + "10.88.0.7\tpress.shop.line.svc.cluster.local\tpress\nfd00::7\tpress.shop.line.svc.cluster.local\tpress\n" + aliasText},
		{name: "host network", hostNetwork: true, want: "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost gateway\n"},
		{name: "host network, aliases", hostNetwork: true, ips: []string{"192.0.2.1"}, aliases: aliases,
			want: "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost gateway\n" + aliasText},
	} {
		pod := podWith()
		pod.Spec.HostAliases, pod.Spec.HostNetwork = c.aliases, c.hostNetwork
		path := must[string](t)(v.Hosts(pod, c.ips, "press", c.domain))
		if c.want == "" {
			if path != "" {
				t.Errorf("%s: got %s", c.name, path)
			}
			continue
		}
		if got := read(t, path); got != c.want {
			t.Errorf("%s: got\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
	// Containers have the file mounted: it stays the same one, whatever they wrote.
	pod := podWith()
	path := must[string](t)(v.Hosts(pod, []string{"10.88.0.7"}, "press", ""))
	want := read(t, path)
	was := must[os.FileInfo](t)(os.Stat(path))
	for _, spoiled := range []string{"", "127.0.0.1 evil\n", strings.Repeat("x", 20000)} {
		write(t, path, spoiled)
		must[string](t)(v.Hosts(pod, []string{"10.88.0.7"}, "press", ""))
		if got := read(t, path); got != want || !os.SameFile(was, must[os.FileInfo](t)(os.Stat(path))) {
			t.Errorf("after %d bytes: got %q", len(spoiled), got)
		}
	}
}

func TestHostsDiskFull(t *testing.T) {
	rootOnly(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=65536"); err != nil {
		t.Fatal(err)
	}
	v := newVolumes(t, dir, &objects{})
	pod := podWith()
	path := must[string](t)(v.Hosts(pod, []string{"10.88.0.7"}, "press", ""))
	was := read(t, path)
	write(t, dir+"/fill", strings.Repeat("x", 56<<10))
	_ = os.WriteFile(dir+"/fill2", make([]byte, 64<<10), 0o600)
	for range 3000 {
		pod.Spec.HostAliases = append(pod.Spec.HostAliases, corev1.HostAlias{IP: "10.1.2.3", Hostnames: []string{"a", "b"}})
	}
	_, err := v.Hosts(pod, []string{"10.88.0.7"}, "press", "")
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
	if got := read(t, path); got != was {
		t.Errorf("the old file has changed: %d bytes", len(got))
	}
}
