package cloudbridge

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func podsNode() *payload.Node {
	return &payload.Node{
		Agent: "v1", OS: "linux", Arch: "arm64", CPUs: 4, MemoryBytes: 1 << 30, Pods: true, Runtime: "containerd://1.6.20",
		Capacity:    map[string]string{"cpu": "4", "memory": "1Gi", "pods": "20", "fairlead.dev/rs485": "1", "bad": "lots", "negative": "-1"},
		Allocatable: map[string]string{"cpu": "3500m", "memory": "900Mi", "pods": "20", "fairlead.dev/rs485": "1"},
		Conditions: []payload.NodeCondition{{Type: "Ready", Status: "True", Reason: "KubeletReady", Since: at - 10},
			{Type: "DiskPressure", Status: "True", Reason: "KubeletHasDiskPressure", Since: at + 5000}, {Type: "PIDPressure", Status: "False", Reason: "Enough", Since: at - 5000}},
		Addresses: []payload.NodeAddress{{Type: "InternalIP", Address: "192.0.2.1"}, {Type: "InternalIP", Address: "2001:db8::1"}, {Type: "Hostname", Address: "gw"}},
		Images:    []payload.NodeImage{{Names: []string{"fairlead.test/a:1"}, Size: 7}, {Names: []string{"fairlead.test/b:1"}, Size: 6}},
	}
}

// TestNodeStatusOfPods: the status that a node with pods has, through its life.
func TestNodeStatusOfPods(t *testing.T) {
	now := time.UnixMilli(at + 60000)
	v := nodeView{state: linkUp, node: podsNode(), since: time.UnixMilli(at)}
	prev := &corev1.NodeStatus{Capacity: corev1.ResourceList{"example.com/gpu": resource.MustParse("1"), "fairlead.dev/old": resource.MustParse("1"), "ephemeral-storage": resource.MustParse("1Gi")}}
	s := nodeStatus(prev, v, now)
	quantities := func(l corev1.ResourceList) string {
		out := []string{}
		for _, k := range []corev1.ResourceName{"cpu", "memory", "pods", "fairlead.dev/rs485", "example.com/gpu", "fairlead.dev/old", "ephemeral-storage", "bad", "negative"} {
			if q, ok := l[k]; ok {
				out = append(out, string(k)+"="+q.String())
			}
		}
		return strings.Join(out, " ")
	}
	if got := quantities(s.Capacity); got != "cpu=4 memory=1Gi pods=20 fairlead.dev/rs485=1 example.com/gpu=1" {
		t.Errorf("capacity %s", got)
	}
	if got := quantities(s.Allocatable); got != "cpu=3500m memory=900Mi pods=20 fairlead.dev/rs485=1" {
		t.Errorf("allocatable %s", got)
	}
	ready, disk, pid := nodeCondition(s, corev1.NodeReady), nodeCondition(s, corev1.NodeDiskPressure), nodeCondition(s, corev1.NodePIDPressure)
	if ready.Status != "True" || ready.Reason != reasonLinkUp {
		t.Errorf("%+v", ready)
	}
	if disk.Status != "True" || disk.LastTransitionTime.UnixMilli() != at+5000 {
		t.Errorf("disk %+v", disk)
	}
	if pid.LastTransitionTime.UnixMilli() != at { // it was so before the link was there
		t.Errorf("pid %+v", pid)
	}
	if c := nodeCondition(s, corev1.NodeMemoryPressure); c.Type != "" {
		t.Errorf("nobody said %+v", c)
	}
	// Settled: nothing to write, though the informer keeps a sum of the images.
	kept := &corev1.Node{Status: *s.DeepCopy()}
	if _, err := trimNode(kept); err != nil {
		t.Fatal(err)
	}
	if _, err := trimNode(kept); err != nil || len(kept.Status.Images) != 1 || len(kept.Status.Images[0].Names) != 0 { // its own result
		t.Fatalf("%+v, %v", kept.Status.Images, err)
	}
	again := nodeStatus(&kept.Status, v, now.Add(time.Hour))
	if !equality.Semantic.DeepEqual(imagesSum(again.Images), kept.Status.Images) {
		t.Error("the images look changed")
	}
	again.Images = kept.Status.Images
	if !equality.Semantic.DeepEqual(*again, kept.Status) {
		t.Errorf("changed without news\n was %+v\n is  %+v", kept.Status, *again)
	}
	// The link is down: nobody can say anything but the cloud.
	down := nodeStatus(s, nodeView{state: linkDown, node: v.node}, now.Add(time.Minute))
	for _, c := range []corev1.NodeConditionType{corev1.NodeReady, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
		if x := nodeCondition(down, c); x.Status != "Unknown" || x.Reason != reasonLinkDown || !x.LastTransitionTime.Time.Equal(now.Add(time.Minute)) {
			t.Errorf("%+v", x)
		}
	}
	// The runtime is down, the link is up.
	broken := podsNode()
	broken.Conditions = []payload.NodeCondition{{Type: "Ready", Status: "False", Reason: "KubeletNotReady", Message: "runtime is down", Since: at}}
	s = nodeStatus(down, nodeView{state: linkUp, node: broken}, now)
	if c := nodeCondition(s, corev1.NodeReady); c.Status != "False" || c.Reason != "KubeletNotReady" || c.Message != "runtime is down" {
		t.Errorf("%+v", c)
	}
	if c := nodeCondition(s, corev1.NodeDiskPressure); c.Type != "" {
		t.Errorf("not reported any more: %+v", c)
	}
}

// TestNodePatch: addresses of one type stand side by side, and what is gone goes.
func TestNodePatch(t *testing.T) {
	a := nodeStatus(&corev1.NodeStatus{Capacity: corev1.ResourceList{"fairlead.dev/old": resource.MustParse("1")}, Addresses: []corev1.NodeAddress{{Type: "InternalIP", Address: "192.0.2.9"}, {Type: "ExternalIP", Address: "198.51.100.1"}}},
		nodeView{}, time.UnixMilli(at))
	b := nodeStatus(a, nodeView{state: linkUp, node: podsNode()}, time.UnixMilli(at))
	patch, err := twoWay(&corev1.Node{Status: *a}, &corev1.Node{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Status: *b})
	if err != nil {
		t.Fatal(err)
	}
	original, err := json.Marshal(corev1.Node{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Status: *a})
	if err != nil {
		t.Fatal(err)
	}
	merged, err := strategicpatch.StrategicMergePatch(original, patch, corev1.Node{})
	if err != nil {
		t.Fatal(err)
	}
	var got corev1.Node
	if err := json.Unmarshal(merged, &got); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got.Status.Addresses) != fmt.Sprint(b.Addresses) || len(got.Status.Addresses) != 3 {
		t.Errorf("%v, want %v\n%s", got.Status.Addresses, b.Addresses, patch)
	}
	if _, ok := got.Status.Capacity["fairlead.dev/old"]; ok || len(got.Status.Images) != 2 {
		t.Errorf("%s", merged)
	}
	if !strings.Contains(string(patch), `"uid":"u"`) {
		t.Errorf("nothing says which node: %s", patch)
	}
}

// TestSealKeys: a node's key is the one it reported last, and outlives its report.
func TestSealKeys(t *testing.T) {
	m, _ := newTestMirror(t)
	a, _ := newSealTo(t)
	b, _ := newSealTo(t)
	node := func(key string) string { return string(payload.Encode(payload.Node{SealKey: key})) }
	tp := topic.ReportedNode("n")
	for _, tc := range []struct {
		name, report string
		want         sealTo
		rekeyed      bool
	}{
		{"no key", node(""), sealTo{}, false},
		{"the first", node(a.public), a, true},
		{"again", node(a.public), a, false},
		{"the report is gone", "", a, false},
		{"and back", node(a.public), a, false},
		{"another", node(b.public), b, true},
		{"none that is one", node("AAAA"), sealTo{}, true},
		{"one again", node(a.public), a, true},
	} {
		n := m.tell(t, tp, tc.report)
		if got := m.sealKey("n"); got != tc.want || n.rekeyed != tc.rekeyed {
			t.Errorf("%s: %v, rekeyed %t", tc.name, got, n.rekeyed)
		}
	}
	if got := m.sealKey("unknown"); got != (sealTo{}) {
		t.Errorf("%v", got)
	}
}

func TestRefersTo(t *testing.T) {
	volume := func(v corev1.VolumeSource) corev1.PodSpec {
		return corev1.PodSpec{Volumes: []corev1.Volume{{VolumeSource: v}}}
	}
	for _, tc := range []struct {
		spec corev1.PodSpec
		want string
	}{
		{corev1.PodSpec{Containers: []corev1.Container{{Name: "c"}}}, ""},
		{volume(corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/dev"}}), ""},
		{volume(corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}), ""},
		{corev1.PodSpec{ServiceAccountName: "a"}, "a service account"},
		{corev1.PodSpec{DeprecatedServiceAccount: "a"}, "a service account"},
		{corev1.PodSpec{ImagePullSecrets: []corev1.LocalObjectReference{{Name: "s"}}}, "image pull secrets"},
		{corev1.PodSpec{ResourceClaims: []corev1.PodResourceClaim{{Name: "s"}}}, "resource claims"},
		{corev1.PodSpec{InitContainers: []corev1.Container{{EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}}}}, "a secret"},
		{volume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s"}}), "a secret"},
		{volume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}), "a configmap"},
		{volume(corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{}}), "a persistent volume claim"},
		{volume(corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{}}}}}), "a token, trust bundle or certificate"},
	} {
		if got := refersTo(&tc.spec); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.spec, got, tc.want)
		}
	}
}
