package cgroup

import (
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

func TestNames(t *testing.T) {
	const uid = types.UID("6f1c9d3e-0001-4a2b")
	tests := []struct {
		driver, root string
		qos          corev1.PodQOSClass
		path, parent string
	}{
		{spec.CgroupFS, "", corev1.PodQOSGuaranteed, "/kubepods/pod6f1c9d3e-0001-4a2b", "/kubepods/pod6f1c9d3e-0001-4a2b"},
		{spec.CgroupFS, "/", corev1.PodQOSBurstable, "/kubepods/burstable/pod6f1c9d3e-0001-4a2b", "/kubepods/burstable/pod6f1c9d3e-0001-4a2b"},
		{spec.CgroupFS, "/site/a", corev1.PodQOSBestEffort, "/site/a/kubepods/besteffort/pod6f1c9d3e-0001-4a2b", "/site/a/kubepods/besteffort/pod6f1c9d3e-0001-4a2b"},
		{spec.Systemd, "", corev1.PodQOSGuaranteed, "/kubepods.slice/kubepods-pod6f1c9d3e_0001_4a2b.slice", "kubepods-pod6f1c9d3e_0001_4a2b.slice"},
		{
			spec.Systemd, "", corev1.PodQOSBurstable,
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod6f1c9d3e_0001_4a2b.slice", "kubepods-burstable-pod6f1c9d3e_0001_4a2b.slice",
		},
		{
			spec.Systemd, "/my-site", corev1.PodQOSBestEffort,
			"/my_site.slice/my_site-kubepods.slice/my_site-kubepods-besteffort.slice/my_site-kubepods-besteffort-pod6f1c9d3e_0001_4a2b.slice",
			"my_site-kubepods-besteffort-pod6f1c9d3e_0001_4a2b.slice",
		},
	}
	for _, tt := range tests {
		root, err := parseName(tt.root)
		if err != nil {
			t.Fatal(err)
		}
		tree := &Tree{driver: tt.driver, root: root}
		if got := tree.pod(uid, tt.qos).path(tt.driver); got != tt.path {
			t.Errorf("%s %s: path %s, want %s", tt.driver, tt.qos, got, tt.path)
		}
		if got := tree.PodParent(uid, tt.qos); got != tt.parent {
			t.Errorf("%s %s: parent %s, want %s", tt.driver, tt.qos, got, tt.parent)
		}
		if got, ok := podOf(filepath.Base(tt.path), tree.class(tt.qos), tt.driver); !ok || got != uid {
			t.Errorf("%s %s: read back %q, %v", tt.driver, tt.qos, got, ok)
		}
	}
	for _, bad := range []string{"/a/../b", "/a_b", "/a.slice"} {
		if _, err := parseName(bad); err == nil {
			t.Errorf("root %s was taken", bad)
		}
	}
	tree := &Tree{driver: spec.CgroupFS}
	for _, bad := range []types.UID{"", "../..", "a/b", "a_b"} {
		if err := tree.EnsurePod(t.Context(), bad, corev1.PodQOSGuaranteed, spec.PodCgroup{}); err == nil || !strings.Contains(err.Error(), "UID") {
			t.Errorf("uid %q: %v", bad, err)
		}
		if err := tree.RemovePod(t.Context(), bad); err == nil {
			t.Errorf("uid %q was removed", bad)
		}
	}
	for _, other := range []string{"burstable", "kubepods.slice", "crio-1.scope", "pod", "kubepods-burstable.slice"} {
		for _, d := range []string{spec.CgroupFS, spec.Systemd} {
			if uid, ok := podOf(other, name{"kubepods"}, d); ok {
				t.Errorf("%s is taken for pod %s", other, uid)
			}
		}
	}
}

func TestValues(t *testing.T) {
	r := resources{
		Shares: 512, Quota: 25_000, Period: 50_000, Memory: 64 << 20, PIDs: 100,
		HugePages: map[string]uint64{"2MB": 4 << 20},
	}
	tests := []struct {
		name    string
		r       resources
		version int
		want    []value
	}{
		{"all, version 1", r, 1, []value{
			{"cpu", "cpu.shares", "512"}, {"cpu", "cpu.cfs_quota_us", "-1"}, {"cpu", "cpu.cfs_period_us", "50000"}, {"cpu", "cpu.cfs_quota_us", "25000"},
			{"memory", "memory.limit_in_bytes", "67108864"}, {"pids", "pids.max", "100"}, {"hugetlb", "hugetlb.2MB.limit_in_bytes", "4194304"},
		}},
		{"all, version 2", r, 2, []value{
			{"cpu", "cpu.weight", "20"}, {"cpu", "cpu.max", "25000 50000"},
			{"memory", "memory.max", "67108864"}, {"pids", "pids.max", "100"}, {"hugetlb", "hugetlb.2MB.max", "4194304"},
		}},
		{"no bounds, version 1", resources{Quota: -1, Memory: -1, PIDs: -1}, 1, []value{
			{"cpu", "cpu.cfs_quota_us", "-1"}, {"cpu", "cpu.cfs_period_us", "100000"}, {"memory", "memory.limit_in_bytes", "-1"}, {"pids", "pids.max", "max"},
		}},
		{"no bounds, version 2", resources{Quota: -1, Memory: -1, PIDs: -1}, 2, []value{
			{"cpu", "cpu.max", "max 100000"}, {"memory", "memory.max", "max"}, {"pids", "pids.max", "max"},
		}},
		{"least and most weight", resources{Shares: 2}, 2, []value{{"cpu", "cpu.weight", "1"}}},
		{"most weight", resources{Shares: 262144}, 2, []value{{"cpu", "cpu.weight", "10000"}}},
		{"nothing", resources{}, 1, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.r.values(tt.version)
			if len(got) != len(tt.want) {
				t.Fatalf("got %v, want %v", got, tt.want)
			}
			for i := range got {
				if got[i] != tt.want[i] {
					t.Errorf("got %v, want %v", got[i], tt.want[i])
				}
			}
		})
	}
	for n, want := range map[uint64]string{64 << 10: "64KB", 2 << 20: "2MB", 1 << 30: "1GB", 16 << 30: "16GB"} {
		if got := pageSize(n); got != want {
			t.Errorf("page of %d bytes: %s, want %s", n, got, want)
		}
	}
}
