package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker"
	twinengine "github.com/fairlead-io/fairlead/edge/twin"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

var update = flag.Bool("update", false, "rewrite the goldens in testdata")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// now is the time of every test; the seeded payloads lie before it.
const now = int64(1790000000000)

const (
	node = "plant-7"
	uid  = "5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11"
)

func raw(s string) json.RawMessage { return json.RawMessage(s) }

func number(s string) *json.Number { n := json.Number(s); return &n }

var pump = device.Device{
	UID: uid, Rev: now - 3600_000, Namespace: "default", Name: "pump-1", Model: "pump-station", Protocol: "modbus",
	Modbus: &device.ModbusDevice{Address: "192.168.1.20:502", Unit: 1},
	Properties: []device.Property{
		{Name: "speedSetpoint", Type: device.Uint16, Unit: "%", Access: device.ReadWrite, Min: number("0"), Max: number("100")},
		{Name: "pressure", Type: device.Float64, Unit: "bar"},
		{Name: "mode", Type: device.String, Access: device.ReadWrite, MaxLength: 8},
		{Name: "temperature", Type: device.Float64, Unit: "°C"},
		{Name: "trim", Type: device.Int16, Access: device.WriteOnly},
		{Name: "alarm", Type: device.Bool},
	},
}

var valve = device.Device{
	UID: "aa0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c22", Rev: now - 7200_000, Namespace: "plant", Name: "valve", Model: "valve", Protocol: "modbus",
	Properties: []device.Property{{Name: "angle", Type: device.Int16, Unit: "°", Access: device.ReadWrite}},
}

// seed gives what both brokers hold of a node: topic → payload.
func seed() (desired, reported map[topic.Topic]any) {
	desired = map[topic.Topic]any{
		topic.DesiredDevice(node, "default", "pump-1"):                &pump,
		topic.DesiredDevice(node, "plant", "valve"):                   &valve,
		topic.DesiredTwin(node, "default", "pump-1", "speedSetpoint"): payload.Wish{V: raw("60"), Rev: now - 90_000, UID: uid},
		topic.DesiredConfigMap(node, "default", "web"):                map[string]any{"data": map[string]string{"index.html": "hello"}},
	}
	reported = map[topic.Topic]any{
		topic.ReportedNode(node):                                         payload.Node{Agent: "v0.1.0", OS: "linux", Arch: "arm64", CPUs: 4, MemoryBytes: 1 << 30},
		topic.ReportedDevice(node, "default", "pump-1"):                  payload.DeviceStatus{UID: uid, Rev: pump.Rev, State: payload.DeviceError, Since: now - 42_000, Error: "temperature: no answer within 500ms", Mapper: "modbus"},
		topic.ReportedTarget(node, "default", "pump-1", "speedSetpoint"): payload.Target{V: raw("60"), Rev: now - 90_000, UID: uid, By: payload.ByCloud, T: now - 89_990},
		topic.ReportedTarget(node, "default", "pump-1", "mode"):          payload.Target{V: raw(`"auto"`), Rev: now - 5_000, UID: uid, By: payload.ByLocal, Who: "local/node-red", T: now - 5_000},
		topic.ReportedTarget(node, "default", "pump-1", "trim"):          payload.Target{V: raw("7"), Rev: now - 4_000, UID: uid, By: payload.ByLocal, Who: "local/node-red", T: now - 4_000},
		topic.ReportedTwin(node, "default", "pump-1", "speedSetpoint"):   payload.Reading{V: raw("60"), T: now - 300, Ack: now - 90_000},
		topic.ReportedTwin(node, "default", "pump-1", "pressure"):        payload.Reading{V: raw("3.42"), T: now - 1_200},
		topic.ReportedTwin(node, "default", "pump-1", "mode"):            payload.Reading{V: raw(`"manual"`), T: now - 2_000},
		topic.ReportedTwin(node, "default", "pump-1", "temperature"):     payload.Reading{V: raw("null"), LV: raw("41.5"), T: now - 42_000, Q: payload.QualityTimeout},
		topic.ReportedTwin(node, "default", "pump-1", "trim"):            payload.Reading{V: raw("null"), T: now - 3_900, Ack: now - 4_000, Err: "range"},
	}
	return desired, reported
}

func encode(v any) []byte { return payload.Encode(v) }

func sum(set map[topic.Topic]any) payload.Digest {
	s := digest.NewSet()
	for t, v := range set {
		s.Put(string(t), encode(v))
	}
	return payload.Digest{Epoch: "7f3a9c", Count: s.Count(), Sum: s.Sum()}
}

// open opens a real broker; with engine it is a node's own bus.
func open(t *testing.T, ownNode string) (*broker.Broker, string) {
	t.Helper()
	o := broker.Options{
		Dir: t.TempDir(), Node: ownNode,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) {
			if ownNode == "" {
				return access.Identity{Role: access.Operator}, nil
			}
			return access.Identity{Role: access.Local}, nil
		},
	}
	var engine *twinengine.Engine
	if ownNode != "" {
		engine = twinengine.New(twinengine.Config{Node: ownNode, Now: func() time.Time { return time.UnixMilli(now) }})
		o.Interceptors = []broker.Interceptor{engine}
	}
	b, err := broker.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	if engine != nil {
		if err := engine.Start(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	addr, err := b.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return b, addr
}

func put(t *testing.T, b *broker.Broker, tp topic.Topic, v any) {
	t.Helper()
	p := []byte(nil)
	if v != nil {
		p = encode(v)
	}
	if err := b.Publish(t.Context(), broker.Message{Topic: tp, Payload: p, QoS: 1, Retain: true}); err != nil {
		t.Fatalf("publish %s: %v", tp, err)
	}
}

func putAll(t *testing.T, b *broker.Broker, sets ...map[topic.Topic]any) {
	t.Helper()
	for _, set := range sets {
		for tp, v := range set { // devices first, the twin engine wants to know them
			if p, err := topic.Parse(string(tp)); err == nil && p.Kind == topic.KindDesiredDevice {
				put(t, b, tp, v)
			}
		}
		for tp, v := range set {
			if p, err := topic.Parse(string(tp)); err != nil || p.Kind != topic.KindDesiredDevice {
				put(t, b, tp, v)
			}
		}
	}
}

// cloud opens a cloud broker with two nodes, one of them gone.
func cloud(t *testing.T) (*broker.Broker, string) {
	b, url := open(t, "")
	desired, reported := seed()
	putAll(t, b, desired, reported)
	put(t, b, topic.DesiredDigest(node), sum(desired))
	put(t, b, topic.ReportedDigest(node), sum(reported))
	put(t, b, topic.ReportedLink(node), payload.Link{Online: true, Since: now - 300_000, Agent: "v0.1.0"})
	put(t, b, topic.ReportedLink("plant-8"), payload.Link{Online: false, Since: now - 86400_000*3, Agent: "v0.0.9"})
	put(t, b, topic.ReportedNode("plant-8"), payload.Node{Agent: "v0.0.9", OS: "linux", Arch: "amd64", CPUs: 2, StoreError: "no space left on device"})
	put(t, b, topic.ReportedDigest("plant-8"), payload.Digest{Epoch: "00", Count: 1})
	if err := b.Publish(t.Context(), broker.Message{Topic: "site/shift", Payload: []byte("night"), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	return b, url
}

// edge opens a node's own bus.
func edge(t *testing.T) (*broker.Broker, string) {
	b, url := open(t, node)
	desired, reported := seed()
	putAll(t, b, desired, reported)
	put(t, b, topic.ReportedLink(node), payload.Link{Online: false, Since: now - 300_000, Agent: "v0.1.0"})
	return b, url
}

// result is what a command said.
type result struct {
	out, errOut bytes.Buffer
	err         error
}

func fairlead(t *testing.T, args ...string) *result {
	t.Helper()
	return fairleadIn(t.Context(), args...)
}

func fairleadIn(ctx context.Context, args ...string) *result {
	r := &result{}
	a := &app{out: &r.out, errOut: &r.errOut, terminal: true, now: func() time.Time { return time.UnixMilli(now).UTC() }}
	r.err = a.run(ctx, args)
	return r
}

var (
	address = regexp.MustCompile(`mqtt://127\.0\.0\.1:\d+`)
	newRev  = regexp.MustCompile(`\b179\d{10}\b`)
)

func (r *result) String() string {
	s := r.out.String()
	if r.errOut.Len() > 0 {
		s += "--- stderr\n" + r.errOut.String()
	}
	if r.err != nil {
		s += "--- error, exit code 1\n" + r.err.Error() + "\n"
	}
	return address.ReplaceAllString(s, "BROKER")
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v; make it with -update", err)
	}
	if string(want) != got {
		t.Errorf("%s differs (rewrite with -update)\n--- want\n%s--- got\n%s", path, want, got)
	}
}

// TestListings pins what a person sees, from a real broker.
func TestListings(t *testing.T) {
	_, cloudURL := cloud(t)
	_, edgeURL := edge(t)
	_, emptyURL := open(t, "")
	for _, c := range []struct{ name, args string }{
		{"nodes-cloud", "nodes --broker CLOUD"},
		{"nodes-edge", "nodes --broker EDGE"},
		{"nodes-json", "nodes --broker CLOUD -o json"},
		{"nodes-none", "nodes --broker EMPTY"},
		{"devices-cloud", "devices --broker CLOUD"},
		{"devices-edge", "devices --broker EDGE"},
		{"devices-json", "devices --broker CLOUD -o json -n plant"},
		{"devices-none", "devices --broker EMPTY"},
		{"twin-get", "twin get --broker CLOUD"},
		{"twin-get-device", "twin get pump-1 --broker EDGE"},
		{"twin-get-property", "twin get pump-1/temperature --broker EDGE"},
		{"twin-get-namespace", "twin get plant/valve --broker EDGE"},
		{"twin-get-json", "twin get pump-1/trim --broker EDGE -o json"},
		{"twin-get-no-property", "twin get pump-1/presure --broker EDGE"},
		{"twin-get-no-device", "twin get pump-2 --broker EDGE"},
		{"twin-watch", "twin watch --broker EDGE --for 400ms"},
		{"twin-watch-json", "twin watch pump-1/pressure --broker EDGE --for 400ms -o json"},
		{"topics", "topics --broker CLOUD"},
		{"topics-filter", "topics fl/+/reported/target/# --broker CLOUD"},
		{"topics-tree", "topics --tree --broker CLOUD"},
		{"topics-none", "topics nothing/here --broker CLOUD"},
		{"topics-filter-wrong", "topics fl/#/twin --broker CLOUD"},
		{"trace-wish", "trace fl/plant-7/desired/twin/default/pump-1/speedSetpoint --once --broker CLOUD --edge-broker EDGE"},
		{"trace-wish-cloud-only", "trace fl/plant-7/desired/twin/default/pump-1/speedSetpoint --once --broker CLOUD"},
		{"trace-local", "trace fl/plant-7/set/default/pump-1/mode --once --broker CLOUD --edge-broker EDGE"},
		{"trace-refused", "trace fl/plant-7/set/default/pump-1/trim --once --broker EDGE"},
		{"trace-device", "trace fl/plant-7/desired/device/default/pump-1 --once --broker CLOUD --edge-broker EDGE"},
		{"trace-reported", "trace fl/plant-7/reported/node --once --broker CLOUD"},
		{"trace-nobody", "trace fl/plant-7/desired/twin/plant/valve/angle --once --broker CLOUD"},
		{"trace-json", "trace fl/plant-7/desired/configmap/default/web --once --broker CLOUD --edge-broker EDGE -o json"},
		{"trace-reading", "trace fl/plant-7/reported/twin/default/pump-1/pressure --once --broker CLOUD --edge-broker EDGE"},
		{"trace-event", "trace fl/plant-7/event/alarm/x --broker CLOUD"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // nobody writes; most of the time is spent waiting for the broker to be quiet
			args := strings.Fields(strings.NewReplacer("CLOUD", cloudURL, "EDGE", edgeURL, "EMPTY", emptyURL).Replace(c.args))
			golden(t, c.name, "$ fairlead "+c.args+"\n"+fairlead(t, args...).String())
		})
	}
}

// TestMistakes pins the errors of bad input.
func TestMistakes(t *testing.T) {
	t.Setenv(brokerVariable, "")
	silent := silentListener(t)
	notKube := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notKube, []byte("hello: [\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	deaf := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(deaf, []byte(`apiVersion: v1
kind: Config
current-context: a
contexts: [{name: a, context: {cluster: a, user: a}}]
clusters: [{name: a, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: a, user: {}}]
`), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBECONFIG", deaf) // must not be read
	for _, c := range []struct{ args, want string }{
		{"nodes --broker mqtt://127.0.0.1:1", "no broker at mqtt://127.0.0.1:1: connection refused; is the agent running?"},
		{"nodes --broker unix:///nowhere/sock", "no broker at unix:///nowhere/sock: no such file or directory; is the agent running?"},
		{"nodes --timeout 200ms --broker " + silent, "no answer from broker " + silent + " within 200ms; is the agent running?"},
		{"nodes --broker carrier-pigeon://x", `scheme "carrier-pigeon" is not one of mqtt`},
		{"nodes --output yaml", `--output "yaml": want table or json`},
		{"nodes --timeout 0s", "--timeout 0s: want more than 0"},
		{"nodes --broker x --kubeconfig y", "ask one of them"},
		{"nodes --kubeconfig /nowhere", "--kubeconfig /nowhere: no such file"},
		{"nodes --kubeconfig " + notKube, "is not a kubeconfig"},
		{"devices --kubeconfig " + deaf, "no answer from the Kubernetes API at http://127.0.0.1:1: connection refused; is the cluster of"},
		{"token list", "no cluster named: give --kubeconfig FILE"},
		{"token create --node plant-7", "no cluster named: give --kubeconfig FILE"},
		{"token create", `required flag(s) "node" not set`},
		{"topics --kubeconfig x", "fairlead topics asks a broker"},
		{"twin set pump-1 4", `"pump-1": want [namespace/]device/property`},
		{"twin set a/b/c/d 4", "want [namespace/]device[/property]"},
		{"twin set Pump/speed 4", "want lower case"},
		{"twin set pump-1/speed 4 --if -3", "cannot be negative"},
		{"twin set pump-1/speed 4 --exp 3m --kubeconfig " + deaf, "are for local wishes"},
		{"trace site/shift", "does not begin with fl/"},
		{"nodse", `unknown command "nodse"`},
	} {
		r := fairlead(t, strings.Fields(c.args)...)
		if r.err == nil || !strings.Contains(r.err.Error(), c.want) {
			t.Errorf("fairlead %s\n got error: %v\nwant one with: %s", c.args, r.err, c.want)
		}
		if r.out.Len() > 0 {
			t.Errorf("fairlead %s: printed %q", c.args, r.out.String())
		}
	}
}
