package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	"github.com/fairlead-io/fairlead/edge/pods/source"
)

const resolvConf = `# the site's
nameserver 192.168.7.1
nameserver 192.168.7.2
search old.example
search plant.example. corp.example .
options ndots:1 rotate
options ndots:3
`

// testNode is the node that the stock kubelet's answers in testdata are for.
func testNode(t *testing.T, cgroup int) *Node {
	t.Helper()
	resolv, err := ParseResolvConf(resolvConf)
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{
		Name: "edge-1", HostIPs: []string{"192.168.7.20", "fd00::20"},
		Resolv: resolv, ClusterDNS: []string{"10.96.0.10"}, ClusterDomain: "cluster.local",
		CgroupVersion: cgroup, CPUs: 4, Memory: 4 << 30, Swap: true, HugePageSizes: []int64{2 << 20, 1 << 30},
		Allocatable: corev1.ResourceList{
			"cpu": resource.MustParse("3800m"), "memory": resource.MustParse("3Gi"),
			"ephemeral-storage": resource.MustParse("20Gi"), "pods": resource.MustParse("110"),
		},
		LogRoot: "/var/log/pods", SeccompRoot: "/var/lib/seccomp",
	}
	if cgroup == 2 {
		n.CgroupDriver = Systemd
	}
	return n
}

// objects has ConfigMaps and Secrets by kind/name.
type objects map[string]any

func get[T any](o objects, kind, name string) (*T, error) {
	if v, ok := o[kind+"/"+name].(*T); ok {
		return v, nil
	}
	return nil, fmt.Errorf("%s %q %w", strings.ToLower(kind), name, source.ErrNotFound)
}

func (o objects) ConfigMap(_, name string) (*corev1.ConfigMap, error) {
	return get[corev1.ConfigMap](o, "ConfigMap", name)
}

func (o objects) Secret(_, name string) (*corev1.Secret, error) {
	return get[corev1.Secret](o, "Secret", name)
}

func (objects) Token(string, string, types.UID, string, int64) (string, time.Time, error) {
	return "", time.Time{}, source.ErrNotFound
}

// stock is what the stock kubelet makes of a pod.
type stock struct {
	QOS    corev1.PodQOSClass `json:"qos"`
	Cgroup struct {
		Memory, CPUQuota *int64
		CPUShares        *uint64
		CPUPeriod        *uint64
		HugePageLimit    map[int64]int64
	} `json:"cgroup"`
	Sandbox      map[string]any `json:"sandbox"`
	SandboxError string         `json:"sandboxError"`
	Containers   map[string]any `json:"containers"`
	Events       []string       `json:"events"`
}

// Every pod of testdata/pods/*.yaml comes out as the stock kubelet 1.37.2 has it. The
// .json files are its own answers: its functions were called with the same pod
// (with the API server's defaults, which the file also has) and the facts of
// testNode, once with cgroup v1 and once with v2 and the systemd driver. They are
// written by testdata/stock/generate.sh.
func TestStock(t *testing.T) {
	files, err := filepath.Glob("testdata/pods/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no cases", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			have, services := readObjects(t, file)
			var want struct {
				Pod     *corev1.Pod
				Cgroup1 *stock `json:"cgroup1"`
				Cgroup2 *stock `json:"cgroup2-systemd"`
			}
			readJSON(t, strings.TrimSuffix(file, ".yaml")+".json", &want)
			for v, s := range map[int]*stock{1: want.Cgroup1, 2: want.Cgroup2} {
				compareStock(t, v, want.Pod, have, services, s)
			}
		})
	}
}

func compareStock(t *testing.T, cgroup int, pod *corev1.Pod, have objects, services []Service, want *stock) {
	t.Helper()
	diff := func(what string, got, want any) {
		t.Helper()
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("cgroup v%d: %s is not the stock kubelet's (-stock +ours):\n%s", cgroup, what, d)
		}
	}
	node := testNode(t, cgroup)
	before := pod.DeepCopy()

	diff("QOS", QOS(pod), want.QOS)
	limits := PodResources(pod, node)
	diff("pod cgroup shares", &limits.CPUShares, want.Cgroup.CPUShares)
	diff("pod cgroup quota", limits.CPUQuota, want.Cgroup.CPUQuota)
	diff("pod cgroup period", limits.CPUPeriod, want.Cgroup.CPUPeriod)
	diff("pod cgroup memory", limits.Memory, want.Cgroup.Memory)
	diff("pod cgroup huge pages", limits.HugePages, want.Cgroup.HugePageLimit)

	sandbox, err := Sandbox(pod, node, 3)
	if diff("sandbox error", text(err), want.SandboxError); err == nil {
		slices.Sort(sandbox.DnsConfig.Options)
		diff("sandbox", asJSON(t, sandbox), want.Sandbox)
	}

	got := map[string]any{}
	for c := range containers(pod, allContainers) {
		got[c.Name] = containerLikeStock(t, pod, c, node, have, services)
	}
	diff("containers", got, want.Containers)

	var events []string
	_, list := DNS(pod, node)
	for _, e := range list {
		events = append(events, "Warning "+e.Reason+" "+e.Message)
	}
	diff("events", events, want.Events)
	diff("the pod itself", pod, before)
}

// containerLikeStock gives a container's configuration, or its error, in the form
// of the files.
func containerLikeStock(t *testing.T, pod *corev1.Pod, c *corev1.Container, node *Node, have objects, services []Service) any {
	t.Helper()
	ips := []string{"fd00:244::9", "10.244.1.9"}
	env, err := Env(EnvInput{Node: node, Pod: pod, Container: c, Objects: have, PodIPs: ips, Services: services})
	in := ContainerInput{Node: node, Pod: pod, Container: c, Attempt: 2, ImageRef: "sha256:abc", Image: testImage(c.Image), Env: env}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == c.Name {
			in.TargetID = "target-id"
		}
	}
	var cfg *runtimeapi.ContainerConfig
	if err == nil {
		cfg, err = Container(in)
	}
	if err != nil {
		var ce *ConfigError
		if !errors.As(err, &ce) || ce.Reason != CreateContainerConfigError {
			t.Errorf("error %#v is no ConfigError", err)
		}
		return err.Error()
	}
	envs := map[string]any{}
	for _, kv := range cfg.Envs {
		if _, twice := envs[kv.Key]; twice {
			t.Errorf("%s is in the environment twice", kv.Key)
		}
		envs[kv.Key] = string(kv.Value)
	}
	cfg.Envs = nil
	out := asJSON(t, cfg)
	out["env"] = envs
	return out
}

// testImage is an image whose name says as whom it runs.
func testImage(name string) *runtimeapi.Image {
	img := &runtimeapi.Image{}
	if _, user, ok := strings.Cut(name, "/user-"); ok {
		img.Username = user
	}
	if _, uid, ok := strings.Cut(name, "/uid-"); ok {
		img.Uid = &runtimeapi.Int64Value{}
		if _, err := fmt.Sscan(uid, &img.Uid.Value); err != nil {
			panic(err)
		}
	}
	return img
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func asJSON(t *testing.T, v any) map[string]any {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func readJSON(t *testing.T, file string, v any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// readObjects gives what comes with the pod in a file of YAML documents.
func readObjects(t *testing.T, file string) (objects, []Service) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	have := objects{}
	var services []Service
	for doc := range bytes.SplitSeq(data, []byte("\n---\n")) {
		var kind struct {
			metav1.TypeMeta
			Metadata metav1.ObjectMeta
		}
		if err := yaml.Unmarshal(doc, &kind); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		var into any
		switch kind.Kind {
		case "ConfigMap":
			into = &corev1.ConfigMap{}
		case "Secret":
			into = &corev1.Secret{}
		case "Service":
			into = &corev1.Service{}
		default:
			continue
		}
		if err := yaml.Unmarshal(doc, into); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		have[kind.Kind+"/"+kind.Metadata.Name] = into
	}
	for _, key := range slices.Sorted(maps.Keys(have)) {
		s, ok := have[key].(*corev1.Service)
		if !ok {
			continue
		}
		out := Service{Name: s.Name, ClusterIP: s.Spec.ClusterIP}
		for _, p := range s.Spec.Ports {
			out.Ports = append(out.Ports, ServicePort{Name: p.Name, Port: p.Port, Protocol: p.Protocol})
		}
		services = append(services, out)
	}
	return have, services
}
