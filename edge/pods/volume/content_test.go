package volume

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-io/fairlead/edge/pods/source"
)

func configMap(name string, items ...corev1.KeyToPath) *corev1.ConfigMapVolumeSource {
	return &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Items: items, DefaultMode: ptr.To[int32](0o644)}
}

func key(key, path string, mode *int32) corev1.KeyToPath {
	return corev1.KeyToPath{Key: key, Path: path, Mode: mode}
}

func TestContent(t *testing.T) {
	expires := time.Now().Add(time.Hour)
	o := &objects{
		maps:    map[string]map[string]string{"conf": {"a.conf": "A", "b.conf": "B"}, "other": {"c": "C"}},
		secrets: map[string]map[string]string{"tls": {"tls.key": "K", "tls.crt": "T"}},
		tokens:  map[string]token{"": {"tok", expires}, "vault": {"vtok", expires}},
	}
	token := func(path, audience string) corev1.VolumeProjection {
		return corev1.VolumeProjection{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: path, Audience: audience, ExpirationSeconds: ptr.To[int64](3607)}}
	}
	projected := func(s ...corev1.VolumeProjection) corev1.VolumeSource {
		return corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{DefaultMode: ptr.To[int32](0o644), Sources: s}}
	}
	group := func(p *corev1.Pod) { p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: ptr.To[int64](3000)} }
	for _, c := range []struct {
		name   string
		volume corev1.VolumeSource
		change func(*corev1.Pod)
		memory bool
		want   string
	}{{
		name:   "config map, all keys",
		volume: corev1.VolumeSource{ConfigMap: configMap("conf")},
		want: `0777 0:0 ./
0755 0:0 ..stamp/
0644 0:0 ..stamp/a.conf "A"
0644 0:0 ..stamp/b.conf "B"
0777 0:0 ..data -> ..stamp
0777 0:0 a.conf -> ..data/a.conf
0777 0:0 b.conf -> ..data/b.conf
`,
	}, {
		name:   "config map, items below folders, modes",
		volume: corev1.VolumeSource{ConfigMap: configMap("conf", key("a.conf", "x/y/a", ptr.To[int32](0o400)), key("b.conf", "x/b", nil))},
		want: `0777 0:0 ./
0755 0:0 ..stamp/
0755 0:0 ..stamp/x/
0644 0:0 ..stamp/x/b "B"
0755 0:0 ..stamp/x/y/
0400 0:0 ..stamp/x/y/a "A"
0777 0:0 ..data -> ..stamp
0777 0:0 x -> ..data/x
`,
	}, {
		name:   "an optional config map that is not there",
		volume: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "no"}, Optional: ptr.To(true)}},
		want:   "0777 0:0 ./\n0755 0:0 ..stamp/\n0777 0:0 ..data -> ..stamp\n",
	}, {
		name: "an optional key that is not there",
		volume: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}, Optional: ptr.To(true),
			Items: []corev1.KeyToPath{key("no", "no", nil), key("a.conf", "a", nil)}}},
		want: "0777 0:0 ./\n0755 0:0 ..stamp/\n0644 0:0 ..stamp/a \"A\"\n0777 0:0 ..data -> ..stamp\n0777 0:0 a -> ..data/a\n",
	}, {
		name:   "config map of a group",
		volume: corev1.VolumeSource{ConfigMap: configMap("other", key("c", "c", ptr.To[int32](0o400)))},
		change: group,
		want: `2777 0:3000 ./
2755 0:3000 ..stamp/
0440 0:3000 ..stamp/c "C"
0777 0:3000 ..data -> ..stamp
0777 0:3000 c -> ..data/c
`,
	}, {
		name:   "secret",
		volume: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls", DefaultMode: ptr.To[int32](0o400)}},
		memory: true,
		want: `1777 0:0 ./
0755 0:0 ..stamp/
0400 0:0 ..stamp/tls.crt "T"
0400 0:0 ..stamp/tls.key "K"
0777 0:0 ..data -> ..stamp
0777 0:0 tls.crt -> ..data/tls.crt
0777 0:0 tls.key -> ..data/tls.key
`,
	}, {
		name: "projected: all sources, a later one wins",
		volume: projected(token("token", ""), token("vault/token", "vault"),
			corev1.VolumeProjection{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "other"}}},
			corev1.VolumeProjection{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "tls"}, Items: []corev1.KeyToPath{key("tls.crt", "c", ptr.To[int32](0o600))}}},
			corev1.VolumeProjection{DownwardAPI: &corev1.DownwardAPIProjection{Items: []corev1.DownwardAPIVolumeFile{{Path: "namespace", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.namespace"}}}}},
			corev1.VolumeProjection{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{Path: "roots", Optional: ptr.To(true)}}),
		memory: true,
		want: `1777 0:0 ./
0755 0:0 ..stamp/
0600 0:0 ..stamp/c "T"
0644 0:0 ..stamp/namespace "line"
0644 0:0 ..stamp/roots ""
0644 0:0 ..stamp/token "tok"
0755 0:0 ..stamp/vault/
0644 0:0 ..stamp/vault/token "vtok"
0777 0:0 ..data -> ..stamp
0777 0:0 c -> ..data/c
0777 0:0 namespace -> ..data/namespace
0777 0:0 roots -> ..data/roots
0777 0:0 token -> ..data/token
0777 0:0 vault -> ..data/vault
`,
	}, {
		name:   "a token of a pod with one user is that user's alone",
		volume: projected(token("token", "")),
		change: func(p *corev1.Pod) {
			p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: ptr.To[int64](1000)}
		},
		memory: true,
		want:   "1777 0:0 ./\n0755 0:0 ..stamp/\n0600 1000:0 ..stamp/token \"tok\"\n0777 0:0 ..data -> ..stamp\n0777 1000:0 token -> ..data/token\n",
	}, {
		name:   "a token of a pod with two users and a group is the group's",
		volume: projected(token("token", "")),
		change: func(p *corev1.Pod) {
			group(p)
			p.Spec.InitContainers = []corev1.Container{{Name: "init", SecurityContext: &corev1.SecurityContext{RunAsUser: ptr.To[int64](1)}}}
			p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{RunAsUser: ptr.To[int64](2)}
		},
		memory: true,
		want:   "3777 0:3000 ./\n2755 0:3000 ..stamp/\n0640 0:3000 ..stamp/token \"tok\"\n0777 0:3000 ..data -> ..stamp\n0777 0:3000 token -> ..data/token\n",
	}, {
		name: "downward API",
		volume: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			field("labels", "metadata.labels"), field("a", "metadata.labels['a']"), field("none", "metadata.labels['none']"), field("note", "metadata.annotations['note']"),
			field("annotations", "metadata.annotations"), field("name", "metadata.name"), field("uid", "metadata.uid"),
			quantity("cpu", "limits.cpu", ""), quantity("milli", "limits.cpu", "1m"), quantity("memory", "limits.memory", "1Mi"), quantity("disk", "limits.ephemeral-storage", "1Gi"),
			quantity("asked", "requests.cpu", "1m"), quantity("huge", "limits.hugepages-2Mi", "1Mi"),
		}}},
		change: func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = corev1.ResourceRequirements{
				Limits:   corev1.ResourceList{"memory": resource.MustParse("10500Ki"), "hugepages-2Mi": resource.MustParse("4Mi")},
				Requests: corev1.ResourceList{"cpu": resource.MustParse("250m")},
			}
		},
		want: `0777 0:0 ./
0755 0:0 ..stamp/
0644 0:0 ..stamp/a "say \"1\""
0644 0:0 ..stamp/annotations "note=\"x\\ny\""
0644 0:0 ..stamp/asked "250"
0644 0:0 ..stamp/cpu "4"
0644 0:0 ..stamp/disk "10"
0644 0:0 ..stamp/huge "4"
0644 0:0 ..stamp/labels "a=\"say \\\"1\\\"\"\nb=\"2\""
0644 0:0 ..stamp/memory "11"
0644 0:0 ..stamp/milli "3500"
0644 0:0 ..stamp/name "press"
0644 0:0 ..stamp/none ""
0644 0:0 ..stamp/note "x\ny"
0644 0:0 ..stamp/uid "5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11"
0777 0:0 ..data -> ..stamp
0777 0:0 a -> ..data/a
0777 0:0 annotations -> ..data/annotations
0777 0:0 asked -> ..data/asked
0777 0:0 cpu -> ..data/cpu
0777 0:0 disk -> ..data/disk
0777 0:0 huge -> ..data/huge
0777 0:0 labels -> ..data/labels
0777 0:0 memory -> ..data/memory
0777 0:0 milli -> ..data/milli
0777 0:0 name -> ..data/name
0777 0:0 none -> ..data/none
0777 0:0 note -> ..data/note
0777 0:0 uid -> ..data/uid
`,
	}, {
		name:   "mount points of other volumes below",
		volume: corev1.VolumeSource{ConfigMap: configMap("other")},
		change: func(p *corev1.Pod) {
			for _, at := range []string{"/v/nested", "/v/nested/deeper", "/v/nested-2", "/w"} {
				p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "e", MountPath: at})
			}
			p.Spec.Volumes = append(p.Spec.Volumes, vol("e", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}))
		},
		want: `0777 0:0 ./
0755 0:0 ..stamp/
0644 0:0 ..stamp/c "C"
0777 0:0 ..data -> ..stamp
0777 0:0 c -> ..data/c
0755 0:0 nested/
0755 0:0 nested-2/
`,
	}} {
		t.Run(c.name, func(t *testing.T) {
			v := newVolumes(t, t.TempDir(), o)
			pod := podWith(vol("v", c.volume))
			if c.change != nil {
				c.change(pod)
			}
			dir := v.path(pod, &pod.Spec.Volumes[0])
			for range 2 { // the second time nothing changes
				if err := v.SetUp(t.Context(), pod); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(c.want, tree(t, dir)); diff != "" {
					t.Error(diff)
				}
			}
			if is := must[bool](t)(isMounted(dir, unix.TMPFS_MAGIC)); is != c.memory {
				t.Errorf("in memory: %v, want %v", is, c.memory)
			}
			if !c.memory {
				return
			}
			// Nothing of it is on the disk below.
			if err := unix.Unmount(dir, 0); err != nil {
				t.Fatal(err)
			}
			if left := must[[]os.DirEntry](t)(os.ReadDir(dir)); len(left) > 0 {
				t.Errorf("on disk: %v", left)
			}
		})
	}
}

func field(path, field string) corev1.DownwardAPIVolumeFile {
	return corev1.DownwardAPIVolumeFile{Path: path, FieldRef: &corev1.ObjectFieldSelector{FieldPath: field}}
}

func quantity(path, res, divisor string) corev1.DownwardAPIVolumeFile {
	ref := &corev1.ResourceFieldSelector{ContainerName: "main", Resource: res}
	if divisor != "" {
		ref.Divisor = resource.MustParse(divisor)
	}
	return corev1.DownwardAPIVolumeFile{Path: path, ResourceFieldRef: ref}
}

func TestWaiting(t *testing.T) {
	o := &objects{maps: map[string]map[string]string{"conf": {"a": "A"}}, secrets: map[string]map[string]string{"tls": {}}}
	down := func(f corev1.DownwardAPIVolumeFile) corev1.VolumeSource {
		return corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{f}}}
	}
	no := corev1.LocalObjectReference{Name: "no"}
	for _, c := range []struct {
		name   string
		volume corev1.VolumeSource
		want   string
		absent bool // what it waits for may still come
	}{
		{"config map", corev1.VolumeSource{ConfigMap: configMap("no")}, `configmap "no" not found`, true},
		{"key of it", corev1.VolumeSource{ConfigMap: configMap("conf", key("no", "x", nil))}, `configmap references non-existent config key: no`, false},
		{"path outside", corev1.VolumeSource{ConfigMap: configMap("conf", key("a", "../x", nil))}, `invalid path: must not contain '..': ../x`, false},
		{"path of ours", corev1.VolumeSource{ConfigMap: configMap("conf", key("a", "..data", nil))}, `invalid path: must not start with '..': ..data`, false},
		{"secret", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "no"}}, `secret "no" not found`, true},
		{"key of it", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls", Items: []corev1.KeyToPath{key("no", "x", nil)}}}, `references non-existent secret key: no`, false},
		{"two of a projected volume", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: no}}, {Secret: &corev1.SecretProjection{LocalObjectReference: no}}}}}, `[configmap "no" not found, secret "no" not found]`, true},
		{"token", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}}}}}, `token of pod "press" not found`, true},
		{"trust bundle", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{Path: "roots"}}}}}, `an edge node has no cluster trust bundles (file roots)`, false},
		{"pod certificate", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{PodCertificate: &corev1.PodCertificateProjection{}}}}}, `an edge node has no pod certificates`, false},
		{"field", down(field("x", "status.podIP")), `unsupported fieldPath: status.podIP`, false},
		{"subscript", down(field("x", "metadata.name['x']")), `fieldPath "metadata.name['x']" does not support subscript`, false},
		{"container", down(corev1.DownwardAPIVolumeFile{Path: "x", ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: "no", Resource: "limits.cpu"}}), `container no not found`, false},
		{"resource", down(quantity("x", "limits.example.com/gpu", "")), `unsupported container resource : limits.example.com/gpu`, false},
		{"claim", corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "x"}},
			`an edge node does not serve volumes of type persistentVolumeClaim; it serves configMap, downwardAPI, emptyDir, hostPath, image, projected and secret`, false},
		{"nfs", corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{}}, `an edge node does not serve volumes of type nfs; it serves configMap, downwardAPI, emptyDir, hostPath, image, projected and secret`, false},
		{"image", corev1.VolumeSource{Image: &corev1.ImageVolumeSource{}}, `the container runtime of this node does not mount images (containerd does from 2.1 on, CRI-O from 1.31)`, false},
		{"medium", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: "Paper"}}, `unknown storage medium "Paper"`, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVolumes(t, t.TempDir(), o)
			// One volume does not wait for another.
			pod := podWith(vol("v", c.volume), vol("good", corev1.VolumeSource{ConfigMap: configMap("conf")}), vol("v2", c.volume))
			pod.Spec.Volumes = append(pod.Spec.Volumes, vol("unused", corev1.VolumeSource{ConfigMap: configMap("never")}))
			err := v.SetUp(t.Context(), pod)
			missing := Missing(fmt.Errorf("volumes: %w", err))
			if len(missing) != 2 || missing[0].Volume != "v" || missing[1].Volume != "v2" {
				t.Fatalf("missing %v of %v", missing, err)
			}
			if want := `MountVolume.SetUp failed for volume "v" : ` + c.want; missing[0].Message != want {
				t.Errorf("got  %s\nwant %s", missing[0].Message, want)
			}
			if errors.Is(err, source.ErrNotFound) != c.absent {
				t.Errorf("ErrNotFound: %v", !c.absent)
			}
			if _, err := os.Stat(v.path(pod, &pod.Spec.Volumes[1]) + "/a"); err != nil {
				t.Error(err)
			}
		})
	}
}

// A running pod's volumes follow what has changed, and keep what cannot be had.
func TestUpdate(t *testing.T) {
	o := &objects{
		maps:    map[string]map[string]string{"conf": {"old": "1", "both": "1"}},
		secrets: map[string]map[string]string{"tls": {"key": "1"}},
		tokens:  map[string]token{"": {"first", time.Now().Add(time.Hour)}},
	}
	v := newVolumes(t, t.TempDir(), o)
	pod := podWith(
		vol("conf", corev1.VolumeSource{ConfigMap: configMap("conf")}),
		vol("tls", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "tls"}}),
		vol("down", corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{field("labels", "metadata.labels")}}}),
		vol("token", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "a/token", ExpirationSeconds: ptr.To[int64](3600)}}}}}),
		vol("empty", corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}),
	)
	if err := v.SetUp(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	read := func(volume int, name string) string {
		data, err := os.ReadFile(v.path(pod, &pod.Spec.Volumes[volume]) + "/" + name)
		if errors.Is(err, os.ErrNotExist) {
			return "-"
		}
		return string(must[[]byte](t)(data, err))
	}
	expect := func(want string) {
		t.Helper()
		got := strings.Join([]string{read(0, "old"), read(0, "both"), read(0, "new"), read(1, "key"), read(2, "labels"), read(3, "a/token")}, " ")
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	stamps := func() (all string) {
		for i := range 4 {
			all += must[string](t)(os.Readlink(v.path(pod, &pod.Spec.Volumes[i]) + "/" + dataLink))
		}
		return all
	}
	pod.Labels = map[string]string{"v": "1"}
	due, err := v.Update(pod)
	if err != nil {
		t.Fatal(err)
	}
	expect(`1 1 - 1 v="1" first`)
	if left := time.Until(due); left < 45*time.Minute || left > 48*time.Minute {
		t.Errorf("a token of an hour is due in %v, want 80 %% of it", left)
	}
	before := stamps()
	if _, err := v.Update(pod); err != nil || stamps() != before {
		t.Errorf("an update without news: %v, written again: %v", err, stamps() != before)
	}

	o.maps["conf"] = map[string]string{"both": "2", "new": "2"}
	o.secrets["tls"] = map[string]string{"key": "2"}
	o.tokens[""] = token{"second", time.Now().Add(-time.Minute)} // expired, yet there is nothing better
	pod.Labels = map[string]string{"v": "2"}
	if due, err = v.Update(pod); err != nil {
		t.Fatal(err)
	}
	expect(`- 2 2 2 v="2" second`)
	if left := time.Until(due); left < time.Minute || left > tokenRetry {
		t.Errorf("an expired token is looked for in %v", left)
	}

	// Offline, after a restart that has lost what was sent.
	o.maps, o.secrets, o.tokens = nil, nil, nil
	pod.Labels = map[string]string{"v": "3"}
	_, err = v.Update(pod)
	if missing := Missing(err); len(missing) != 2 || missing[0].Message != `MountVolume.SetUp failed for volume "conf" : configmap "conf" not found` {
		t.Errorf("missing: %v", err)
	}
	expect(`- 2 2 2 v="3" second`)
}
