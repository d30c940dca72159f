package main

import (
	"bytes"
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// silentListener accepts connections and says nothing.
func silentListener(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer func() { _ = c.Close() }()
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
	})
	return "mqtt://" + l.Addr().String()
}

// TestSet wishes against the real twin engine.
func TestSet(t *testing.T) {
	b, edgeURL := edge(t)
	_, cloudURL := cloud(t)
	for _, c := range []struct {
		name, args string
		target     string // topic below reported/target and its value, after it
	}{
		{"set", "twin set pump-1/speedSetpoint 40 --broker EDGE", "default/pump-1/speedSetpoint 40"},
		{"set-json", "twin set pump-1/speedSetpoint 41 --broker EDGE -o json", "default/pump-1/speedSetpoint 41"},
		{"set-exp", "twin set pump-1/speedSetpoint 42 --exp 10m --broker EDGE", "default/pump-1/speedSetpoint 42"},
		{"set-text", "twin set pump-1/mode auto --broker EDGE", `default/pump-1/mode "auto"`},
		{"set-text-number", "twin set pump-1/mode 12 --broker EDGE", `default/pump-1/mode "12"`},
		{"set-negative", "twin set plant/valve/angle -30 --broker EDGE", "plant/valve/angle -30"},
		{"set-range", "twin set pump-1/speedSetpoint 400 --broker EDGE", "default/pump-1/speedSetpoint 42"},
		{"set-range-json", "twin set pump-1/speedSetpoint 400 --broker EDGE -o json", "default/pump-1/speedSetpoint 42"},
		{"set-type", "twin set pump-1/speedSetpoint fast --broker EDGE", "default/pump-1/speedSetpoint 42"},
		{"set-access", "twin set pump-1/pressure 4 --broker EDGE", ""},
		{"set-property", "twin set pump-1/presure 4 --broker EDGE", ""},
		{"set-device", "twin set pump-9/speedSetpoint 4 --broker EDGE", ""},
		{"set-device-node", "twin set pump-9/speedSetpoint 4 --node plant-7 --broker EDGE", ""},
		{"set-other-node", "twin set pump-1/speedSetpoint 4 --node plant-9 --broker EDGE", ""},
		{"set-conflict", "twin set pump-1/speedSetpoint 4 --if 17 --broker EDGE", "default/pump-1/speedSetpoint 42"},
		{"set-cloud", "twin set pump-1/speedSetpoint 4 --broker CLOUD", ""},
		{"set-wait-nobody", "twin set pump-1/speedSetpoint 43 --wait --timeout 600ms --broker EDGE", "default/pump-1/speedSetpoint 43"},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := strings.Fields(strings.NewReplacer("CLOUD", cloudURL, "EDGE", edgeURL).Replace(c.args))
			got := "$ fairlead " + c.args + "\n" + fairlead(t, args...).String()
			golden(t, c.name, newRev.ReplaceAllString(got, "REV"))
			if c.target != "" {
				name, want, _ := strings.Cut(c.target, " ")
				raw, _ := b.Retained(topic.Topic("fl/" + node + "/reported/target/" + name))
				if g := decode[payload.Target](raw); g == nil || string(g.V) != want || g.By != payload.ByLocal && strings.Contains(c.args, name) {
					t.Errorf("the target is %s, want %s", raw, want)
				}
			}
		})
	}
	raw, _ := b.Retained(topic.ReportedTarget(node, "default", "pump-1", "speedSetpoint"))
	g := decode[payload.Target](raw)
	if r := fairlead(t, "twin", "set", "pump-1/speedSetpoint", "44", "--broker", edgeURL, "--if", newRev.FindString(string(raw))); r.err != nil {
		t.Errorf("--if with the present rev %d: %v", g.Rev, r.err)
	}
}

// TestSetWait has a mapper that carries wishes out, or refuses them.
func TestSetWait(t *testing.T) {
	b, url := edge(t)
	stop, err := b.Watch(t.Context(), topic.OfKind(node, topic.KindReportedTarget), func(m broker.Message) {
		g := decode[payload.Target](m.Payload)
		p, err := topic.Parse(string(m.Topic))
		if g == nil || err != nil || g.By != payload.ByLocal {
			return
		}
		r := payload.Reading{V: g.V, T: now, Ack: g.Rev}
		if string(g.V) == "13" {
			r = payload.Reading{V: raw("12"), T: now, Ack: g.Rev, Err: "device"}
		}
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_ = b.Publish(ctx, broker.Message{Topic: topic.ReportedTwin(node, p.Namespace, p.Name, p.Property), Payload: encode(r), QoS: 1, Retain: true})
		}()
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	r := fairlead(t, "twin", "set", "pump-1/speedSetpoint", "40", "--wait", "--broker", url)
	if r.err != nil || !strings.HasPrefix(r.out.String(), "applied pump-1/speedSetpoint = 40, rev ") {
		t.Errorf("got %s", r)
	}
	r = fairlead(t, "twin", "set", "pump-1/speedSetpoint", "13", "--wait", "--broker", url, "-o", "json")
	if r.err == nil || !strings.Contains(r.err.Error(), "the mapper could not carry it out: device") || !strings.Contains(r.out.String(), `"applied": false`) {
		t.Errorf("got %s", r)
	}
}

// buffer is written by a command and read by the test meanwhile.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// follows runs a command that follows, in the background.
func follows(t *testing.T, args ...string) *buffer {
	t.Helper()
	out := &buffer{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	a := &app{out: out, errOut: out, now: func() time.Time { return time.UnixMilli(now).UTC() }}
	go func() { done <- a.run(ctx, args) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("fairlead %s: %v", strings.Join(args, " "), err)
		}
	})
	return out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// TestTraceLive follows a cloud wish over two brokers.
func TestTraceLive(t *testing.T) {
	cloudBroker, cloudURL := cloud(t)
	edgeBroker, edgeURL := edge(t)
	out := follows(t, "trace", "fl/plant-7/desired/twin/default/pump-1/speedSetpoint", "--broker", cloudURL, "--edge-broker", edgeURL)
	eventually(t, "the present wish", func() bool { return strings.Count(out.String(), "applied") == 1 })
	before := len(out.String())
	rest := func() string { return out.String()[before:] }
	wish := payload.Wish{V: raw("75"), Rev: now + 1000, UID: uid}
	put(t, cloudBroker, topic.DesiredTwin(node, "default", "pump-1", "speedSetpoint"), wish)
	eventually(t, "stored", func() bool { return strings.Contains(rest(), "stored") })
	put(t, edgeBroker, topic.DesiredTwin(node, "default", "pump-1", "speedSetpoint"), wish)
	eventually(t, "sent", func() bool { return strings.Contains(rest(), "sent") })
	put(t, edgeBroker, topic.ReportedTwin(node, "default", "pump-1", "speedSetpoint"), payload.Reading{V: raw("75"), T: now, Ack: wish.Rev})
	eventually(t, "applied", func() bool { return strings.Contains(rest(), "applied") })
	golden(t, "trace-live", rest())
}

// TestWatchLive follows changes, across a restart of nothing: values, targets,
// states and removals.
func TestWatchLive(t *testing.T) {
	b, url := edge(t)
	out := follows(t, "twin", "watch", "pump-1", "--broker", url)
	eventually(t, "the present values", func() bool { return strings.Contains(out.String(), "Error: temperature") })
	before := ""
	eventually(t, "no more lines", func() bool { // they come at once, in one batch
		if s := out.String(); s == before {
			return true
		}
		before = out.String()
		time.Sleep(50 * time.Millisecond)
		return false
	})
	rest := func() string { return out.String()[len(before):] }
	put(t, b, topic.ReportedTwin(node, "default", "pump-1", "pressure"), payload.Reading{V: raw("3.5"), T: now + 1500})
	put(t, b, topic.ReportedTwin(node, "default", "pump-1", "pressure"), payload.Reading{V: raw("null"), LV: raw("3.5"), T: now + 1600, Q: payload.QualityTimeout})
	put(t, b, topic.ReportedTwin(node, "plant", "valve", "angle"), payload.Reading{V: raw("3"), T: now + 1700}) // not asked for
	put(t, b, topic.ReportedDevice(node, "default", "pump-1"), payload.DeviceStatus{UID: uid, Rev: pump.Rev, State: payload.DeviceOffline, Since: now + 1800, Error: "no route to host"})
	put(t, b, topic.DesiredDevice(node, "default", "pump-1"), nil)
	eventually(t, "the removal", func() bool { return strings.Contains(rest(), "no state any more") })
	lines := strings.Split(strings.TrimSpace(rest()), "\n")
	golden(t, "twin-watch-live", strings.Join(lines[:3], "\n")+"\n")
}
