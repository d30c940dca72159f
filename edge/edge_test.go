package edge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/edge/node"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

var (
	pump    = topic.DesiredDevice(plant, "default", "pump-1")
	speed   = topic.DesiredTwin(plant, "default", "pump-1", "speed")
	running = topic.ReportedTarget(plant, "default", "pump-1", "speed")
	setting = topic.Set(plant, "default", "pump-1", "speed")
)

const pumpPayload = `{"uid":"` + uid + `","rev":1,"namespace":"default","name":"pump-1","model":"m","protocol":"modbus","properties":[{"name":"speed","type":"uint16","access":"rw","max":3000}]}`

func wish(v int, exp int64) string {
	return fmt.Sprintf(`{"v":%d,"rev":1790000000000,"uid":%q,"exp":%d}`, v, uid, exp)
}

func TestValidate(t *testing.T) {
	for _, x := range []struct {
		change func(*Config)
		words  string
	}{
		{func(c *Config) { c.Node = "" }, "give --node"},
		{func(c *Config) { c.Node = "Plant_7" }, `node "Plant_7": want lower case letters`},
		{func(c *Config) { c.Node = "a/b" }, "lower case letters"},
		{func(c *Config) { c.Node = "+" }, "lower case letters"},
		{func(c *Config) { c.Dir = "" }, "give --data"},
		{func(c *Config) { c.MQTT = nil }, "give --mqtt, such as 127.0.0.1:1883"},
		{func(c *Config) { c.Checkpoint = -time.Second }, "checkpoint -1s"},
		{func(c *Config) { c.EventBytes = 1000 }, "event log of 1000 bytes: want 1048576"},
		{func(c *Config) { c.EventBytes = -1 }, "event log of -1 bytes"},
		{func(c *Config) { c.EventAge = -time.Hour }, "event age -1h"},
		{func(c *Config) { c.Cloud = "mqtt://cloud" }, "fairlead token create --node plant-7"},
	} {
		cfg := config(t.TempDir())
		x.change(&cfg)
		wantWords(t, fails(t, cfg), x.words)
		if left, _ := os.ReadDir(cfg.Dir); len(left) > 0 && cfg.Dir != "" {
			t.Errorf("%s: the data folder was written to", x.words)
		}
	}
	good := config("x")
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
}

// What is wrong with the configuration beyond that shows when it is used.
func TestWrongAddresses(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		change func(*Config)
		words  string
	}{
		{func(c *Config) { c.MQTT = []string{"1883"} }, "want host:port, such as 127.0.0.1:1883"},
		{func(c *Config) { c.MQTT = []string{"http://127.0.0.1:0"} }, "not one of mqtt, mqtts, ws, wss, unix"},
		{func(c *Config) { c.MQTT = []string{"unix://relative"} }, "unix:///absolute/path"},
		{func(c *Config) { c.MQTT = []string{"192.0.2.1:0"} }, "192.0.2.1"},
		{func(c *Config) { c.Metrics = "9464" }, "--metrics"},
		{func(c *Config) { c.Cloud, c.TokenFile = "http://cloud", token }, "scheme"},
		{func(c *Config) {
			c.Cloud, c.TokenFile, c.CloudCA = "mqtts://cloud", token, filepath.Join(c.Dir, "none")
		}, "--cloud-ca"},
		{func(c *Config) { c.Cloud, c.TokenFile, c.CloudCA = "mqtts://cloud", token, token }, "no certificate in it"},
		{func(c *Config) { c.Cloud, c.TokenFile, c.KeepAlive = "cloud", token, time.Millisecond }, "keepalive"},
	} {
		cfg := config(t.TempDir())
		x.change(&cfg)
		wantWords(t, fails(t, cfg), x.words)
	}
}

func TestDataFolder(t *testing.T) {
	dir := t.TempDir()
	cfg := config(dir)
	start(t, cfg).stop()

	cfg.Node = "plant-8"
	wantWords(t, fails(t, cfg), "belongs to node plant-7, not to plant-8", dir, "--data")

	cfg.Node = plant
	file := filepath.Join(dir, "node.json")
	for _, b := range []string{"", "\x00\x00", "{", "null", "{}", `{"node":7}`} {
		if err := os.WriteFile(file, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		wantWords(t, fails(t, cfg), file, "cannot be read", `write {"node":"plant-7"} into it`)
	}
	// The advice works, and nothing was lost.
	if err := os.WriteFile(file, []byte(`{"node":"plant-7"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	a := start(t, cfg)
	if strings.Contains(a.log.String(), "set aside") {
		t.Error("the store was set aside")
	}

	// One folder, one agent.
	wantWords(t, fails(t, cfg), filepath.Join(dir, "store"), "in use")
	a.stop()

	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.Dir = plain
	wantWords(t, fails(t, cfg), "data folder", plain)
}

func TestTokenFiles(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	cfg := config(t.TempDir())
	cfg.Cloud, cfg.TokenFile = "mqtt://127.0.0.1:1", token
	wantWords(t, fails(t, cfg), token, "no such file", "fairlead token create --node plant-7 >")
	for b, words := range map[string]string{
		"": "is empty", " \n": "is empty", "two words\n": "damaged", "a\nb\n": "damaged", "\x00\x00\x00": "damaged", "grüße": "damaged",
	} {
		if err := os.WriteFile(token, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		wantWords(t, fails(t, cfg), token, words, "fairlead token create --node plant-7")
	}
	cfg.Cloud, cfg.TokenFile = "", ""

	mapper := filepath.Join(cfg.Dir, "mapper.token")
	start(t, cfg).stop()
	made, err := os.ReadFile(mapper)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(mapper); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the mapper token's mode is %v, %v", fi.Mode(), err)
	}
	start(t, cfg).stop()
	if again, _ := os.ReadFile(mapper); string(again) != string(made) {
		t.Error("the second start changed the mapper token")
	}
	for _, b := range []string{"", "short", strings.Repeat("\x00", 44), strings.Repeat("a b ", 20)} {
		if err := os.WriteFile(mapper, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		wantWords(t, fails(t, cfg), mapper, "damaged", "remove it")
	}
	if err := os.Remove(mapper); err != nil {
		t.Fatal(err)
	}
	start(t, cfg)
}

func TestAuthenticate(t *testing.T) {
	const token = "the-mapper-token"
	for _, x := range []struct {
		ci    broker.ConnectInfo
		want  access.Identity
		words string // of the refusal
	}{
		{broker.ConnectInfo{Loopback: true}, access.Identity{Role: access.Local}, ""},
		{broker.ConnectInfo{Loopback: true, Username: "mapper:modbus", Password: []byte(token)}, access.Identity{Role: access.Mapper, Name: "modbus"}, ""},
		{broker.ConnectInfo{Username: "mapper:modbus", Password: []byte(token)}, access.Identity{Role: access.Mapper, Name: "modbus"}, ""},
		{broker.ConnectInfo{Loopback: true, Username: "mapper:modbus", Password: []byte("the-mapper-tokeN")}, access.Identity{}, "mapper.token"},
		{broker.ConnectInfo{Loopback: true, Username: "mapper:modbus"}, access.Identity{}, "wrong mapper token"},
		{broker.ConnectInfo{Loopback: true, Username: "mapper"}, access.Identity{}, "wrong mapper token"},
		{broker.ConnectInfo{Loopback: true, Username: "admin"}, access.Identity{}, `unknown user "admin"`},
		{broker.ConnectInfo{Loopback: true, Password: []byte(token)}, access.Identity{}, "unknown user"},
		{broker.ConnectInfo{}, access.Identity{}, "from the network need a credential"},
		{broker.ConnectInfo{Username: "admin"}, access.Identity{}, "unknown user"},
	} {
		got, err := authenticate(token)(x.ci)
		if got != x.want || (err == nil) != (x.words == "") {
			t.Errorf("%+v: got %v, %v", x.ci, got, err)
		}
		if err != nil {
			wantWords(t, err.Error(), x.words)
			if strings.Contains(err.Error(), token) {
				t.Errorf("the refusal holds the token: %v", err)
			}
		}
	}
}

// Who may not come in is told so, on the wire.
func TestWho(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.MQTT = []string{"0.0.0.0:0", "unix://" + filepath.Join(cfg.Dir, "bus.sock")}
	a := start(t, cfg)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(a.addrs[0], "mqtt://"))
	if err != nil {
		t.Fatal(err)
	}
	near := net.JoinHostPort("127.0.0.1", port)
	token, err := os.ReadFile(filepath.Join(cfg.Dir, "mapper.token"))
	if err != nil {
		t.Fatal(err)
	}
	good := strings.TrimSpace(string(token))
	dial(t, near, "mapper:modbus", "guess").refused("wrong mapper token")
	dial(t, near, "admin", "admin").refused("unknown user", "admin")
	dial(t, near, "mapper:modbus", good).connected()
	dial(t, near, "", "").connected()
	dial(t, a.addrs[1], "", "").connected()
	if strings.Contains(a.log.String(), good) || strings.Contains(a.log.String(), "guess") {
		t.Error("the log holds a credential")
	}

	far := node.Describe("").InternalAddress
	if far == "" {
		t.Skip("SKIP: the host has no address but loopback")
	}
	dial(t, net.JoinHostPort(far, port), "", "").refused("from the network need a credential")
	dial(t, net.JoinHostPort(far, port), "mapper:modbus", good).connected()
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	addr := l.Addr().String()
	_, port, _ := net.SplitHostPort(addr)

	cfg := config(t.TempDir())
	cfg.MQTT = []string{"127.0.0.1:0", addr}
	wantWords(t, fails(t, cfg), addr, "in use", "ss -ltnp", port)
	cfg.MQTT = cfg.MQTT[:1]
	cfg.Metrics = addr
	wantWords(t, fails(t, cfg), addr, "in use", "--metrics")
	cfg.Metrics = ""
	start(t, cfg) // neither left the store open
}

var metricsAt = regexp.MustCompile(`msg="metrics and health" address=(\S+)`)

// get asks the agent's HTTP server.
func (a *agent) get(path string) (code int, body string) {
	a.t.Helper()
	m := metricsAt.FindStringSubmatch(a.log.String())
	if m == nil {
		a.t.Fatal("the log does not name the metrics' address")
	}
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodGet, "http://"+m[1]+path, nil)
	if err != nil {
		a.t.Fatal(err)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestHealth(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := config(t.TempDir())
	cfg.Metrics, cfg.Cloud, cfg.TokenFile = "127.0.0.1:0", "127.0.0.1:1", token
	a := start(t, cfg)
	for _, path := range []string{"/healthz", "/readyz"} {
		if code, body := a.get(path); code != http.StatusOK || body != "ok\n" {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	p := dial(t, a.addrs[0], "", "").connected()
	var r *client.Refused
	err := p.Publish(t.Context(), client.Message{Topic: setting, Payload: []byte("1"), QoS: 1})
	if !errors.As(err, &r) {
		t.Fatalf("got %v", err)
	}
	_, body := a.get("/metrics")
	wantWords(t, body, "go_goroutines", "process_resident_memory_bytes", "fairlead_broker_clients 1", "fairlead_link_up 0",
		`fairlead_broker_refused_total{reason="device"} 1`, `fairlead_twin_wishes_refused_total{reason="device"} 1`)
	if code, _ := a.get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("/debug/pprof/ answers %d", code)
	}
}

// Without a cloud, and after a restart, the bus, the devices and the wishes work.
func TestAlone(t *testing.T) {
	cfg := config(t.TempDir())
	seed(t, cfg.Dir, map[topic.Topic]string{
		pump: pumpPayload, speed: wish(40, 0),
		topic.ReportedLink(plant): `{"online":true,"since":1,"agent":"v0.0.9"}`,
	})
	a := start(t, cfg)
	p := dial(t, a.addrs[0], "", "").connected()
	eventually(t, "the wish is the target", func() bool { return p.has(running, `"v":40`, `"by":"cloud"`) })
	eventually(t, "the node is described", func() bool { return p.has(topic.ReportedNode(plant), `"agent":"v0.1.0"`) })
	if p.has(topic.ReportedLink(plant)) {
		t.Error("the bus shows a link, and there is no cloud")
	}
	if err := p.Publish(t.Context(), client.Message{Topic: setting, Payload: []byte("50"), QoS: 1}); err != nil {
		t.Fatal(err)
	}
	var r *client.Refused
	if err := p.Publish(t.Context(), client.Message{Topic: setting, Payload: []byte("5000"), QoS: 1}); !errors.As(err, &r) || !strings.Contains(r.Reason, "3000") {
		t.Errorf("got %v", err)
	}
	if err := p.Publish(t.Context(), client.Message{Topic: speed, Payload: []byte(wish(60, 0)), QoS: 1, Retain: true}); !errors.As(err, &r) || r.Code != broker.CodeNotAuthorized {
		t.Errorf("a local client may wish for the cloud: %v", err)
	}
	a.stop()

	a = start(t, cfg)
	p = dial(t, a.addrs[0], "", "").connected()
	eventually(t, "the local wish is the target", func() bool { return p.has(running, `"v":50`, `"by":"local"`) })
}

// A wish that ended while the node was off moves no machine: whoever comes
// first does not see it any more.
func TestStaleWishAtStart(t *testing.T) {
	cfg := config(t.TempDir())
	seed(t, cfg.Dir, map[topic.Topic]string{
		pump: pumpPayload, speed: wish(40, 1790000000001),
		running: fmt.Sprintf(`{"v":40,"rev":1790000000000,"uid":%q,"by":"cloud","t":1,"exp":1790000000001}`, uid),
		topic.ReportedTwin(plant, "default", "gone", "speed"): `{"v":1,"t":1}`,
	})
	var seen string
	a := start(t, cfg)
	p := dial(t, a.addrs[0], "", "").connected()
	eventually(t, "the node is described", func() bool { return p.has(topic.ReportedNode(plant)) })
	if err := p.Publish(t.Context(), client.Message{Topic: setting, Payload: []byte("50"), QoS: 1}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the local wish is the target", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		if got := p.seen[running]; got != "" {
			seen = got
		}
		return seen != ""
	})
	wantWords(t, seen, `"v":50`)
	if p.has(topic.ReportedTwin(plant, "default", "gone", "speed")) {
		t.Error("a device that is gone still reports")
	}
}

// A store that is damaged is set aside, by name; the agent comes up without.
func TestCorruptStore(t *testing.T) {
	cfg := config(t.TempDir())
	seed(t, cfg.Dir, map[topic.Topic]string{pump: pumpPayload})
	store := filepath.Join(cfg.Dir, "store")
	damaged := 0
	err := filepath.WalkDir(store, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), "MANIFEST") {
			damaged++
			return os.WriteFile(path, []byte(strings.Repeat("damaged ", 100)), 0o600)
		}
		return err
	})
	if err != nil || damaged == 0 {
		t.Fatalf("damaged %d files: %v", damaged, err)
	}
	token, _ := os.ReadFile(filepath.Join(cfg.Dir, "mapper.token"))
	a := start(t, cfg)
	aside, err := filepath.Glob(store + ".broken-*")
	if err != nil || len(aside) != 1 {
		t.Fatalf("set aside: %v, %v", aside, err)
	}
	wantWords(t, a.log.String(), "level=ERROR", aside[0], "set aside")
	if again, _ := os.ReadFile(filepath.Join(cfg.Dir, "mapper.token")); len(token) > 0 && string(again) != string(token) {
		t.Error("the mapper token changed")
	}
	p := dial(t, a.addrs[0], "", "").connected()
	eventually(t, "the node is described", func() bool { return p.has(topic.ReportedNode(plant)) })
	if p.has(pump) {
		t.Error("the device came out of nowhere")
	}
	a.stop()
	if left, _ := os.ReadDir(aside[0]); len(left) == 0 {
		t.Error("what was set aside is empty")
	}
}

// A full disk: the bus serves, says no to what it cannot keep, and is not ready.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Skipf("SKIP: cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	cfg := config(filepath.Join(dir, "data"))
	cfg.Metrics = "127.0.0.1:0"
	start(t, cfg).stop()
	soon := time.Now().Add(-time.Hour).UnixMilli()
	seed(t, cfg.Dir, map[topic.Topic]string{
		pump:    pumpPayload,
		running: fmt.Sprintf(`{"v":40,"rev":1790000000000,"uid":%q,"by":"local","t":1,"exp":%d}`, uid, soon),
	})
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, 52<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	a := start(t, cfg)
	if code, body := a.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "disk full") {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if code, _ := a.get("/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d", code)
	}
	p := dial(t, a.addrs[0], "", "").connected()
	var r *client.Refused
	if err := p.Publish(t.Context(), client.Message{Topic: setting, Payload: []byte("50"), QoS: 1}); !errors.As(err, &r) || r.Code != broker.CodeQuotaExceeded {
		t.Errorf("got %v", err)
	} else {
		wantWords(t, r.Reason, "disk full", "make room")
	}
	described := topic.ReportedNode(cfg.Node)
	eventually(t, "the node's description says so", func() bool { return p.has(described, "storeError", "disk full") })
	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the agent is ready again", func() bool { code, _ := a.get("/readyz"); return code == http.StatusOK })
	eventually(t, "the description is clean again", func() bool { return p.has(described) && !p.has(described, "storeError") })
	eventually(t, "the stale target is gone", func() bool { return !p.has(running) })
	if err := p.Publish(t.Context(), client.Message{Topic: setting, Payload: []byte("50"), QoS: 1}); err != nil {
		t.Error(err)
	}
	a.stop()
}

// With a cloud the node's state is there, and the cloud's here.
func TestWithCloud(t *testing.T) {
	cloud, err := broker.Open(broker.Options{
		Dir: t.TempDir(), Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username != plant || string(ci.Password) != "secret" {
				return access.Identity{}, errors.New("unknown node or wrong token")
			}
			return access.Identity{Role: access.Node, Name: plant}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cloud.Close() })
	cfg := config(t.TempDir())
	if cfg.Cloud, err = cloud.Listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	cfg.TokenFile = filepath.Join(cfg.Dir, "token")
	if err := os.WriteFile(cfg.TokenFile, []byte(" secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := start(t, cfg)
	online := func() string { b, _ := cloud.Retained(topic.ReportedLink(plant)); return string(b) }
	eventually(t, "the node is online", func() bool { return strings.Contains(online(), `"online":true`) })
	for x, p := range map[topic.Topic]string{pump: pumpPayload, speed: wish(40, 0)} {
		if err := cloud.Publish(t.Context(), broker.Message{Topic: x, Payload: []byte(p), QoS: 1, Retain: true}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the target is in the cloud", func() bool {
		b, _ := cloud.Retained(running)
		return strings.Contains(string(b), `"v":40`)
	})
	eventually(t, "the digest is in the cloud", func() bool { _, ok := cloud.Retained(topic.ReportedDigest(plant)); return ok })
	a.stop()
	if !strings.Contains(online(), `"online":false`) {
		eventually(t, "the node is offline", func() bool { return strings.Contains(online(), `"online":false`) })
	}
}

// The end of the context is a good end, whenever it comes.
func TestEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cfg := config(t.TempDir())
	if err := Run(ctx, cfg); err != nil {
		t.Errorf("ended before it began: %v", err)
	}
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		cfg.Ready = func([]string) { cancel() }
		if err := Run(ctx, cfg); err != nil {
			t.Errorf("ended as it began: %v", err)
		}
	}
	cfg.Ready = nil
	a := start(t, cfg)
	p := dial(t, a.addrs[0], "", "").connected()
	a.stop()
	eventually(t, "the client is told", func() bool { return strings.Contains(p.log.String(), "disconnected") })
}

func TestDescribe(t *testing.T) {
	n := node.Describe("v0.1.0")
	if n.Agent != "v0.1.0" || n.OS != "linux" || n.Arch == "" || n.Kernel == "" || n.BootID == "" || n.CPUs < 1 || n.MemoryBytes == 0 || n.Pods {
		t.Errorf("got %s", payload.Encode(n))
	}
	if strings.ContainsAny(n.OSImage, `"'`) {
		t.Errorf("the system's name is %q", n.OSImage)
	}
}
