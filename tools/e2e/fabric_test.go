package e2e

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// (a) A device is applied; its values appear on both brokers and in Kubernetes.
func TestValuesAppearEverywhere(t *testing.T) {
	s := newSite(t, "a-values")
	s.slave.Set("input", levelInput, 1234)
	bits := math.Float32bits(21.5)
	s.slave.Set("holding", tempHolding, uint16(bits>>16), uint16(bits))
	for _, addr := range []string{s.edge.Bus, fab.CloudLocal} {
		s.reading(addr, "level", value("1234"))
		r := s.reading(addr, "temp", value("21.5"))
		if r.T == 0 || r.Q != "" {
			t.Errorf("reading %+v has no time, or a quality", r)
		}
	}
	eventually(t, "kubectl shows the values", func() (string, bool) {
		y := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", "yaml")
		return y, strings.Contains(y, "value: 1234") && strings.Contains(y, "value: 21.5") && strings.Contains(y, "state: Online")
	})
	eventually(t, "kubectl get devices is useful", func() (string, bool) {
		out := kubectl(t, "-n", s.ns, "get", "devices")
		return out, strings.Contains(out, s.edge.Node) && strings.Contains(out, "modbus") && strings.Contains(out, "Online")
	})
	eventually(t, "the node is ready", func() (string, bool) {
		out := kubectl(t, "get", "node", s.edge.Node)
		return out, strings.Contains(out, " Ready ") && strings.Contains(out, "edge")
	})
}

// (b) A desired value is patched; the register changes and the ack carries the rev.
func TestPatchReachesRegister(t *testing.T) {
	s := newSite(t, "b-patch")
	s.reading(s.edge.Bus, "speed", value("0"))
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"speed":40,"pump":true}}}`)
	s.register(speedHolding, 40)
	var w payload.Wish
	if err := json.Unmarshal([]byte(snapshot(t, fab.CloudLocal, string(topic.DesiredTwin(s.edge.Node, s.ns, "pump-1", "speed")))[string(topic.DesiredTwin(s.edge.Node, s.ns, "pump-1", "speed"))]), &w); err != nil || w.Rev == 0 {
		t.Fatalf("wish %+v: %v", w, err)
	}
	for _, addr := range []string{s.edge.Bus, fab.CloudLocal} {
		s.reading(addr, "speed", func(r payload.Reading) bool { return r.Ack == w.Rev && r.Err == "" && string(r.V) == "40" })
	}
	eventually(t, "the coil is on", func() (string, bool) {
		v := s.slave.Get("coil", pumpCoil)[0]
		return fmt.Sprint(v), v == 1
	})
	eventually(t, "kubectl shows the ack", func() (string, bool) {
		out := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", `jsonpath={.status.properties[?(@.name=="speed")].desired}`)
		return out, strings.Contains(out, `"acked":true`) && strings.Contains(out, fmt.Sprint(w.Rev))
	})
	// What cannot work is refused by the API server, with the reason.
	for patch, reason := range map[string]string{
		`{"spec":{"desired":{"speed":140}}}`:    "speed",
		`{"spec":{"desired":{"speed":"fast"}}}`: "speed",
		`{"spec":{"desired":{"level":1}}}`:      "level",
		`{"spec":{"desired":{"volume":1}}}`:     "volume",
	} {
		_, err := fab.Kubectl(t.Context(), "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", patch)
		if err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("patch %s: got %v, want a refusal that names %s", patch, err, reason)
		}
	}
}

// Local wishes are validated at the broker and answered by reason code.
func TestLocalSet(t *testing.T) {
	s := newSite(t, "b-local")
	s.reading(s.edge.Bus, "speed", value("0"))
	if err := s.set("speed", "55"); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 55)
	for _, c := range []struct{ property, v, want string }{
		{"speed", "140", "above the maximum 100"},
		{"speed", `"fast"`, "is not a uint16"},
		{"speed", "4.5", "whole number"},
		{"speed", "{", "not JSON"},
		{"level", "1", "read only"},
		{"volume", "1", "no property"},
	} {
		err := s.set(c.property, c.v)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("set %s to %s: got %v, want %q", c.property, c.v, err, c.want)
		}
	}
	s.register(speedHolding, 55)
	// The newer wish holds, whoever made it.
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"speed":60}}}`)
	s.register(speedHolding, 60)
	if err := s.set("speed", `{"v":65}`); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 65)
	// The cloud sees the local target, and who wished.
	w := watch(t, fab.CloudLocal, string(s.target("speed")))
	w.until(t, "the local target is known to the cloud", func(_ string, p []byte) bool {
		var tg payload.Target
		return json.Unmarshal(p, &tg) == nil && tg.By == payload.ByLocal && string(tg.V) == "65" && tg.Who != ""
	})
}

// (c) A ConfigMap and a Pod bound to the node appear as readable topics, change
// and disappear. A ConfigMap that nobody there references does not appear.
func TestPodAndConfigMap(t *testing.T) {
	s := newSite(t, "c-pods")
	eventually(t, "the node exists", func() (string, bool) {
		_, err := fab.Kubectl(t.Context(), "get", "node", s.edge.Node)
		return fmt.Sprint(err), err == nil
	})
	const podYAML = `
apiVersion: v1
kind: ConfigMap
metadata: {name: flows, namespace: %[1]s}
data: {flow: "%[3]s"}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: unrelated, namespace: %[1]s}
data: {a: b}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: %[1]s, labels: {version: "%[3]s"}}
spec:
  nodeName: %[2]s
  containers:
  - name: web
    image: example/web:1
    envFrom: [{configMapRef: {name: flows}}]
`
	apply(t, fmt.Sprintf(podYAML, s.ns, s.edge.Node, "one"))
	pod, cm := string(topic.DesiredPod(s.edge.Node, s.ns, "web")), string(topic.DesiredConfigMap(s.edge.Node, s.ns, "flows"))
	wants := func(version string) {
		t.Helper()
		for _, addr := range []string{s.edge.Bus, fab.CloudLocal} {
			eventually(t, "pod and config map at version "+version, func() (string, bool) {
				m := snapshot(t, addr, string(topic.NodeAll(s.edge.Node)))
				return m[pod] + m[cm], strings.Contains(m[pod], `"example/web:1"`) && strings.Contains(m[pod], version) && strings.Contains(m[cm], version)
			})
		}
	}
	wants("one")
	if m := snapshot(t, s.edge.Bus, string(topic.NodeAll(s.edge.Node))); m[string(topic.DesiredConfigMap(s.edge.Node, s.ns, "unrelated"))] != "" {
		t.Error("a config map that no pod of the node references is on the node")
	}
	apply(t, fmt.Sprintf(podYAML, s.ns, s.edge.Node, "two"))
	wants("two")
	kubectl(t, "-n", s.ns, "delete", "pod", "web", "--wait=false")
	for _, addr := range []string{s.edge.Bus, fab.CloudLocal} {
		eventually(t, "pod and config map are gone", func() (string, bool) {
			m := snapshot(t, addr, string(topic.NodeAll(s.edge.Node)))
			return m[pod] + m[cm], m[pod] == "" && m[cm] == ""
		})
	}
}

// (f) Two nodes: neither sees nor can write the other's topics.
func TestNodesAreApart(t *testing.T) {
	one, two := newSite(t, "f-one"), newSite(t, "f-two")
	one.reading(fab.CloudLocal, "level", value("0"))
	two.reading(fab.CloudLocal, "level", value("0"))
	one.agree()
	for _, pair := range [][2]*site{{one, two}, {two, one}} {
		if m := snapshot(t, pair[0].edge.Bus, "fl/"+pair[1].edge.Node+"/#"); len(m) > 0 {
			t.Errorf("node %s holds topics of %s: %v", pair[0].edge.Node, pair[1].edge.Node, m)
		}
	}
	// With node one's own credential, on the cloud broker.
	token, err := fab.Token(t.Context(), "f-one")
	if err != nil {
		t.Fatal(err)
	}
	auth := []string{"-u", "f-one", "-P", readFile(t, token)}
	if err := publish(fab.CloudMQTT, string(topic.ReportedNode("f-two")), "{}", append(auth, "-r")...); err == nil || !strings.Contains(err.Error(), "f-one may publish below fl/f-one/ only") {
		t.Errorf("a node wrote another's topic: %v", err)
	}
	if err := publish(fab.CloudMQTT, string(topic.DesiredDigest("f-one")), "{}", append(auth, "-r")...); err == nil || !strings.Contains(err.Error(), "written by the cloud") {
		t.Errorf("a node wrote the cloud's topic: %v", err)
	}
	if out := subscribeOnce(t, fab.CloudMQTT, "fl/f-two/#", auth...); !strings.Contains(out, "denied") {
		t.Errorf("a node subscribed to another's topics: %s", out)
	}
	// Without a credential, or with the wrong one, nobody gets in at all.
	for _, bad := range [][]string{nil, {"-u", "f-one", "-P", "wrong"}, {"-u", "nobody", "-P", readFile(t, token)}} {
		if err := publish(fab.CloudMQTT, string(topic.ReportedNode("f-one")), "{}", append(bad, "-r")...); err == nil {
			t.Errorf("credential %v was let in", bad)
		}
	}
}

// (g) The slave stops answering: the quality turns bad, the last value is kept,
// never 0; then it recovers.
func TestDeadSlave(t *testing.T) {
	s := newSite(t, "g-dead")
	s.slave.Set("input", levelInput, 77)
	s.reading(fab.CloudLocal, "level", value("77"))
	for name, fault := range map[string]struct{ kill, heal func() }{
		"silent": {s.slave.Pause, s.slave.Resume},
		"gone": {s.slave.Kill, func() {
			if err := s.slave.Restart(); err != nil {
				t.Fatal(err)
			}
			s.slave.Set("input", levelInput, 77)
		}},
	} {
		zero := watch(t, fab.CloudLocal, string(s.twin("level")))
		fault.kill()
		zero.until(t, name+": quality turns bad", func(_ string, p []byte) bool {
			var r payload.Reading
			if err := json.Unmarshal(p, &r); err != nil {
				t.Fatalf("%s: %v", p, err)
			}
			if string(r.V) == "0" {
				t.Errorf("%s: a dead slave's value is 0: %s", name, p)
			}
			return strings.HasPrefix(r.Q, "bad:") && string(r.V) == "null" && string(r.LV) == "77"
		})
		eventually(t, "kubectl shows the bad quality", func() (string, bool) {
			y := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", "yaml")
			return y, strings.Contains(y, "quality: bad:") && strings.Contains(y, "lastValue: 77")
		})
		fault.heal()
		s.reading(fab.CloudLocal, "level", value("77"))
		eventually(t, "kubectl shows the recovery", func() (string, bool) {
			y := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", "yaml")
			return y, strings.Contains(y, "value: 77") && strings.Contains(y, "state: Online")
		})
	}
}

// The mapper dies: its values must not look alive for ever; another one takes over.
func TestDeadMapper(t *testing.T) {
	s := newSite(t, "g-mapper")
	s.slave.Set("input", levelInput, 77)
	s.reading(fab.CloudLocal, "level", value("77"))
	s.mapper.Kill()
	s.reading(fab.CloudLocal, "level", func(r payload.Reading) bool {
		return r.Q == payload.QualityStale && string(r.V) == "null" && string(r.LV) == "77"
	})
	eventually(t, "kubectl says what is wrong", func() (string, bool) {
		y := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", "yaml")
		return y, strings.Contains(y, "state: Offline") && strings.Contains(y, "mapper modbus is not connected")
	})
	var err error
	if s.mapper, err = fab.StartMapper(t.Context(), s.edge); err != nil {
		t.Fatal(err)
	}
	s.reading(fab.CloudLocal, "level", value("77"))
	eventually(t, "the device is back", func() (string, bool) {
		y := kubectl(t, "-n", s.ns, "get", "device", "pump-1", "-o", "yaml")
		return y, strings.Contains(y, "state: Online") && !strings.Contains(y, "not connected")
	})
}
