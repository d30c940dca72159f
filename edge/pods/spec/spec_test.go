package spec

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/source"
)

func mustContainer(t *testing.T, in ContainerInput) *runtimeapi.ContainerConfig {
	t.Helper()
	if in.Container == nil {
		in.Container = &in.Pod.Spec.Containers[0]
	}
	cfg, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestContainerDevices(t *testing.T) {
	node := testNode(t, 1)
	node.Devices = map[corev1.ResourceName][]Device{
		"fairlead.dev/meter": {{Path: "/dev/serial/by-id/m", HostPath: "/dev/ttyUSB0"}},
		"fairlead.dev/modem": {{Path: "/dev/modem0", HostPath: "/dev/ttyACM0", Permissions: "rwm"}, {Path: "/dev/modem1", HostPath: "/dev/ttyACM1"}},
		"fairlead.dev/away":  {{Path: "/dev/serial/by-id/away"}},
	}
	limits := func(names ...string) corev1.ResourceList {
		list := corev1.ResourceList{"cpu": resource.MustParse("1")}
		for _, n := range names {
			list[corev1.ResourceName(n)] = resource.MustParse("1")
		}
		return list
	}
	for _, c := range []struct {
		name  string
		limit corev1.ResourceList
		want  []string
		err   string
	}{
		{"none", limits(), nil, ""},
		{"one", limits("fairlead.dev/meter"), []string{"/dev/ttyUSB0 /dev/serial/by-id/m rw"}, ""},
		{"several nodes", limits("fairlead.dev/modem", "fairlead.dev/meter"),
			[]string{"/dev/ttyUSB0 /dev/serial/by-id/m rw", "/dev/ttyACM0 /dev/modem0 rwm", "/dev/ttyACM1 /dev/modem1 rw"}, ""},
		{"of somebody else", limits("example.com/gpu"), nil, ""},
		{"not wanted", corev1.ResourceList{"fairlead.dev/away": resource.MustParse("0")}, nil, ""},
		{"not plugged in", limits("fairlead.dev/away"), nil, "device /dev/serial/by-id/away of resource fairlead.dev/away is not plugged in"},
		{"not declared", limits("fairlead.dev/typo"), nil, "no device of this node is declared as resource fairlead.dev/typo"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := pod("p")
			p.Spec.Containers[0].Resources.Limits = c.limit
			cfg, err := Container(ContainerInput{Node: node, Pod: p, Container: &p.Spec.Containers[0]})
			if text(err) != c.err {
				t.Fatalf("error %v, want %s", err, c.err)
			}
			var got []string
			for _, d := range cfg.GetDevices() {
				got = append(got, d.HostPath+" "+d.ContainerPath+" "+d.Permissions)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// A pod with its own users gets ids that nobody has, in its mounts too.
func TestUserNamespace(t *testing.T) {
	node := testNode(t, 2)
	node.Runtime.Handlers = map[string]Handler{"": {UserNamespaces: true}, "slim": {}}
	p := pod("p", func(p *corev1.Pod, _ *corev1.Container) { p.Spec.HostUsers = new(false) })
	sandbox, err := Sandbox(p, node, 0)
	if err != nil {
		t.Fatal(err)
	}
	if m := sandbox.Linux.SecurityContext.NamespaceOptions.UsernsOptions.Mode; m != runtimeapi.NamespaceMode_POD {
		t.Errorf("user namespace %v", m)
	}
	first, err := UserNamespace(nil)
	if err != nil {
		t.Fatal(err)
	}
	odd := &runtimeapi.UserNamespace{Uids: []*runtimeapi.IDMapping{{HostId: 3*IDsPerPod - 1, Length: 2}}, Gids: []*runtimeapi.IDMapping{{HostId: 5 * IDsPerPod, Length: 1}}}
	next, err := UserNamespace([]*runtimeapi.UserNamespace{first, odd, nil})
	if err != nil {
		t.Fatal(err)
	}
	if first.Uids[0].HostId != IDsPerPod || next.Uids[0].HostId != 4*IDsPerPod || next.Gids[0].HostId != 4*IDsPerPod {
		t.Errorf("ids from %d, then %d", first.Uids[0].HostId, next.Uids[0].HostId)
	}
	if _, err := UserNamespace([]*runtimeapi.UserNamespace{{Uids: []*runtimeapi.IDMapping{{Length: 1<<32 - 1}}}}); err == nil {
		t.Error("ids where all are taken")
	}

	in := ContainerInput{Node: node, Pod: p, Container: &p.Spec.Containers[0], UserNamespace: first, Mounts: []*runtimeapi.Mount{{ContainerPath: "/x"}}}
	cfg := mustContainer(t, in)
	if o := cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions; o.Uids[0].HostId != IDsPerPod || cfg.Mounts[0].UidMappings[0].HostId != IDsPerPod {
		t.Errorf("container has %v, its mount %v", o, cfg.Mounts[0].UidMappings)
	}
	in.UserNamespace = nil
	if _, err := Container(in); err == nil {
		t.Error("a container without the sandbox's user namespace")
	}
	p.Spec.RuntimeClassName = new("slim")
	if _, err := Sandbox(p, node, 0); text(err) != "can't set `spec.hostUsers: false`, RuntimeClass handler \"slim\" does not support user namespaces" {
		t.Error(err)
	}
}

func TestRuntimeHandler(t *testing.T) {
	node := &Node{Runtime: Runtime{Classes: map[string]string{"sandboxed": "runsc"}}}
	for class, want := range map[string]string{"": "", "sandboxed": "runsc", "kata": "kata"} {
		p := pod("p")
		p.Spec.RuntimeClassName = &class
		if got := node.RuntimeHandler(p); got != want {
			t.Errorf("class %q has handler %q, want %q", class, got, want)
		}
	}
	if got := node.RuntimeHandler(pod("p")); got != "" {
		t.Errorf("no class has handler %q", got)
	}
}

func TestEnvFile(t *testing.T) {
	files := map[string]string{"v/a.env": "A='1'\nB= 'x'\nMULTI='two\nlines' # end\n", "v/bad.env": "A=1\n"}
	var in EnvInput
	in.File = func(volume, path string) ([]byte, error) {
		if f, ok := files[volume+"/"+path]; ok {
			return []byte(f), nil
		}
		return nil, errors.New("open " + path + ": no such file")
	}
	ref := func(volume, path, key string, optional bool) corev1.EnvVar {
		return corev1.EnvVar{Name: "X", ValueFrom: &corev1.EnvVarSource{FileKeyRef: &corev1.FileKeySelector{VolumeName: volume, Path: path, Key: key, Optional: &optional}}}
	}
	for _, c := range []struct {
		name string
		v    corev1.EnvVar
		want []*runtimeapi.KeyValue
		err  string
	}{
		{"value", ref("v", "a.env", "A", false), kv("X", "1"), ""},
		{"several lines", ref("v", "a.env", "MULTI", false), kv("X", "two\nlines"), ""},
		{"no key", ref("v", "a.env", "C", false), nil, `environment variable key "C" not found in file "a.env"`},
		{"empty", ref("v", "a.env", "B", false), nil, `environment variable key "B" not found in file "a.env"`},
		{"optional", ref("v", "a.env", "C", true), nil, ""},
		{"not quoted", ref("v", "bad.env", "A", false), nil,
			"couldn't parse env file: invalid environment variable format at line 1: value must be enclosed in single quotes"},
		{"no file", ref("v", "b.env", "A", true), nil, "couldn't parse env file: open b.env: no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in.Node, in.Pod, in.Container = &Node{}, pod("p"), &corev1.Container{Env: []corev1.EnvVar{c.v}}
			got, err := Env(in)
			if text(err) != c.err {
				t.Fatalf("error %v, want %s", err, c.err)
			}
			if len(got) != len(c.want) || len(got) > 0 && string(got[0].Value) != string(c.want[0].Value) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// The environment is in the order it is declared, and waits for what has not arrived.
func TestEnvOrder(t *testing.T) {
	in := EnvInput{Node: &Node{}, Pod: pod("p"), Objects: objects{}, Services: []Service{{Name: "db", ClusterIP: "10.0.0.1", Ports: []ServicePort{{Port: 1}}}}}
	in.Container = &corev1.Container{Env: []corev1.EnvVar{{Name: "Z", Value: "1"}, {Name: "A", Value: "2"}, {Name: "DB_PORT", Value: "mine"}, {Name: "Z", Value: "3"}}}
	got, err := Env(in)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range got {
		names = append(names, e.Key+"="+string(e.Value))
	}
	if s := strings.Join(names, " "); !strings.HasPrefix(s, "Z=3 A=2 DB_PORT=mine DB_SERVICE_HOST=10.0.0.1 DB_SERVICE_PORT=1 DB_PORT_1_TCP=") {
		t.Error(s)
	}
	in.Container.EnvFrom = []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}
	if _, err := Env(in); !errors.Is(err, source.ErrNotFound) {
		t.Errorf("%v is not ErrNotFound", err)
	}
	in.Container = &corev1.Container{Env: []corev1.EnvVar{{Name: "H", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.hostIP"}}}}}
	if _, err := Env(in); text(err) != "cannot resolve status.hostIP: the node has no IP address" {
		t.Error(err)
	}
}

func TestExpandPath(t *testing.T) {
	env := kv("A", "x", "E", "")
	for in, want := range map[string]string{
		"logs/$(A)": "logs/x", "$$(A)": "$(A)", "plain": "plain",
		"$(B)/$(E)/$(A)/$(B)": "error: missing value for B, E",
	} {
		got, err := ExpandPath(in, env)
		if err != nil {
			got = "error: " + err.Error()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestStopSignal(t *testing.T) {
	for in, want := range map[corev1.Signal]runtimeapi.Signal{
		"SIGUSR1": runtimeapi.Signal_SIGNAL_SIGUSR1, "SIGRTMIN+15": runtimeapi.Signal_SIGNAL_SIGRTMINPLUS15,
		"SIGRTMAX-2": runtimeapi.Signal_SIGNAL_SIGRTMAXMINUS2, "SIGRTMAX": runtimeapi.Signal_SIGNAL_SIGRTMAX, "nonsense": 0,
	} {
		p := pod("p", func(_ *corev1.Pod, c *corev1.Container) { c.Lifecycle = &corev1.Lifecycle{StopSignal: &in} })
		if got := mustContainer(t, ContainerInput{Node: testNode(t, 1), Pod: p}).StopSignal; got != want {
			t.Errorf("%s is %v, want %v", in, got, want)
		}
	}
}

func TestNodeSettings(t *testing.T) {
	requests := corev1.ResourceRequirements{Requests: corev1.ResourceList{"memory": resource.MustParse("1Gi")}, Limits: corev1.ResourceList{"memory": resource.MustParse("1Gi")}}
	p := pod("p", func(_ *corev1.Pod, c *corev1.Container) { c.Resources = requests })
	node := testNode(t, 1)
	node.MaskedPaths, node.SeccompDefault, node.PodPIDLimit = []string{"/sys/devices/system/cpu/cpu0/thermal_throttle"}, true, 64
	cfg := mustContainer(t, ContainerInput{Node: node, Pod: p})
	if paths := cfg.Linux.SecurityContext.MaskedPaths; paths[len(paths)-1] != node.MaskedPaths[0] || len(paths) != len(maskedPaths)+1 {
		t.Errorf("masked: %v", paths)
	}
	if s := cfg.Linux.SecurityContext.Seccomp.ProfileType; s != runtimeapi.SecurityProfile_RuntimeDefault {
		t.Errorf("seccomp %v", s)
	}
	if pids := PodResources(p, node).PIDs; pids == nil || *pids != 64 {
		t.Errorf("PIDs %v", pids)
	}
	if r := cfg.Linux.Resources; r.MemorySwapLimitInBytes != 1<<30 || r.OomScoreAdj != 750 {
		t.Errorf("swap %d, OOM score %d", r.MemorySwapLimitInBytes, r.OomScoreAdj)
	}
	node.Swap, node.NoOOMScore = false, true
	if r := Resources(p, &p.Spec.Containers[0], node); r.MemorySwapLimitInBytes != 0 || r.OomScoreAdj != 0 {
		t.Errorf("swap %d, OOM score %d", r.MemorySwapLimitInBytes, r.OomScoreAdj)
	}
	node.CgroupVersion = 2
	if u := Resources(p, &p.Spec.Containers[0], node).Unified; u["memory.swap.max"] != "" || u["memory.oom.group"] != "1" {
		t.Errorf("unified %v", u)
	}
}

// Without a resolv.conf or cluster DNS, pods have what the kubelet would give them.
func TestDNSWithout(t *testing.T) {
	p := pod("p", func(p *corev1.Pod, _ *corev1.Container) { p.Spec.DNSPolicy = corev1.DNSClusterFirst })
	dns, events := DNS(p, &Node{HostIPs: []string{"192.168.7.20", "fd00::20"}, ClusterDomain: "cluster.local"})
	if d := cmp.Diff([]string{"127.0.0.1", "::1"}, dns.Servers); d != "" || len(dns.Searches) != 1 || dns.Searches[0] != "." {
		t.Errorf("%v", dns)
	}
	if len(events) != 1 || events[0].Reason != "MissingClusterDNS" || !strings.HasPrefix(events[0].Message, `pod: "p_default(uid-p)". `) {
		t.Errorf("%v", events)
	}
	if dns, _ := DNS(p, &Node{}); len(dns.Servers) != 1 || dns.Servers[0] != "127.0.0.1" {
		t.Errorf("%v", dns)
	}
	node := testNode(t, 1)
	node.ClusterDomain = ""
	if dns, _ := DNS(p, node); cmp.Diff([]string{"plant.example", "corp.example"}, dns.Searches) != "" {
		t.Errorf("%v", dns)
	}
	for range 40 {
		node.Resolv.Searches = append(node.Resolv.Searches, strings.Repeat("x", 100)+".example")
	}
	p.Spec.DNSPolicy = corev1.DNSDefault
	if dns, events := DNS(p, node); len(strings.Join(dns.Searches, " ")) > maxSearchChars || len(dns.Searches) < 18 || len(events) != 1 {
		t.Errorf("%d searches, %v", len(dns.Searches), events)
	}
}

func TestCgroupPath(t *testing.T) {
	for _, c := range []struct {
		node Node
		want string
	}{
		{Node{}, "/kubepods/burstable/poda-b"},
		{Node{CgroupRoot: "/site/fairlead"}, "/site/fairlead/kubepods/burstable/poda-b"},
		{Node{CgroupDriver: Systemd}, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice"},
		{Node{CgroupDriver: Systemd, CgroupRoot: "/site/fair-lead"},
			"/site.slice/site-fair_lead.slice/site-fair_lead-kubepods.slice/site-fair_lead-kubepods-burstable.slice/site-fair_lead-kubepods-burstable-poda_b.slice"},
	} {
		if got := CgroupPath(&c.node, Kubepods, "burstable", "poda-b"); got != c.want {
			t.Errorf("\ngot  %s\nwant %s", got, c.want)
		}
	}
}

func TestSortIPs(t *testing.T) {
	for _, c := range []struct {
		host string
		ips  []string
		want []string
	}{
		{"", []string{"fd00::1", "10.0.0.1", "10.0.0.2"}, []string{"10.0.0.1", "fd00::1"}},
		{"fd00::20", []string{"10.0.0.1", "fd00::1"}, []string{"fd00::1", "10.0.0.1"}},
		{"192.168.7.20", []string{"::ffff:10.0.0.1", "nonsense", ""}, []string{"10.0.0.1"}},
		{"192.168.7.20", nil, []string{}},
	} {
		n := &Node{}
		if c.host != "" {
			n.HostIPs = []string{c.host}
		}
		if d := cmp.Diff(c.want, n.SortIPs(c.ips)); d != "" {
			t.Errorf("%v on %q:\n%s", c.ips, c.host, d)
		}
	}
}

func TestResourceValueOfInitContainer(t *testing.T) {
	p := pod("p")
	p.Spec.InitContainers = []corev1.Container{{Name: "i", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("1500m")}}}}
	allocatable := corev1.ResourceList{"cpu": resource.MustParse("4")}
	for ref, want := range map[string]string{"requests.cpu": "2", "limits.cpu": "4", "limits.memory": "0"} {
		got, err := ResourceValue(&corev1.ResourceFieldSelector{ContainerName: "i", Resource: ref}, p, nil, allocatable)
		if err != nil || got != want {
			t.Errorf("%s is %s (%v), want %s", ref, got, err, want)
		}
	}
	if _, err := ResourceValue(&corev1.ResourceFieldSelector{Resource: "limits.cpu"}, p, nil, allocatable); err == nil {
		t.Error("a value of no container")
	}
}
