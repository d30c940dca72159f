package volume

import (
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"

	"github.com/fairlead-io/fairlead/edge/pods/cri"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// What a container under a real containerd sees of its volumes, as a user who is not
// root, before and after a change.
func TestContainer(t *testing.T) {
	rt := testruntime.Start(t)
	client, err := cri.Dial(rt.Socket, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	host := t.TempDir()
	write(t, host+"/recipe", "7")
	o := &objects{
		maps:    map[string]map[string]string{"conf": {"a.conf": "A", "b.conf": "B"}},
		secrets: map[string]map[string]string{"tls": {"key": "K"}},
		tokens:  map[string]token{"": {"tok", time.Now().Add(time.Hour)}},
	}
	v := newVolumes(t, t.TempDir(), o)
	empty := func(medium corev1.StorageMedium) corev1.VolumeSource {
		return corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}}
	}
	pod := podWith(
		vol("conf", corev1.VolumeSource{ConfigMap: configMap("conf")}),
		vol("tls", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls", DefaultMode: ptr.To[int32](0o400)}}),
		vol("token", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}}}}}),
		vol("disk", empty("")), vol("memory", empty("Memory")),
		vol("host", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: host, Type: ptr.To(corev1.HostPathDirectory)}}),
	)
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: ptr.To[int64](1000), FSGroup: ptr.To[int64](3000)}
	c := &pod.Spec.Containers[0]
	c.VolumeMounts = append(c.VolumeMounts,
		corev1.VolumeMount{Name: "memory", MountPath: "/conf/below"},
		corev1.VolumeMount{Name: "conf", MountPath: "/single", SubPath: "a.conf"},
		corev1.VolumeMount{Name: "disk", MountPath: "/sub", SubPath: "made/here"},
	)
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	hosts := must[string](t)(v.Hosts(pod, []string{"10.88.0.7"}, "press", ""))
	mounts := must[[]*runtimeapi.Mount](t)(v.Mounts(MountInput{Pod: pod, Container: c, Hosts: hosts}))
	message := mounts[len(mounts)-1].HostPath

	sandboxConfig := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: pod.Name, Namespace: pod.Namespace, Uid: string(uid)},
		LogDirectory: filepath.Join(rt.Dir, "logs"),
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: rt.Cgroup + "/press"},
	}
	sandbox := must[string](t)(client.RunPodSandbox(t.Context(), sandboxConfig, ""))
	id := must[string](t)(client.CreateContainer(t.Context(), sandbox, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
		Image:    &runtimeapi.ImageSpec{Image: testruntime.Busybox},
		Command:  []string{"sleep", "1000"},
		LogPath:  "main.log",
		Mounts:   mounts,
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			RunAsUser: &runtimeapi.Int64Value{Value: 1000}, RunAsGroup: &runtimeapi.Int64Value{Value: 1000}, SupplementalGroups: []int64{3000}}},
	}, sandboxConfig))
	if err := client.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	sh := func(script string) string {
		t.Helper()
		r, err := client.ExecSync(t.Context(), id, []string{"sh", "-c", script}, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return string(r.Stdout) + string(r.Stderr)
	}
	const look = `id -u
cat /conf/a.conf /conf/b.conf /tls/key /token/token /single /host/recipe; echo
stat -f -c '%n %T' /tls /token /memory
stat -c '%n %a %u:%g' /conf /conf/..data/a.conf /tls/..data/key /token/..data/token /disk /memory /sub
for f in /conf/x /tls/x /token/x /single; do (echo x > $f) 2>/dev/null && echo "$f can be written"; done
echo 1 > /disk/f; echo 2 > /memory/f; echo 3 > /sub/f; cat /disk/made/here/f /conf/below/f
stat -c '%n %u:%g' /disk/f /sub/f
tail -n 1 /etc/hosts
echo -n done > /dev/termination-log`
	want := `1000
ABKtokA7
/tls tmpfs
/token tmpfs
/memory tmpfs
/conf 2777 0:3000
/conf/..data/a.conf 644 0:3000
/tls/..data/key 440 0:3000
/token/..data/token 640 1000:3000
/disk 2777 0:3000
/memory 3777 0:3000
/sub 2777 0:3000
3
2
/disk/f 1000:3000
/sub/f 1000:3000
10.88.0.7	press
`
	if diff := cmp.Diff(want, sh(look)); diff != "" {
		t.Error(diff)
	}
	if got := read(t, message); got != "done" {
		t.Errorf("termination message %q", got)
	}

	o.maps["conf"] = map[string]string{"a.conf": "A2", "c.conf": "C2"}
	o.secrets["tls"] = map[string]string{"key": "K2"}
	o.tokens[""] = token{"tok2", time.Now().Add(time.Hour)}
	if _, err := v.Update(pod); err != nil {
		t.Fatal(err)
	}
	want = "A2C2K2tok2A\n/conf/a.conf\n/conf/c.conf\n"
	if diff := cmp.Diff(want, sh("cat /conf/a.conf /conf/c.conf /tls/key /token/token /single; echo; ls -d /conf/*.conf")); diff != "" {
		t.Error(diff)
	}
	// A link to the host, planted by the container, is not what its next instance gets.
	sh("ln -s " + host + " /disk/planted; ln -s /etc /disk/made/etc")
	for _, sub := range []string{"planted", "made/etc", "planted/new"} {
		next := *c
		next.VolumeMounts = []corev1.VolumeMount{{Name: "disk", MountPath: "/x", SubPath: sub}}
		if m, err := v.Mounts(MountInput{Pod: pod, Container: &next}); err == nil {
			t.Errorf("%s: got %v", sub, m)
		}
	}

	// Even while the container is there, the host is rid of all.
	if err := v.TearDown(t.Context(), uid); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, v)
	if got := sh("cat /tls/key /host/recipe"); got != "K27" {
		t.Errorf("the container now has %q", got)
	}
	if err := client.StopPodSandbox(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	if err := client.RemovePodSandbox(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	if got := read(t, host+"/recipe"); got != "7" {
		t.Errorf("the host's: %q", got)
	}
}
