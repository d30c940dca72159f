package broker_test

import (
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
)

func listen(t *testing.T, b *broker.Broker, addr string) string {
	t.Helper()
	at, err := b.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// Every kind of listener carries a message there and back.
func TestListeners(t *testing.T) {
	b, _ := open(t, t.TempDir())
	for _, addr := range []string{
		"127.0.0.1:0", "mqtt://127.0.0.1:0", "ws://127.0.0.1:0", "ws://127.0.0.1:0/mqtt",
		"unix://" + filepath.Join(t.TempDir(), "s"),
	} {
		t.Run(addr[:4], func(t *testing.T) {
			at := listen(t, b, addr)
			c, msgs := dial(t, at, "", client.Subscription{Filter: "a/#", QoS: 1})
			want := strings.Repeat("x", 100_000) // many frames and reads
			if err := c.Publish(t.Context(), client.Message{Topic: "a/b", Payload: []byte(want), QoS: 1}); err != nil {
				t.Fatal(err)
			}
			if m := next(t, msgs); string(m.Payload) != want {
				t.Fatalf("got %d bytes", len(m.Payload))
			}
		})
	}
}

func TestListenErrors(t *testing.T) {
	b, _ := open(t, t.TempDir())
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	file := filepath.Join(dir, "precious")
	if err := os.WriteFile(file, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	live := filepath.Join(dir, "live")
	listen(t, b, "unix://"+live)
	for _, c := range []struct {
		addr string
		want []string
	}{
		{l.Addr().String(), []string{"port is in use", "ss -ltnp"}},
		{"ws://" + l.Addr().String(), []string{"port is in use"}},
		{"127.0.0.1", []string{"want host:port"}},
		{"", []string{"want host:port"}},
		{"http://127.0.0.1:0", []string{`scheme "http"`, "mqtt, mqtts, ws, wss, unix"}},
		{"mqtt://127.0.0.1:0:0", []string{"want host:port"}},
		{"mqtts://127.0.0.1:0", []string{"mqtts wants a certificate"}},
		{"wss://127.0.0.1:0/mqtt", []string{"wss wants a certificate"}},
		{"unix://", []string{"unix:///absolute/path"}},
		{"unix://relative/path", []string{"unix:///absolute/path"}},
		{"unix://" + live, []string{"another process answers"}},
		{"unix://" + file, []string{"no socket"}},
		{"unix://" + filepath.Join(dir, "missing", "s"), []string{"no such file"}},
		{"unix:///" + strings.Repeat("d", 200), []string{"107"}},
	} {
		_, err := b.Listen(c.addr)
		if err == nil || !hasAll(err.Error(), c.want...) {
			t.Errorf("Listen(%q): %v, want %q in it", c.addr, err, c.want)
		}
	}
	if got, err := os.ReadFile(file); string(got) != "data" {
		t.Errorf("the file in the way is gone: %q, %v", got, err)
	}
}

// A socket that a killed process left behind does not keep the next one out.
func TestStaleUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	b, _ := open(t, t.TempDir())
	dial(t, listen(t, b, "unix://"+path), "")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("got %v, %v", fi, err)
	}
}

func TestWebSocketHandshake(t *testing.T) {
	b, _ := open(t, t.TempDir(), func(o *broker.Options) { o.AllowedOrigins = []string{"https://hmi.example"} })
	at := listen(t, b, "ws://127.0.0.1:0/mqtt")
	host := strings.TrimSuffix(strings.TrimPrefix(at, "ws://"), "/mqtt")
	_, port, _ := net.SplitHostPort(host)
	for _, c := range []struct {
		name, path, origin, host, proto string
		status                          int
	}{
		{"program", "/mqtt", "", "", "mqtt", 101},
		{"own address", "/mqtt", "http://" + host, "", "mqtt", 101},
		{"localhost", "/mqtt", "http://localhost:" + port, "localhost:" + port, "mqtt", 101},
		{"allowed", "/mqtt", "https://hmi.example", "", "mqtt", 101},
		{"foreign", "/mqtt", "https://evil.example", "", "mqtt", 403},
		{"rebound name", "/mqtt", "http://evil.example:" + port, "evil.example:" + port, "mqtt", 403},
		{"null", "/mqtt", "null", "", "mqtt", 403},
		{"not a URL", "/mqtt", "://", "", "mqtt", 403},
		{"wrong subprotocol", "/mqtt", "", "", "chat", 400},
		{"no subprotocol", "/mqtt", "", "", "", 400},
		{"wrong path", "/other", "", "", "mqtt", 404},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := websocket.Dialer{}
			if c.proto != "" {
				d.Subprotocols = []string{c.proto}
			}
			h := http.Header{}
			if c.origin != "" {
				h.Set("Origin", c.origin)
			}
			if c.host != "" {
				h.Set("Host", c.host)
			}
			ws, resp, err := d.DialContext(t.Context(), "ws://"+host+c.path, h)
			if resp == nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			if err == nil {
				_ = ws.Close()
			}
			if resp.StatusCode != c.status {
				t.Errorf("got %s, want %d", resp.Status, c.status)
			}
		})
	}
}

// [MQTT-6.0.0-1]: a text frame ends the connection.
func TestWebSocketTextFrame(t *testing.T) {
	b, _ := open(t, t.TempDir())
	d := websocket.Dialer{Subprotocols: []string{"mqtt"}}
	ws, resp, err := d.DialContext(t.Context(), listen(t, b, "ws://127.0.0.1:0"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ws.Close(); _ = resp.Body.Close() }()
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "x"}}
	if err := ws.WriteMessage(websocket.TextMessage, encode(t, 5, pk)); err != nil {
		t.Fatal(err)
	}
	if _, m, err := ws.ReadMessage(); err == nil {
		t.Fatalf("got %x", m)
	}
}

// Borders of frames mean nothing: a packet may come in many, many in one.
func TestWebSocketFrames(t *testing.T) {
	b, _ := open(t, t.TempDir())
	d := websocket.Dialer{Subprotocols: []string{"mqtt"}}
	ws, resp, err := d.DialContext(t.Context(), listen(t, b, "ws://127.0.0.1:0"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ws.Close(); _ = resp.Body.Close() }()
	all := encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "x"}})
	all = append(all, encode(t, 5, publish("a/b", "hello", 1, true, 1))...)
	for i := range 30 {
		if err := ws.WriteMessage(websocket.BinaryMessage, all[i:i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := ws.WriteMessage(websocket.BinaryMessage, all[30:]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "message retained", func() bool { p, _ := b.Retained("a/b"); return string(p) == "hello" })
}

func TestPipe(t *testing.T) {
	b, addr := open(t, t.TempDir(), func(o *broker.Options) {
		inner := o.Authenticate
		o.Authenticate = func(ci broker.ConnectInfo) (id accessIdentity, err error) {
			if ci.Username == "piped" && (ci.Listener != broker.InProcess || !ci.Loopback) {
				return id, errors.New("not in process")
			}
			return inner(ci)
		}
	})
	if _, ack := connect(t, addr, 5, "x", user("piped")); ack.ReasonCode == 0 {
		t.Error("TCP passes for in-process")
	}
	c, err := b.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r := newRaw(t, c, 5)
	r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "x", UsernameFlag: true, Username: []byte("piped")}})
	if ack := r.expect(packets.Connack); ack.ReasonCode != 0 {
		t.Fatalf("refused: %+v", ack)
	}
	if ack := r.publish("a", "b", true); ack.ReasonCode != 0 {
		t.Fatalf("refused: %+v", ack)
	}
}

func TestMaxClients(t *testing.T) {
	_, addr := open(t, t.TempDir(), func(o *broker.Options) { o.MaxClients = 3 })
	var rs []*raw
	for i := range 3 {
		r, _ := connect(t, addr, 5, string(rune('a'+i)))
		rs = append(rs, r)
	}
	over := dialRaw(t, addr, 5)
	over.closed()
	rs[0].bye(0)
	rs[0].closed()
	eventually(t, "a place is free", func() bool {
		d, err := net.Dial("tcp", strings.TrimPrefix(addr, "mqtt://"))
		if err != nil {
			return false
		}
		r := newRaw(t, d, 5)
		defer func() { _ = r.Close() }()
		if _, err := r.Write(encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "d"}})); err != nil {
			return false
		}
		_, err = r.read()
		return err == nil
	})
}
