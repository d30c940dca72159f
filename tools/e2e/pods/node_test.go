package pods

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// TestNode compares what the two nodes say about the same machine.
func TestNode(t *testing.T) {
	get := func(n *node) *corev1.Node {
		o, err := kube.CoreV1().Nodes().Get(t.Context(), n.name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	// The agent reports what changes, a moment after it found out.
	var diff []string
	for deadline := time.Now().Add(patience / 6); ; time.Sleep(time.Second) {
		diff = compareNodes(describe(get(stock), stock.name), describe(get(agent), agent.name))
		if len(diff) == 0 || time.Now().After(deadline) {
			break
		}
	}
	for _, d := range diff {
		t.Error(d)
	}
}

func compareNodes(theirs, ours map[string]string) (diff []string) {
	for _, k := range slices.Sorted(maps.Keys(theirs)) {
		if theirs[k] != ours[k] && nodeDiffers[k] == "" {
			diff = append(diff, fmt.Sprintf("%s: kubelet %q, agent %q", k, theirs[k], ours[k]))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(ours)) {
		if _, ok := theirs[k]; !ok && !strings.HasPrefix(k, "condition Edge") {
			diff = append(diff, fmt.Sprintf("%s: only the agent has it: %q", k, ours[k]))
		}
	}
	return diff
}

// nodeDiffers are what may differ, and why.
var nodeDiffers = map[string]string{
	"condition Ready": "the reason is the link's, which is what the cloud goes by",
}

func describe(n *corev1.Node, name string) map[string]string {
	s := &n.Status
	m := map[string]string{
		"info machine id": s.NodeInfo.MachineID, "info system uuid": s.NodeInfo.SystemUUID, "info boot id": s.NodeInfo.BootID,
		"info kernel": s.NodeInfo.KernelVersion, "info os": s.NodeInfo.OSImage, "info runtime": s.NodeInfo.ContainerRuntimeVersion,
		"info os kind": s.NodeInfo.OperatingSystem, "info architecture": s.NodeInfo.Architecture,
		"label os": n.Labels[corev1.LabelOSStable], "label arch": n.Labels[corev1.LabelArchStable],
		"label hostname": strings.ReplaceAll(n.Labels[corev1.LabelHostname], name, "NODE"),
	}
	for k, q := range s.Capacity {
		m["capacity "+string(k)] = q.String()
	}
	for k := range s.Allocatable {
		m["allocatable "+string(k)] = "set" // the amounts depend on settings
	}
	for _, a := range s.Addresses {
		m["address "+string(a.Type)] += strings.ReplaceAll(a.Address, name, "NODE") + " "
	}
	for _, c := range s.Conditions {
		m["condition "+string(c.Type)] = fmt.Sprintf("%s %s", c.Status, c.Reason)
	}
	var images []string
	for _, i := range s.Images {
		for _, n := range i.Names {
			if n == testruntime.Busybox || n == testruntime.Pause { // other tests bring others
				images = append(images, fmt.Sprintf("%s %d", n, i.SizeBytes))
			}
		}
	}
	slices.Sort(images)
	m["images"] = strings.Join(images, ", ")
	return m
}
