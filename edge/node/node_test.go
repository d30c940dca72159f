package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

// tell runs a program that knows the same and gives its words.
func tell(t *testing.T, argv ...string) []string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).Output()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skipf("no %s to compare with", argv[0])
	}
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))
}

func TestDescribe(t *testing.T) {
	n := Describe("v1")
	if n.Agent != "v1" || n.OS != "linux" || n.Arch != runtime.GOARCH || n.BootID == "" || n.OSImage == "" {
		t.Errorf("got %+v", n)
	}
	if w := tell(t, "getconf", "_NPROCESSORS_ONLN"); strconv.Itoa(n.CPUs) != w[0] {
		t.Errorf("%d CPUs, getconf says %s", n.CPUs, w)
	}
	if w := tell(t, "uname", "-r"); n.Kernel != w[0] {
		t.Errorf("kernel %s, uname says %s", n.Kernel, w)
	}
	if w := tell(t, "free", "-b"); w[7] != strconv.FormatUint(n.MemoryBytes, 10) {
		t.Errorf("memory %d, free says %s", n.MemoryBytes, w[7])
	}
	if n.SystemUUID == "" && n.MachineID != "" {
		t.Error("no system UUID though there is a machine id")
	}
	maj, minor := KernelVersion(n.Kernel)
	if !strings.HasPrefix(n.Kernel, fmt.Sprintf("%d.%d", maj, minor)) {
		t.Errorf("kernel %s read as %d.%d", n.Kernel, maj, minor)
	}
	for r, want := range map[string][2]int{"5.15.0-91-generic": {5, 15}, "6.1": {6, 1}, "6.12rc3": {6, 12}, "": {}, "x.y": {}, "6.": {}} {
		if maj, minor := KernelVersion(r); maj != want[0] || minor != want[1] {
			t.Errorf("%q: %d.%d", r, maj, minor)
		}
	}
}

func TestAddresses(t *testing.T) {
	w := tell(t, "ip", "-4", "-o", "route", "show", "default")
	var dev, addr string
	for i, s := range w {
		if s == "dev" && dev == "" {
			dev = w[i+1]
		}
	}
	if dev == "" {
		t.Skip("this machine has no default route")
	}
	if got := defaultRoute(true); got != dev {
		t.Errorf("default route by %s, ip says %s", got, dev)
	}
	for i, s := range tell(t, "ip", "-4", "-o", "addr", "show", "dev", dev, "scope", "global") {
		if i == 3 {
			addr, _, _ = strings.Cut(s, "/")
		}
	}
	host := []corev1.NodeAddress{{Type: "InternalIP", Address: addr}, {Type: "Hostname", Address: "gw"}}
	for _, ips := range []string{"", addr, "0.0.0.0"} {
		want, err := ParseIPs(ips)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Addresses("gw", want)
		if d := cmp.Diff(host, got); err != nil || d != "" {
			t.Errorf("--node-ip %q: %v %s", ips, err, d)
		}
	}
	if Describe("").InternalAddress != addr {
		t.Errorf("described as %s, want %s", Describe("").InternalAddress, addr)
	}
	got, err := Addresses("gw", []netip.Addr{netip.MustParseAddr("203.0.113.77")})
	if err == nil || !strings.Contains(err.Error(), "203.0.113.77") || got[len(got)-1] != host[1] {
		t.Errorf("an address that is not the host's: %v, %v", got, err)
	}
	for _, bad := range []string{"x", "127.0.0.1", "::1", "fe80::1", "224.0.0.1", "192.0.2.1,192.0.2.2", "192.0.2.1,fd00::1,fd00::2", "192.0.2.1,", "0.0.0.0,fd00::1"} {
		if ips, err := ParseIPs(bad); err == nil {
			t.Errorf("--node-ip %s was taken: %v", bad, ips)
		}
	}
	if ips, err := ParseIPs("192.0.2.1, fd00::1"); err != nil || len(ips) != 2 {
		t.Errorf("dual stack: %v, %v", ips, err)
	}
}

func TestPick(t *testing.T) {
	all := []ifAddr{{"cni0", netip.MustParseAddr("10.88.0.1")}, {"eth0", netip.MustParseAddr("2001:db8::7")}, {"eth0", netip.MustParseAddr("192.0.2.7")}, {"eth0", netip.MustParseAddr("192.0.2.8")}}
	for _, tt := range []struct {
		family func(netip.Addr) bool
		route  string
		want   string
	}{
		{netip.Addr.Is4, "eth0", "192.0.2.7"},
		{netip.Addr.Is4, "", "10.88.0.1"},
		{netip.Addr.Is4, "wwan0", "10.88.0.1"},
		{netip.Addr.Is6, "eth0", "2001:db8::7"},
	} {
		if got := pick(all, tt.family, tt.route); got.String() != tt.want {
			t.Errorf("route by %q: %s, want %s", tt.route, got, tt.want)
		}
	}
	if got := pick(all[:1], netip.Addr.Is6, ""); got.IsValid() {
		t.Errorf("without an address of the family: %s", got)
	}
	if w := tell(t, "ip", "-6", "-o", "route", "show", "default"); len(w) > 4 && w[3] == "dev" {
		if got := defaultRoute(false); got != w[4] {
			t.Errorf("default route of IPv6 by %q, ip says %s", got, w[4])
		}
	}
}

func TestOffer(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/dev/null", filepath.Join(dir, "there")); err != nil {
		t.Fatal(err)
	}
	reserved, err := ParseReserved("cpu=250m,memory=100Mi,ephemeral-storage=1Gi,pid=100")
	if err != nil {
		t.Fatal(err)
	}
	o := Offer{Data: dir, Reserved: []corev1.ResourceList{reserved, {corev1.ResourceMemory: resource.MustParse("50Mi")}}, Devices: []Device{
		{"meter", filepath.Join(dir, "there")}, {"meter", "/dev/null"}, {"scale", filepath.Join(dir, "gone")}, {"file", os.Args[0]},
	}}
	capacity, allocatable, err := o.Resources()
	if err != nil {
		t.Fatal(err)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		t.Fatal(err)
	}
	n, huge := Describe(""), int64(0)
	for _, h := range HugePages() {
		huge += h.Size * h.Count
	}
	disk := int64(s.Blocks) * s.Bsize
	for name, want := range map[corev1.ResourceName][2]string{
		"cpu":                {strconv.Itoa(n.CPUs), strconv.Itoa(n.CPUs*1000-250) + "m"},
		"memory":             {resource.NewQuantity(int64(n.MemoryBytes), resource.BinarySI).String(), resource.NewQuantity(int64(n.MemoryBytes)-150<<20-huge, resource.BinarySI).String()},
		"pods":               {"110", "110"},
		"ephemeral-storage":  {resource.NewQuantity(disk, resource.DecimalSI).String(), resource.NewQuantity(disk-1<<30, resource.DecimalSI).String()},
		"fairlead.dev/meter": {"2", "2"},
		"fairlead.dev/scale": {"0", "0"},
		"fairlead.dev/file":  {"0", "0"},
	} {
		c, a := capacity[name], allocatable[name]
		if c.String() != want[0] || a.String() != want[1] {
			t.Errorf("%s: %s, of it %s; want %v", name, c.String(), a.String(), want)
		}
	}
	if _, ok := allocatable["pid"]; ok {
		t.Error("process IDs are offered")
	}
	for _, h := range HugePages() {
		name := corev1.ResourceName("hugepages-" + resource.NewQuantity(h.Size, resource.BinarySI).String())
		if _, ok := capacity[name]; !ok {
			t.Errorf("no %s in %v", name, capacity)
		}
	}
	o.Reserved, o.MaxPods, o.Data = []corev1.ResourceList{{corev1.ResourceCPU: resource.MustParse("9000")}}, 3, filepath.Join(dir, "none")
	capacity, allocatable, err = o.Resources()
	if err == nil || !strings.Contains(err.Error(), "none") || !allocatable.Cpu().IsZero() || capacity.Pods().Value() != 3 {
		t.Errorf("more reserved than there is, without a data folder: %v, %v", err, allocatable)
	}
	beside := allocate(corev1.ResourceList{"memory": resource.MustParse("1Gi"), "hugepages-2Mi": resource.MustParse("256Mi"), "hugepages-1Gi": resource.MustParse("0")}, nil)
	if beside.Memory().String() != "768Mi" {
		t.Errorf("memory beside huge pages: %v", beside)
	}
	if q := Quantities(corev1.ResourceList{"cpu": resource.MustParse("0.5")}); q["cpu"] != "500m" {
		t.Errorf("on the wire %v", q)
	}
	for _, bad := range []string{"cpu", "cpu=-1", "cpu=x", "gpu=1"} {
		if r, err := ParseReserved(bad); err == nil {
			t.Errorf("reservation %s was taken: %v", bad, r)
		}
	}
}

func TestParseDevice(t *testing.T) {
	d, err := ParseDevice("meter-1=/dev/serial/by-id/usb-FTDI_A50285BI-if00-port0")
	if err != nil || d.Resource() != "fairlead.dev/meter-1" || d.Path != "/dev/serial/by-id/usb-FTDI_A50285BI-if00-port0" {
		t.Errorf("%+v, %v", d, err)
	}
	for _, bad := range []string{"", "meter", "=/dev/x", "Meter=/dev/x", "m_1=/dev/x", "meter=", "meter=dev/x", "meter=/etc/passwd", "meter=/dev/../etc/passwd", "-a=/dev/x"} {
		if d, err := ParseDevice(bad); err == nil {
			t.Errorf("%q was taken: %+v", bad, d)
		}
	}
}

// The folder of a device comes with the first device, as /dev/serial/by-id does.
func TestWatchDevices(t *testing.T) {
	dir := t.TempDir()
	d := Device{"meter", filepath.Join(dir, "serial/by-id/x")}
	changed := make(chan string, 16)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- WatchDevices(ctx, []Device{d}, func() { changed <- d.Host() }) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	step := func(what, want string, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for {
			select {
			case got := <-changed:
				if got == want {
					return
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("%s: nothing was told", what)
			}
		}
	}
	step("not there", "", nil)
	step("plugged in", "/dev/null", errors.Join(os.MkdirAll(filepath.Dir(d.Path), 0o700), os.Symlink("/dev/null", d.Path)))
	step("another node", "/dev/zero", errors.Join(os.Symlink("/dev/zero", d.Path+"2"), os.Rename(d.Path+"2", d.Path)))
	step("pulled", "", os.RemoveAll(filepath.Join(dir, "serial")))
	step("again", "/dev/null", errors.Join(os.MkdirAll(filepath.Dir(d.Path), 0o700), os.Symlink("/dev/null", d.Path)))
}

func TestRuntimeProblems(t *testing.T) {
	cond := func(kind string, ok bool) *runtimeapi.RuntimeCondition {
		return &runtimeapi.RuntimeCondition{Type: kind, Status: ok, Reason: "R", Message: "m n"}
	}
	tests := []struct {
		name   string
		status *runtimeapi.RuntimeStatus
		err    error
		want   string // the condition Ready
	}{
		{"well", &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{cond("RuntimeReady", true), cond("NetworkReady", true)}}, nil, "True KubeletReady kubelet is posting ready status"},
		{"down", nil, errors.New("refused"), "False KubeletNotReady container runtime is down"},
		{"no network", &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{cond("RuntimeReady", true), cond("NetworkReady", false)}}, nil,
			"False KubeletNotReady container runtime network not ready: NetworkReady=false reason:R message:m n"},
		{"neither", &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{cond("RuntimeReady", false), cond("NetworkReady", false)}}, nil,
			"False KubeletNotReady [container runtime not ready: RuntimeReady=false reason:R message:m n, container runtime network not ready: NetworkReady=false reason:R message:m n]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := Ready(RuntimeProblems(tt.status, tt.err)...)
			if got := string(c.Status) + " " + c.Reason + " " + c.Message; c.Type != corev1.NodeReady || got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
	if c := Ready(nil, ErrShutdown); c.Message != "node is shutting down" {
		t.Errorf("shutdown: %+v", c)
	}
}

func TestConditions(t *testing.T) {
	at := metav1.NewTime(time.UnixMilli(5000))
	before := []payload.NodeCondition{{Type: "Ready", Status: "True", Since: 1000}, {Type: "DiskPressure", Status: "True", Since: 2000}}
	got := Conditions(before, []corev1.NodeCondition{
		{Type: "Ready", Status: "True", Reason: "r", Message: "m", LastTransitionTime: at}, {Type: "DiskPressure", Status: "False", LastTransitionTime: at}, {Type: "PIDPressure", Status: "False", LastTransitionTime: at},
	})
	want := []payload.NodeCondition{{Type: "Ready", Status: "True", Reason: "r", Message: "m", Since: 1000}, {Type: "DiskPressure", Status: "False", Since: 5000}, {Type: "PIDPressure", Status: "False", Since: 5000}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestImages(t *testing.T) {
	var list []*runtimeapi.Image
	for i := range 60 {
		list = append(list, &runtimeapi.Image{Id: fmt.Sprintf("%02d", i), Size: uint64(i), RepoTags: []string{fmt.Sprint("t", i)}})
	}
	list[59].RepoDigests = []string{"d"}
	list[59].RepoTags = []string{"1", "2", "3", "4", "5"}
	list[58].Size = 59
	got := Images(list)
	if len(got) != 50 || got[49].Size != 10 {
		t.Fatalf("%d images, the last of %+v", len(got), got[len(got)-1])
	}
	if d := cmp.Diff([]payload.NodeImage{{Names: []string{"d", "1", "2", "3", "4"}, Size: 59}, {Names: []string{"t58"}, Size: 59}}, got[:2]); d != "" {
		t.Error(d)
	}
	if list[0].Id != "00" {
		t.Error("the list given was sorted")
	}
}
