package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// subscribeOnce gives what mosquitto_sub says of a subscription that is refused.
func subscribeOnce(t *testing.T, addr, filter string, extra ...string) string {
	t.Helper()
	args := slices.Concat(split(addr), []string{"-V", "5", "-d", "-W", "2", "-t", filter}, extra)
	out, _ := exec.Command("mosquitto_sub", args...).CombinedOutput() // it ends with an error either way
	return string(out)
}

func startCloud(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience) // also in a cleanup
	defer cancel()
	if err := fab.StartCloud(ctx, cloudArgs...); err != nil {
		t.Fatal(err)
	}
}

// (d) The cloud is killed while values move; the edge works on, is killed too
// and restarts alone; meanwhile Kubernetes changes. Afterwards both sides agree
// topic for topic, nothing deleted survives and nothing acknowledged is missing.
func TestOutage(t *testing.T) {
	s := newSite(t, "d-outage")
	const extra = `
apiVersion: fairlead.dev/v1alpha1
kind: Device
metadata: {name: %[4]s, namespace: %[1]s}
spec: {nodeName: %[2]s, model: pump, modbus: {address: "%[3]s", unit: 2}, desired: {speed: 11}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: flows, namespace: %[1]s}
data: {flow: "%[5]s"}
---
apiVersion: v1
kind: Pod
metadata: {name: web-%[5]s, namespace: %[1]s}
spec:
  nodeName: %[2]s
  containers: [{name: web, image: "example/web:1", envFrom: [{configMapRef: {name: flows}}]}]
`
	apply(t, fmt.Sprintf(extra, s.ns, s.edge.Node, s.slave.Addr, "pump-2", "one"))
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"pump":true}}}`)
	stop := make(chan struct{})
	moved := make(chan struct{})
	go func() { // values move all the time
		defer close(moved)
		for i := uint16(1); ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				s.slave.Set("input", levelInput, i)
			}
		}
	}()
	s.reading(fab.CloudLocal, "level", func(r payload.Reading) bool { return r.Good() && string(r.V) != "0" })
	eventually(t, "pod on the node", func() (string, bool) {
		m := snapshot(t, s.edge.Bus, "fl/+/desired/#")
		return fmt.Sprint(m), m[string(topic.DesiredPod(s.edge.Node, s.ns, "web-one"))] != "" && m[string(topic.DesiredDevice(s.edge.Node, s.ns, "pump-2"))] != ""
	})

	fab.Cloud.Kill()
	before := s.reading(s.edge.Bus, "level", func(r payload.Reading) bool { return r.Good() })
	s.reading(s.edge.Bus, "level", func(r payload.Reading) bool { return r.Good() && string(r.V) != string(before.V) })
	if err := s.set("speed", "66"); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 66)

	s.edge.Kill()
	s.slave.Set("holding", speedHolding, 0) // the device lost power, and its setpoint with it
	s.restartEdge()
	// Devices and targets are back from Pebble: the mapper polls...
	now := payload.Millis(time.Now())
	s.reading(s.edge.Bus, "level", func(r payload.Reading) bool { return r.Good() && r.T > now })
	target := snapshot(t, s.edge.Bus, string(s.target("speed")))[string(s.target("speed"))]
	if !strings.Contains(target, `"v":66`) {
		t.Fatalf("the acknowledged wish is missing after the kill: %q", target)
	}
	// ...and writes.
	if err := s.set("speed", "67"); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 67)

	// Meanwhile in Kubernetes.
	kubectl(t, "-n", s.ns, "delete", "device", "pump-2")
	kubectl(t, "-n", s.ns, "delete", "pod", "web-one", "--grace-period=0", "--force")
	apply(t, fmt.Sprintf(extra, s.ns, s.edge.Node, s.slave.Addr, "pump-3", "two"))
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"pump":false}}}`)

	startCloud(t)
	s.reading(fab.CloudLocal, "level", func(r payload.Reading) bool { return r.Good() && r.T > now })
	eventually(t, "the coil follows the wish made during the outage", func() (string, bool) {
		v := s.slave.Get("coil", pumpCoil)[0]
		return fmt.Sprint(v), v == 0
	})
	close(stop)
	<-moved
	eventually(t, "what was made meanwhile is on the node, what was deleted is not", func() (string, bool) {
		m := snapshot(t, s.edge.Bus, "fl/#")
		all := fmt.Sprint(m)
		return all, m[string(topic.DesiredDevice(s.edge.Node, s.ns, "pump-3"))] != "" &&
			m[string(topic.DesiredPod(s.edge.Node, s.ns, "web-two"))] != "" &&
			strings.Contains(m[string(topic.DesiredConfigMap(s.edge.Node, s.ns, "flows"))], "two") &&
			!strings.Contains(all, "pump-2") && !strings.Contains(all, "web-one")
	})
	m := s.agree()
	for k := range m {
		if strings.Contains(k, "pump-2") || strings.Contains(k, "web-one") {
			t.Errorf("%s survived its deletion", k)
		}
	}
	if tg := m[string(s.target("speed"))]; !strings.Contains(tg, `"v":67`) || !strings.Contains(tg, `"by":"local"`) {
		t.Errorf("the acknowledged local wish is missing: %q", tg)
	}
	eventually(t, "Kubernetes knows the local target", func() (string, bool) {
		out := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", `jsonpath={.status.properties[?(@.name=="speed")].target}`)
		return out, strings.Contains(out, "67")
	})
}

// (e) The cloud broker's data folder is deleted while it is down: everything is
// rebuilt from Kubernetes and from the nodes.
func TestCloudDataLost(t *testing.T) {
	s := newSite(t, "e-lost")
	s.slave.Set("input", levelInput, 5)
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"speed":30}}}`)
	s.register(speedHolding, 30)
	s.reading(fab.CloudLocal, "level", value("5"))
	s.reading(fab.CloudLocal, "speed", func(r payload.Reading) bool { return string(r.V) == "30" && r.Ack != 0 })
	eventually(t, "kubectl shows the ack", func() (string, bool) {
		out := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", `jsonpath={.status.properties[?(@.name=="speed")].desired}`)
		return out, strings.Contains(out, `"acked":true`)
	})
	want := s.agree()
	fab.Cloud.Kill()
	// A local wish that is newer than the cloud's must not be undone by the rebuild.
	if err := s.set("speed", "35"); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 35)
	if err := os.RemoveAll(filepath.Join(fab.Dir, "cloud")); err != nil {
		t.Fatal(err)
	}
	startCloud(t)
	s.reading(fab.CloudLocal, "speed", value("35"))
	got := s.agree()
	for k := range want {
		if got[k] == "" {
			t.Errorf("%s was not rebuilt", k)
		}
	}
	var tg payload.Target
	if err := json.Unmarshal([]byte(got[string(s.target("speed"))]), &tg); err != nil || tg.By != payload.ByLocal || string(tg.V) != "35" {
		t.Errorf("the local wish did not survive: %+v, %v", tg, err)
	}
	s.register(speedHolding, 35)
}

// The link goes down: the node turns NotReady without waiting for its lease.
func TestNodeNotReady(t *testing.T) {
	s := newSite(t, "h-ready")
	ready := func(want string) {
		t.Helper()
		eventually(t, "node Ready="+want, func() (string, bool) {
			out, err := fab.Kubectl(t.Context(), "get", "node", s.edge.Node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}/{.status.conditions[?(@.type=="Ready")].reason}`)
			return fmt.Sprint(string(out), err), err == nil && strings.HasPrefix(string(out), want)
		})
	}
	ready("True")
	kubectl(t, "-n", "kube-node-lease", "get", "lease", s.edge.Node)
	s.edge.Kill()
	ready("Unknown/EdgeLinkDown")
	s.restartEdge()
	ready("True")
}
