package payload_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

var update = flag.Bool("update", false, "rewrite the goldens in testdata")

func raw(s string) json.RawMessage { return json.RawMessage(s) }

func num(s string) *json.Number { n := json.Number(s); return &n }

func hash(s string) digest.Hash { return digest.Of(s, []byte("payload")) }

const (
	at  = 1790000000123
	uid = "5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11"
)

// goldens are the payloads as they travel. The file's name begins with the name
// of its schema in schemas/jsonschema.
var goldens = map[string]any{
	"link.online":  payload.Link{Online: true, Since: at, Agent: "v0.1.0", Epoch: "0mua3bk9nx4f2", Host: "plant-7 10.1.2.3"},
	"link.will":    payload.Link{Since: at, Agent: "v0.1.0", Epoch: "0mua3bk9nx4f2", Host: "plant-7 10.1.2.3"},
	"digest":       payload.Digest{Epoch: "7f3a9c", Count: 2, Sum: hash("a")},
	"digest.empty": payload.Digest{Epoch: "7f3a9c"},

	"reading.good":    payload.Reading{V: raw("21.5"), T: at},
	"reading.bad":     payload.Reading{V: raw("null"), LV: raw("3.2"), T: at, Q: payload.QualityTimeout},
	"reading.never":   payload.Reading{V: raw("null"), T: at, Q: payload.QualityUnreachable},
	"reading.acked":   payload.Reading{V: raw("40"), T: at, Ack: at - 100},
	"reading.refused": payload.Reading{V: raw("40"), T: at, Ack: at - 100, Err: "range"},
	"reading.wide":    payload.Reading{V: raw(`"18446744073709551615"`), T: at},
	"reading.text":    payload.Reading{V: raw(`"Ω <5 & open"`), T: at},

	"wish":              payload.Wish{V: raw("40"), Rev: at, UID: uid},
	"wish.expiring":     payload.Wish{V: raw("true"), Rev: at, UID: uid, Exp: at + 60000},
	"target.cloud":      payload.Target{V: raw("40"), Rev: at, UID: uid, By: payload.ByCloud, T: at + 12},
	"target.local":      payload.Target{V: raw("35"), Rev: at + 5000, UID: uid, By: payload.ByLocal, Who: "local/node-red", T: at + 5000, Exp: at + 65000},
	"target.cloudagain": payload.Target{V: raw("40"), Rev: at + 65000, UID: uid, By: payload.ByCloud, T: at + 65000, Wish: at},

	"set":               payload.Set{V: raw("40")},
	"set.conditional":   payload.Set{V: raw("40"), Exp: at + 60000, If: at},
	"set.bare":          json.RawMessage("40"),
	"set.baretext":      json.RawMessage(`"auto"`),
	"set-reply.ok":      payload.SetReply{OK: true, Rev: at},
	"set-reply.refused": payload.SetReply{Reason: "range", Error: "property speed: 4000 is above the maximum 3000 rpm"},

	"device-status.online":  payload.DeviceStatus{UID: uid, Rev: at, State: payload.DeviceOnline, Since: at, Mapper: "modbus"},
	"device-status.offline": payload.DeviceStatus{UID: uid, Rev: at, State: payload.DeviceOffline, Since: at, Error: "dial tcp 192.168.1.20:502: connection refused", Mapper: "modbus"},

	"node": payload.Node{Agent: "v0.1.0", Hostname: "plant-7", OS: "linux", Arch: "arm64", Kernel: "6.1.0-18-arm64",
		OSImage: "Debian GNU/Linux 12 (bookworm)", MachineID: "0123456789abcdef0123456789abcdef", SystemUUID: "99999999-8888-7777-6666-555555555555",
		BootID: "11111111-2222-3333-4444-555555555555", CPUs: 4, MemoryBytes: 1 << 30, InternalAddress: "10.1.2.3"},
	"node.storeerror": payload.Node{Agent: "v0.1.0", OS: "linux", Arch: "amd64", CPUs: 2, MemoryBytes: 1 << 31, Pods: true,
		StoreError: "no space left on device"},
	"node.pods": payload.Node{Agent: "v0.1.0", Hostname: "plant-7", OS: "linux", Arch: "arm64", CPUs: 4, MemoryBytes: 1 << 30, InternalAddress: "10.1.2.3", Pods: true,
		SealKey:     "pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk=",
		Capacity:    map[string]string{"cpu": "4", "memory": "1048576Ki", "pods": "110", "fairlead.dev/rs485": "1"},
		Allocatable: map[string]string{"cpu": "3900m", "memory": "917504Ki", "pods": "110", "fairlead.dev/rs485": "1"},
		Conditions: []payload.NodeCondition{
			{Type: "MemoryPressure", Status: "False", Reason: "KubeletHasSufficientMemory", Message: "kubelet has sufficient memory available", Since: at},
			{Type: "Ready", Status: "True", Reason: "KubeletReady", Message: "kubelet is posting ready status", Since: at}},
		Addresses: []payload.NodeAddress{{Type: "InternalIP", Address: "10.1.2.3"}, {Type: "Hostname", Address: "plant-7"}},
		Runtime:   "containerd://1.6.20",
		Images:    []payload.NodeImage{{Names: []string{"fairlead.test/web:1"}, Size: 1234567}}},

	"pod": payload.Pod{UID: uid, Rev: 812, Metadata: raw(`{"name":"web","namespace":"default","uid":"` + uid + `","generation":1}`),
		Spec:     raw(`{"containers":[{"name":"web","image":"fairlead.test/web:1"}],"nodeName":"plant-7","readinessGates":[{"conditionType":"example.com/line-free"}],"runtimeClassName":"sandboxed"}`),
		Handler:  "runsc",
		Gates:    map[string]string{"example.com/line-free": "True"},
		Services: []payload.Service{{Name: "kubernetes", IP: "10.96.0.1", Ports: []payload.ServicePort{{Name: "https", Port: 443, Protocol: "TCP"}}}}},
	"configmap": payload.ConfigMap{UID: uid, Rev: 812, Namespace: "default", Name: "web.conf", Data: map[string]string{"port": "8080"}, BinaryData: map[string][]byte{"logo": {0, 1, 2}}},
	"sealed":    payload.Sealed{UID: uid, Rev: 812, Key: "1a92f23852dc908d", Sealed: []byte("the encapsulated key and then the ciphertext")},
	"sealed.token": payload.Sealed{UID: uid, Rev: at, Key: "1a92f23852dc908d", Sealed: []byte("the encapsulated key and then the ciphertext"),
		Exp: at + 3607000, Renew: at + 2880000},
	"secret-data": payload.SecretData{Type: "Opaque", Data: map[string][]byte{"password": []byte("v1")}},
	"pod-tokens":  payload.PodTokens{Tokens: []payload.PodToken{{Seconds: 3607, Token: "eyJhbGciOiJSUzI1NiJ9.e30.c2ln", Exp: at + 3607000}}},

	"reported-pod":      payload.ReportedPod{UID: uid, Rev: 812, Status: raw(`{"phase":"Running","podIP":"10.88.0.5","podIPs":[{"ip":"10.88.0.5"}]}`)},
	"reported-pod.gone": payload.ReportedPod{UID: uid, Rev: 813, Status: raw(`{"phase":"Succeeded"}`), Gone: true},
	"reported-pod.static": payload.ReportedPod{UID: "0123456789abcdef0123456789abcdef", Status: raw(`{"phase":"Running"}`), Static: &payload.StaticPod{
		Metadata: raw(`{"name":"web-plant-7","namespace":"default","annotations":{"kubernetes.io/config.hash":"0123456789abcdef0123456789abcdef"}}`),
		Spec:     raw(`{"containers":[{"name":"web","image":"fairlead.test/web:1"}],"nodeName":"plant-7"}`)}},

	"event-kubernetes": payload.KubernetesEvent{ID: "web.18d1f0a3c2b4e6f7", Kind: "Pod", Namespace: "default", Name: "web", UID: uid, FieldPath: "spec.containers{web}",
		Reason: "BackOff", Message: "Back-off restarting failed container web in pod web_default(" + uid + ")", Type: "Warning",
		First: at, Last: at + 60000, Count: 4, Component: "kubelet"},

	"sync-request.first": payload.SyncRequest{Manifest: true},
	"sync-request.page":  payload.SyncRequest{Manifest: true, After: "desired/device/default/pump-1"},
	"sync-request.both":  payload.SyncRequest{Manifest: true, After: "desired/device/default/pump-9", Max: 32, Want: []string{"desired/device/default/pump-1"}},
	"sync-request.want":  payload.SyncRequest{Want: []string{"desired/device/default/pump-1", "desired/twin/default/pump-1/speed"}},
	"sync-manifest.page": payload.SyncManifest{
		Digest: payload.Digest{Epoch: "7f3a9c", Count: 2, Sum: hash("a")},
		Topics: map[string]digest.Hash{"desired/device/default/pump-1": hash("b")}, Next: "desired/device/default/pump-1"},
	"sync-manifest.last": payload.SyncManifest{
		Digest: payload.Digest{Epoch: "7f3a9c", Count: 2, Sum: hash("a")}, After: "desired/device/default/pump-1",
		Topics: map[string]digest.Hash{"desired/twin/default/pump-1/speed": hash("c")}},

	"event-gap":         payload.EventGap{Epoch: "9f86d081884c7d65", From: 18001, To: 20000, Count: 2000, Bytes: 412000, T: at},
	"event-gap.refused": payload.EventGap{Epoch: "9f86d081884c7d65", From: 20417, To: 20417, Count: 1, Bytes: 6291584, T: at, Err: "a packet of 6291520 bytes is over the broker's limit of 4194304"},

	"device": device.Device{UID: uid, Rev: at, Namespace: "default", Name: "pump-1", Model: "pump-station", Protocol: "modbus",
		Modbus: &device.ModbusDevice{Address: "192.168.1.20:502", Unit: 1, Timeout: device.Duration(500 * time.Millisecond)},
		Properties: []device.Property{
			{Name: "speed", Description: "speed wanted of the pump", Type: device.Uint16, Unit: "rpm", Access: device.ReadWrite,
				Min: num("0"), Max: num("3000"), Modbus: &device.ModbusProperty{Table: device.HoldingRegister, Address: 10}},
			{Name: "pressure", Type: device.Float64, Unit: "bar", Deadband: 0.05,
				PollInterval: device.Duration(200 * time.Millisecond), MaxAge: device.Duration(5 * time.Second),
				Modbus: &device.ModbusProperty{Table: device.InputRegister, Scale: num("0.01"), Offset: num("-1"), Raw: device.Int16}},
			{Name: "mode", Type: device.Uint8, Access: device.ReadWrite, Enum: []json.RawMessage{raw("0"), raw("1"), raw("2")},
				Modbus: &device.ModbusProperty{Table: device.HoldingRegister, Address: 11}},
			{Name: "energy", Type: device.Uint64, Unit: "Wh", Modbus: &device.ModbusProperty{Table: device.HoldingRegister, Address: 20, Order: "CDAB"}},
			{Name: "label", Type: device.String, Access: device.ReadWrite, MaxLength: 16,
				Modbus: &device.ModbusProperty{Table: device.HoldingRegister, Address: 100, Length: 8}},
			{Name: "run", Type: device.Bool, Access: device.WriteOnly, Modbus: &device.ModbusProperty{Table: device.Coil, Address: 0}},
		}},
}

// TestGoldens pins the bytes on the wire and reads them back.
func TestGoldens(t *testing.T) {
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, v := range goldens {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join("testdata", name+".json")
			got := payload.Encode(v)
			if *update {
				if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatalf("%v; go test ./schemas/payload -update writes it", err)
			}
			want = bytes.TrimSuffix(want, []byte("\n"))
			if !bytes.Equal(got, want) {
				t.Errorf("payload changed, and with it the wire contract\n got %s\nwant %s", got, want)
			}
			if _, ok := v.(json.RawMessage); ok {
				return // no payload.Decode for a bare value, see TestParseSet
			}
			back := reflect.New(reflect.TypeOf(v))
			if err := payload.Decode(want, back.Interface()); err != nil {
				t.Fatal(err)
			}
			if again := payload.Encode(back.Elem().Interface()); !bytes.Equal(again, want) {
				t.Errorf("read back and written again\n got %s\nwant %s", again, want)
			}
		})
	}
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if _, ok := goldens[strings.TrimSuffix(filepath.Base(f), ".json")]; !ok {
			t.Errorf("%s belongs to no case: remove it", f)
		}
	}
}

// TestReadme wants every example of the contract's page to be a golden.
func TestReadme(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, v := range goldens {
		known[string(payload.Encode(v))] = true
	}
	examples := 0
	for i, block := range strings.Split(string(page), "```") {
		lines, ok := strings.CutPrefix(block, "json\n")
		if i%2 == 0 || !ok {
			continue
		}
		for line := range strings.Lines(lines) {
			examples++
			if line = strings.TrimSpace(line); !known[line] {
				t.Errorf("README.md: no golden has the bytes of this example: %s", line)
			}
		}
	}
	if examples < 20 {
		t.Errorf("README.md: only %d examples found", examples)
	}
}

func TestDecode(t *testing.T) {
	for _, tc := range []struct{ in, err string }{
		{`{"v":1,"t":2}`, ""},
		{` {"v":1,"t":2} ` + "\n", ""},
		{`{"v":1,"t":2,"new":"field"}`, ""},
		{``, "want a JSON object"},
		{`null`, "want a JSON object"},
		{`[]`, "want a JSON object"},
		{`21.5`, "want a JSON object"},
		{`{"v":1`, "unexpected EOF"},
		{`{"v":1} {}`, "something follows"},
		{`{"v":1}x`, "something follows"},
		{`{"v":1,"t":"now"}`, "cannot unmarshal"},
		{`{"v":1,"t":1.5}`, "cannot unmarshal"},
	} {
		var r payload.Reading
		err := payload.Decode([]byte(tc.in), &r)
		if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
			t.Errorf("Decode(%q): %v, want %q", tc.in, err, tc.err)
		}
	}
}

func TestParseSet(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want payload.Set
		err  string
	}{
		{`40`, payload.Set{V: raw("40")}, ""},
		{" 40\n", payload.Set{V: raw("40")}, ""},
		{`"auto"`, payload.Set{V: raw(`"auto"`)}, ""},
		{`false`, payload.Set{V: raw("false")}, ""},
		{`null`, payload.Set{V: raw("null")}, ""},
		{`[1,2]`, payload.Set{V: raw("[1,2]")}, ""},
		{`{"v":40}`, payload.Set{V: raw("40")}, ""},
		{`{"v":{"a":1},"exp":5,"if":7}`, payload.Set{V: raw(`{"a":1}`), Exp: 5, If: 7}, ""},
		{``, payload.Set{}, "is not JSON"},
		{`auto`, payload.Set{}, "a text needs its quotes"},
		{`40 41`, payload.Set{}, "is not JSON"},
		{`{}`, payload.Set{}, `has no "v"`},
		{`{"exp":5}`, payload.Set{}, `has no "v"`},
		{`{"v":40,"expires":5}`, payload.Set{}, "unknown field"},
		{`{"v":40,"exp":"soon"}`, payload.Set{}, "cannot unmarshal"},
	} {
		got, err := payload.ParseSet([]byte(tc.in))
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("ParseSet(%q): %v, want %q", tc.in, err, tc.err)
			}
			continue
		}
		if err != nil || !reflect.DeepEqual(got, tc.want) {
			t.Errorf("ParseSet(%q) = %+v, %v; want %+v", tc.in, got, err, tc.want)
		}
	}
}

func TestNextRev(t *testing.T) {
	now := time.UnixMilli(at)
	for _, tc := range []struct {
		name       string
		prev, want int64
	}{
		{"the first", 0, at},
		{"a later millisecond", at - 1, at},
		{"the same millisecond", at, at + 1},
		{"a clock that went back", at + 5000, at + 5001},
	} {
		if got := payload.NextRev(tc.prev, now); got != tc.want {
			t.Errorf("%s: NextRev(%d) = %d, want %d", tc.name, tc.prev, got, tc.want)
		}
	}
}

func TestCloudRev(t *testing.T) {
	for _, tc := range []struct {
		name   string
		target payload.Target
		want   int64
	}{
		{"the cloud's wish itself", payload.Target{By: payload.ByCloud, Rev: 7}, 7},
		{"the cloud's wish again, after a local one", payload.Target{By: payload.ByCloud, Rev: 9, Wish: 7}, 7},
		{"a local wish", payload.Target{By: payload.ByLocal, Rev: 8}, 0},
	} {
		if got := tc.target.CloudRev(); got != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, got, tc.want)
		}
	}
}

func TestReadingGood(t *testing.T) {
	if r := (payload.Reading{}); !r.Good() {
		t.Error("no quality is not good")
	}
	if r := (payload.Reading{Q: payload.QualityStale}); r.Good() {
		t.Error("bad:stale is good")
	}
}

func FuzzParseSet(f *testing.F) {
	for _, s := range []string{`40`, `{"v":40}`, `{"v":40,"exp":5,"if":7}`, `"auto"`, ` {} `, `null`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := payload.ParseSet(b)
		if err != nil {
			return
		}
		if !json.Valid(s.V) {
			t.Fatalf("ParseSet(%q) gives a value that is not JSON: %q", b, s.V)
		}
		back, err := payload.ParseSet(payload.Encode(s))
		if err != nil || back.Exp != s.Exp || back.If != s.If {
			t.Fatalf("ParseSet(%q) = %+v does not survive: %+v, %v", b, s, back, err)
		}
	})
}
