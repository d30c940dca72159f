package evict

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// mkpod makes a pod with one container; requests such as memory=100Mi,ephemeral-storage=1Gi.
func mkpod(name string, priority int32, requests string) *corev1.Pod {
	rs := corev1.ResourceList{}
	for r := range strings.SplitSeq(requests, ",") {
		if k, v, ok := strings.Cut(r, "="); ok {
			rs[corev1.ResourceName(k)] = resource.MustParse(v)
		}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(name)},
		Spec: corev1.PodSpec{
			Priority: &priority, TerminationGracePeriodSeconds: new(int64(30)),
			Containers: []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{Requests: rs}}},
		},
	}
}

func TestRank(t *testing.T) {
	const mi = 1 << 20
	mem := func(n int64) PodUsage { return PodUsage{Memory: n * mi} }
	disk := func(root, log, vol int64) PodUsage {
		return PodUsage{
			Containers: map[string]ContainerUsage{"c": {Root: Files{root * mi, root}, Logs: Files{log * mi, log}}},
			Volumes:    map[string]Files{"v": {vol * mi, vol}},
		}
	}
	withVolume := func(p *corev1.Pod) *corev1.Pod {
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		return p
	}
	tests := []struct {
		name      string
		signal    Signal
		dedicated bool
		pods      []*corev1.Pod
		use       usages
		want      string
	}{
		{
			"memory: first those above their request, whatever they use", MemoryAvailable, false,
			[]*corev1.Pod{mkpod("within", 0, "memory=900Mi"), mkpod("above", 0, "memory=10Mi"), mkpod("besteffort", 0, "")},
			usages{"within": mem(800), "above": mem(20), "besteffort": mem(5)}, "above besteffort within",
		},
		{
			"memory: among those, the lower priority", MemoryAvailable, false,
			[]*corev1.Pod{mkpod("high", 1000, ""), mkpod("low", -5, ""), mkpod("zero", 0, "")},
			usages{"high": mem(900), "low": mem(1), "zero": mem(10)}, "low zero high",
		},
		{
			"memory: then the most above the request", PodsMemoryAvailable, false,
			[]*corev1.Pod{mkpod("a", 0, "memory=100Mi"), mkpod("b", 0, "memory=10Mi")},
			usages{"a": mem(150), "b": mem(90)}, "b a",
		},
		{
			"memory: whose use is unknown goes first", MemoryAvailable, false,
			[]*corev1.Pod{mkpod("known", -10, ""), mkpod("unknown", 10, "")},
			usages{"known": mem(500)}, "unknown known",
		},
		{
			"process IDs: priority, then the number; requests do not count", PIDAvailable, false,
			[]*corev1.Pod{mkpod("few", 0, ""), mkpod("many", 0, "memory=1Gi"), mkpod("high", 7, "")},
			usages{"few": {PIDs: 3}, "many": {PIDs: 300}, "high": {PIDs: 3000}}, "many few high",
		},
		{
			"one disk: layers, logs and volumes", NodeFSAvailable, false,
			[]*corev1.Pod{mkpod("root", 0, ""), withVolume(mkpod("vol", 0, "")), mkpod("log", 0, "")},
			usages{"root": disk(20, 0, 0), "vol": disk(0, 0, 30), "log": disk(0, 10, 0)}, "vol root log",
		},
		{
			"images elsewhere: the node's disk counts no layers", NodeFSAvailable, true,
			[]*corev1.Pod{mkpod("root", 0, ""), withVolume(mkpod("vol", 0, "")), mkpod("log", 0, "")},
			usages{"root": disk(20, 0, 0), "vol": disk(0, 0, 30), "log": disk(0, 10, 0)}, "vol log root",
		},
		{
			"images elsewhere: theirs counts layers alone", ImageFSAvailable, true,
			[]*corev1.Pod{withVolume(mkpod("vol", 0, "")), mkpod("log", 0, ""), mkpod("root", 0, "")},
			usages{"root": disk(20, 0, 0), "vol": disk(1, 0, 30), "log": disk(0, 10, 0)}, "root vol log",
		},
		{
			"disk: within the request goes last", NodeFSAvailable, false,
			[]*corev1.Pod{mkpod("within", 0, "ephemeral-storage=1Gi"), mkpod("above", 0, "ephemeral-storage=1Mi")},
			usages{"within": disk(900, 0, 0), "above": disk(2, 0, 0)}, "above within",
		},
		{
			"inodes", NodeFSInodes, false,
			[]*corev1.Pod{mkpod("few", 0, ""), mkpod("many", 0, "")},
			usages{"few": {Containers: map[string]ContainerUsage{"c": {Root: Files{9 << 30, 3}}}}, "many": disk(700, 0, 0)}, "many few",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for range 2 { // from both ends, so that a rank that does nothing fails
				slices.Reverse(tt.pods)
				ps := slices.Clone(tt.pods)
				rank(ps, tt.signal, tt.use, tt.dedicated)
				var got []string
				for _, p := range ps {
					got = append(got, p.Name)
				}
				if g := strings.Join(got, " "); g != tt.want {
					t.Errorf("got %s, want %s", g, tt.want)
				}
			}
		})
	}
}

func TestParse(t *testing.T) {
	ts, err := Parse(DefaultHard, map[string]string{"memory.available": "300Mi", "pid.available": "5%"},
		map[string]string{"memory.available": "90s", "pid.available": "1m"}, map[string]string{"nodefs.available": "500Mi"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, th := range ts {
		q := th.Value.of(1000 << 20)
		r := th.MinReclaim.of(1000 << 20)
		got = append(got, strings.Join([]string{string(th.Signal), q.String(), th.Grace.String(), r.String()}, " "))
	}
	want := []string{
		"memory.available 100Mi 0s 0", "memory.available 300Mi 1m30s 0", "nodefs.available 104857601 0s 500Mi", "nodefs.inodesFree 50Mi 0s 0",
		"imagefs.available 157286406 0s 0", "imagefs.inodesFree 50Mi 0s 0", "pid.available 50Mi 1m0s 0", "allocatableMemory.available 100Mi 0s 0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	r := Reserve(ts, corev1.ResourceList{corev1.ResourceEphemeralStorage: *resource.NewQuantity(1000, resource.DecimalSI), corev1.ResourceMemory: resource.MustParse("1Gi")})
	if len(r) != 2 || r.Memory().String() != "100Mi" || r.StorageEphemeral().Value() != 100 {
		t.Errorf("reserved %v", r)
	}
	if ts, err := Parse(map[string]string{"memory.available": "0%", "nodefs.available": "100%"}, nil, nil, nil); err != nil || len(ts) != 0 {
		t.Errorf("thresholds that are off: %v, %v", ts, err)
	}
	type m = map[string]string
	for _, bad := range [][4]m{
		{{"memory.free": "1Mi"}}, {{"allocatableMemory.available": "1Mi"}}, {{"memory.available": "-5Mi"}}, {{"memory.available": "lots"}}, {{"memory.available": "101%"}}, {{"memory.available": "NaN%"}},
		{nil, {"memory.available": "1Mi"}}, {nil, {"memory.available": "1Mi"}, {"memory.available": "soon"}}, {nil, nil, nil, {"memory.available": "x"}}, {nil, nil, nil, {"nothing": "1Mi"}},
	} {
		if bad[3] != nil {
			bad[0] = m{"memory.available": "1Mi"}
		}
		if ts, err := Parse(bad[0], bad[1], bad[2], bad[3]); err == nil {
			t.Errorf("%v was taken: %v", bad, ts)
		}
	}
}
