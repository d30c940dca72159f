// Writes what the stock kubelet says to each case of admit.yaml in the folder that
// is its argument. See generate.sh.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	"k8s.io/kubernetes/pkg/kubelet/preemption"
	"k8s.io/kubernetes/pkg/kubelet/sysctl"
	schedulerframework "k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/security/apparmor"
	"sigs.k8s.io/yaml"
)

type kase struct {
	Name   string         `json:"name"`
	Taints []corev1.Taint `json:"taints,omitempty"`
	Pod    *corev1.Pod    `json:"pod"`
	Others []*corev1.Pod  `json:"others,omitempty"`

	Admit   bool     `json:"admit"`
	Reason  string   `json:"reason,omitempty"`
	Message string   `json:"message,omitempty"`
	Victims []string `json:"victims,omitempty"`
}

func main() {
	dir := os.Args[1]
	data, err := os.ReadFile(filepath.Join(dir, "admit.yaml"))
	if err != nil {
		panic(err)
	}
	var cases []kase
	if err := yaml.UnmarshalStrict(data, &cases); err != nil {
		panic(err)
	}
	ctx := context.Background()
	for i := range cases {
		c := &cases[i]
		fill := func(p *corev1.Pod, name string) {
			if p.Name == "" {
				p.Name = name
			}
			p.APIVersion, p.Kind = "v1", "Pod"
			p.Namespace, p.UID = "default", types.UID("uid-"+p.Name)
			p.Status.Phase = corev1.PodPending
			legacyscheme.Scheme.Default(p)
		}
		fill(c.Pod, "pod")
		for j, o := range c.Others {
			fill(o, fmt.Sprintf("other-%d", j))
		}
		node := &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "edge-1", Labels: map[string]string{"kubernetes.io/os": "linux", "zone": "a"}},
			Spec:       corev1.NodeSpec{Taints: c.Taints},
			Status: corev1.NodeStatus{Allocatable: corev1.ResourceList{
				"cpu": resource.MustParse("2"), "memory": resource.MustParse("1Gi"), "ephemeral-storage": resource.MustParse("10Gi"), "pods": resource.MustParse("4"),
				"hugepages-2Mi": resource.MustParse("8Mi"), "example.com/meter": resource.MustParse("1"),
			}},
		}
		allow, err := sysctl.NewAllowlist(append(sysctl.SafeSysctlAllowlist(ctx), "net.core.*", "kernel.msgmax", "user.*"))
		if err != nil {
			panic(err)
		}
		rec := record.NewFakeRecorder(100)
		crit := preemption.NewCriticalPodAdmissionHandler(func() []*corev1.Pod { return c.Others }, func(p *corev1.Pod, _ bool, _ *int64, _ func(*corev1.PodStatus)) error {
			c.Victims = append(c.Victims, p.Name)
			return nil
		}, rec)
		pred := lifecycle.NewPredicateAdmitHandler(func(context.Context, bool) (*corev1.Node, error) { return node, nil }, crit,
			func(*schedulerframework.NodeInfo, *lifecycle.PodAdmitAttributes) error { return nil })
		c.Admit = true
		for _, h := range []lifecycle.PodAdmitHandler{allow, pred, lifecycle.NewAppArmorAdmitHandler(apparmor.NewValidator()), lifecycle.NewPodFeaturesAdmitHandler()} {
			r := h.Admit(ctx, &lifecycle.PodAdmitAttributes{Pod: c.Pod, OtherPods: c.Others, Operation: lifecycle.AddOperation})
			if !r.Admit {
				c.Admit, c.Reason, c.Message = false, r.Reason, r.Message
				break
			}
		}
	}
	out, err := json.MarshalIndent(cases, "", " ")
	if err != nil {
		panic(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "admit.json"), append(out, '\n'), 0o644); err != nil {
		panic(err)
	}
	for _, c := range cases {
		fmt.Println(c.Name, "|", c.Admit, c.Reason, "|", c.Message, c.Victims)
	}
}
