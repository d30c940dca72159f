// Writes, for each pod of the folder that is its argument, what the stock kubelet
// makes of it. See generate.sh.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	containertest "k8s.io/kubernetes/pkg/kubelet/container/testing"
	"k8s.io/kubernetes/pkg/kubelet/kuberuntime"
)

type images struct {
	internalapi.ImageManagerService
}

func (images) ImageStatus(_ context.Context, s *runtimeapi.ImageSpec, _ bool) (*runtimeapi.ImageStatusResponse, error) {
	img := &runtimeapi.Image{Id: "sha256:" + s.Image}
	if _, u, ok := strings.Cut(s.Image, "/uid-"); ok {
		var n int64
		fmt.Sscan(u, &n)
		img.Uid = &runtimeapi.Int64Value{Value: n}
	}
	if _, u, ok := strings.Cut(s.Image, "/user-"); ok {
		img.Username = u
	}
	return &runtimeapi.ImageStatusResponse{Image: img}, nil
}

type result struct {
	QOS        corev1.PodQOSClass `json:"qos"`
	Cgroup     any                `json:"cgroup"`
	Sandbox    any                `json:"sandbox,omitempty"`
	SandboxErr string             `json:"sandboxError,omitempty"`
	Containers map[string]any     `json:"containers"`
	Events     []string           `json:"events,omitempty"`
}

const resolv = `# the site's
nameserver 192.168.7.1
nameserver 192.168.7.2
search old.example
search plant.example. corp.example .
options ndots:1 rotate
options ndots:3
`

func normalize(v any) any {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	var out map[string]any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&out); err != nil {
		panic(err)
	}
	delete(out, "mounts")
	return out
}

func container(c *runtimeapi.ContainerConfig) any {
	env := map[string]string{}
	for _, e := range c.Envs {
		env[e.Key] = string(e.Value)
	}
	c.Envs = nil
	out := normalize(c).(map[string]any)
	out["env"] = env
	return out
}

func main() {
	dir := os.Args[1]
	files, _ := filepath.Glob(filepath.Join(dir, "*.yaml"))
	rc := filepath.Join(os.TempDir(), "parity-resolv.conf")
	os.WriteFile(rc, []byte(resolv), 0o644)
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			panic(err)
		}
		n := &kubelet.ParityNode{
			Node: &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "edge-1"}, Status: corev1.NodeStatus{
				Allocatable: corev1.ResourceList{"cpu": resource.MustParse("3800m"), "memory": resource.MustParse("3Gi"), "ephemeral-storage": resource.MustParse("20Gi"), "pods": resource.MustParse("110")},
				Addresses:   []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.7.20"}, {Type: corev1.NodeInternalIP, Address: "fd00::20"}},
			}},
			NodeIPs: []string{"192.168.7.20", "fd00::20"}, ClusterDNS: []string{"10.96.0.10"}, ClusterDomain: "cluster.local", ResolvConf: rc,
		}
		var pod *corev1.Pod
		for _, doc := range bytes.Split(data, []byte("\n---\n")) {
			j, err := yaml.ToJSON(doc)
			if err != nil {
				panic(err)
			}
			var k metav1.TypeMeta
			json.Unmarshal(j, &k)
			switch k.Kind {
			case "Pod":
				pod = &corev1.Pod{}
				err = json.Unmarshal(j, pod)
			case "ConfigMap":
				o := &corev1.ConfigMap{}
				err = json.Unmarshal(j, o)
				n.ConfigMaps = append(n.ConfigMaps, o)
			case "Secret":
				o := &corev1.Secret{}
				err = json.Unmarshal(j, o)
				n.Secrets = append(n.Secrets, o)
			case "Service":
				o := &corev1.Service{}
				err = json.Unmarshal(j, o)
				n.Services = append(n.Services, o)
			}
			if err != nil {
				panic(err)
			}
		}
		legacyscheme.Scheme.Default(pod)
		out := map[string]any{"pod": pod}
		for _, v2 := range []bool{false, true} {
			ctx := context.Background()
			n.Systemd = v2
			h := kubelet.NewParity(n)
			p := kuberuntime.NewParity(h, images{}, 4<<30, v2, true, "/var/lib/seccomp", "/var/log/pods", &containertest.FakeOS{})
			r := &result{QOS: v1qos.GetPodQOS(pod), Containers: map[string]any{}}
			rc := cm.ResourceConfigForPod(pod, true, 100000, v2, "None")
			r.Cgroup = rc
			s, err := p.Sandbox(ctx, pod, 3)
			if err != nil {
				r.SandboxErr = err.Error()
			} else {
				slices.Sort(s.DnsConfig.Options)
				r.Sandbox = normalize(s)
			}
			ips := []string{"fd00:244::9", "10.244.1.9"}
			do := func(c *corev1.Container, target string) {
				cfg, err := p.Container(ctx, pod, c, 2, "sha256:abc", ips, target)
				if err != nil {
					r.Containers[c.Name] = err.Error()
				} else {
					r.Containers[c.Name] = container(cfg)
				}
			}
			for i := range pod.Spec.InitContainers {
				do(&pod.Spec.InitContainers[i], "")
			}
			for i := range pod.Spec.Containers {
				do(&pod.Spec.Containers[i], "")
			}
			for i := range pod.Spec.EphemeralContainers {
				do((*corev1.Container)(&pod.Spec.EphemeralContainers[i].EphemeralContainerCommon), "target-id")
			}
		events:
			for {
				select {
				case e := <-h.Recorder.Events:
					if !strings.HasPrefix(e, "Warning MissingClusterDNS kubelet") && !slices.Contains(r.Events, e) {
						r.Events = append(r.Events, e)
					}
				default:
					break events
				}
			}
			name := "cgroup1"
			if v2 {
				name = "cgroup2-systemd"
			}
			out[name] = r
		}
		b, err := json.MarshalIndent(out, "", " ")
		if err != nil {
			panic(err)
		}
		if err := os.WriteFile(strings.TrimSuffix(f, ".yaml")+".json", append(b, '\n'), 0o644); err != nil {
			panic(err)
		}
	}
}
