package broker_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestWill(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(r *raw)
		want bool
	}{
		{"connection lost", func(r *raw) { _ = r.Close() }, true},
		{"DISCONNECT 0x00", func(r *raw) { r.bye(0) }, false},
		{"DISCONNECT 0x04", func(r *raw) { r.bye(0x04) }, true},
		{"DISCONNECT 0x81", func(r *raw) { r.bye(0x81) }, true}, // [MQTT-3.14.4-3] names 0x00 alone
		{"malformed packet", func(r *raw) { r.write([]byte{0xf7, 0x80, 0x80}) }, true},
		{"over-long packet", func(r *raw) { r.write([]byte{0x30, 0xff, 0xff, 0xff, 0x7f}) }, true},
		{"second CONNECT", func(r *raw) {
			r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), ClientIdentifier: "x"}})
		}, true},
		{"decoder that panics", func(r *raw) { r.write([]byte{0x82, 0x06, 0, 1, 0, 0, 1, 'a'}) }, true},
	} {
		for _, v := range []byte{5, 4} {
			if v == 4 && strings.HasPrefix(c.name, "DISCONNECT 0x0") && c.want || v == 4 && c.name == "DISCONNECT 0x81" {
				continue // MQTT 3.1.1 has no reason codes
			}
			t.Run(c.name, func(t *testing.T) {
				b, addr := open(t, t.TempDir())
				sub, _ := connect(t, addr, 5, "sub")
				sub.subscribe(packets.Subscription{Filter: "gone/#", Qos: 1})
				r, _ := connect(t, addr, v, "x", will("gone/x", "bye", true), func(pk *packets.Packet) {
					if v == 5 {
						pk.Connect.WillProperties = packets.Properties{ContentType: "text/plain", User: []packets.UserProperty{{Key: "k", Val: "v"}}}
					}
				})
				c.end(r)
				if !c.want {
					r.closed()
					sub.nothing()
					if p, ok := b.Retained("gone/x"); ok {
						t.Errorf("got %q", p)
					}
					return
				}
				m := sub.next()
				if string(m.Payload) != "bye" {
					t.Errorf("got %+v", m)
				}
				if v == 5 && (m.Properties.ContentType != "text/plain" || len(m.Properties.User) != 1) {
					t.Errorf("properties: %+v", m.Properties)
				}
				if p, _ := b.Retained("gone/x"); string(p) != "bye" {
					t.Errorf("retained %q", p)
				}
			})
		}
	}
}

// A broker that shuts down publishes the Wills of who was connected.
func TestWillAtShutdown(t *testing.T) {
	dir := t.TempDir()
	b, addr := open(t, dir)
	r, _ := connect(t, addr, 5, "x", will("gone", "bye", true))
	r.nothing()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if bye := r.closed(); bye == nil || bye.ReasonCode != 0x8b {
		t.Errorf("got %+v", bye)
	}
	b, _ = open(t, dir)
	if p, _ := b.Retained("gone"); string(p) != "bye" {
		t.Errorf("got %q", p)
	}
}

// A broker that died publishes the Wills of who was connected when it is back,
// and of nobody else.
func TestWillAfterCrash(t *testing.T) {
	fs := vfs.NewCrashableMem()
	b, addr := open(t, "/store", func(o *broker.Options) { o.Store.FS = fs })
	connect(t, addr, 5, "here", will("gone/here", "bye", true))
	left, _ := connect(t, addr, 5, "left", will("gone/left", "bye", true))
	left.bye(0)
	left.closed()
	connect(t, addr, 5, "left") // gets the id once all that was the other's is gone
	lost, _ := connect(t, addr, 5, "lost", will("gone/lost", "1", true))
	_ = lost.Close()
	eventually(t, "the third Will", func() bool { _, ok := b.Retained("gone/lost"); return ok })
	// Something synced behind them, so that they are on the disk.
	if err := b.Publish(t.Context(), broker.Message{Topic: "x", Payload: []byte("y"), Retain: true}); err != nil {
		t.Fatal(err)
	}
	after := fs.CrashClone(vfs.CrashCloneCfg{})

	seen := &witness{}
	b, addr = open(t, "/store", func(o *broker.Options) { o.Store.FS = after; o.Interceptors = []broker.Interceptor{seen} })
	sub, _ := connect(t, addr, 5, "sub")
	// Whoever subscribes while they are being published may get them twice,
	// retained and live. Once the core takes something else, they are out.
	eventually(t, "the Wills", func() bool { _, ok := b.Retained("gone/here"); return ok })
	if err := b.Do(t.Context(), func() []broker.Message { return nil }); err != nil {
		t.Fatal(err)
	}
	sub.subscribe(packets.Subscription{Filter: "gone/#", Qos: 1})
	if m := sub.next(); m.TopicName != "gone/here" || string(m.Payload) != "bye" || !m.FixedHeader.Retain {
		t.Errorf("got %+v", m)
	}
	if m := sub.next(); m.TopicName != "gone/lost" {
		t.Errorf("got %+v", m)
	}
	sub.nothing()
	if err := b.Do(t.Context(), func() []broker.Message {
		if len(seen.topics) == 0 || seen.topics[0] != "gone/here" {
			t.Errorf("the interceptors saw %v", seen.topics)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// Once published it is not published again.
	again := after.CrashClone(vfs.CrashCloneCfg{})
	b, _ = open(t, "/store", func(o *broker.Options) { o.Store.FS = again })
	if err := b.Publish(t.Context(), broker.Message{Topic: "gone/here", Retain: true}); err != nil {
		t.Fatal(err)
	}
	if p, ok := b.Retained("gone/here"); ok {
		t.Errorf("got %q", p)
	}
}

// witness notes the topics that pass.
type witness struct{ topics []topic.Topic }

func (w *witness) Intercept(m *broker.Message) ([]broker.Message, error) {
	w.topics = append(w.topics, m.Topic)
	return nil, nil
}

// A Will is a publish as any other: the interceptors may refuse it.
func TestWillIntercepted(t *testing.T) {
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.Interceptors = []broker.Interceptor{refuser{}} })
	r, _ := connect(t, addr, 5, "x", will("refuse/this", "bye", true))
	_ = r.Close()
	eventually(t, "answer of the interceptor", func() bool { _, ok := b.Retained("refused"); return ok })
	if p, ok := b.Retained("refuse/this"); ok {
		t.Errorf("got %q", p)
	}
}

// A client that the full disk keeps from having a session is refused, and so is
// its Will: nothing of it is published after a crash.
func TestWillOfRefusedClient(t *testing.T) {
	dir := smallDisk(t)
	at := filepath.Join(dir, "store")
	b, addr := open(t, at, func(o *broker.Options) { o.Store.ReserveBytes = 32 << 20; o.Checkpoint = 10 * time.Millisecond })
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "full", func() bool { return b.StoreErr() != nil })
	if _, ack := connect(t, addr, 5, "refused", resume, will("gone/refused", "bye", true)); ack.ReasonCode != 0x97 {
		t.Fatalf("CONNACK 0x%02x", ack.ReasonCode)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, "room", func() bool { return b.StoreErr() == nil })
	r, _ := connect(t, addr, 5, "other")
	if ack := r.publish("synced", "x", true); ack.ReasonCode != 0 {
		t.Fatalf("PUBACK 0x%02x", ack.ReasonCode)
	}
	killed := filepath.Join(t.TempDir(), "store")
	if err := os.CopyFS(killed, os.DirFS(at)); err != nil {
		t.Fatal(err)
	}
	b, addr = open(t, killed)
	_, _ = connect(t, addr, 5, "after") // what was inherited is published before
	if p, ok := b.Retained("gone/refused"); ok {
		t.Errorf("published %q", p)
	}
}
