package main

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T) (addr string) {
	t.Helper()
	b, err := broker.Open(broker.Options{
		Dir: t.TempDir(), Node: node,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{Role: access.Local}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	url, err := b.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(url, "mqtt://")
}

// The generator against a real broker: what is acknowledged is delivered, and
// nothing waits at the end.
func TestLoad(t *testing.T) {
	for name, l := range map[string]load{
		"clean":         {Subscriber: "clean"},
		"persistent":    {Subscriber: "persistent"},
		"retained":      {Subscriber: "clean", Retained: 50},
		"no subscriber": {Subscriber: "none"},
		"paced":         {Subscriber: "clean", Rate: 2000},
	} {
		t.Run(name, func(t *testing.T) {
			l.Addr, l.Publishers, l.Window, l.Payload, l.Measure = open(t), 2, 4, 64, 300*time.Millisecond
			r, err := l.run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if r.Acked == 0 || r.P50 == 0 || (r.Delivered == 0) != (l.Subscriber == "none") {
				t.Errorf("nothing measured: %s", r)
			}
			if r.faults() != "" {
				t.Errorf("faults: %s", r)
			}
			if l.Rate > 0 && r.Acked > 1.2*l.Rate {
				t.Errorf("%s: more than the %g/s asked for", r, l.Rate)
			}
		})
	}
}

// scripted is a broker's side of one connection, byte by byte to the client.
func scripted(t *testing.T, b []byte) *conn {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan struct{}, 2)
	go func() { // the PUBACKs
		_, _ = io.Copy(io.Discard, server)
		done <- struct{}{}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for i := range b {
			if _, err := server.Write(b[i : i+1]); err != nil {
				return
			}
		}
		_ = server.Close()
	}()
	t.Cleanup(func() { _ = client.Close(); <-done; <-done })
	return &conn{nc: client, in: make([]byte, 16), receiveMax: 65535}
}

func TestConnack(t *testing.T) {
	// Session present, Receive Maximum 20, a user property, an assigned client id.
	body := []byte{1, 0, 18, 0x21, 0, 20, 0x26, 0, 1, 'a', 0, 2, 'b', 'c', 0x12, 0, 4, 'n', 'a', 'm', 'e'}
	c := scripted(t, appendPacket(nil, 0x20, body))
	p, err := c.wait(typeConnack)
	if err == nil {
		err = c.connack(p.body)
	}
	if err != nil || c.receiveMax != 20 || !c.present {
		t.Errorf("receive maximum %d, session %t, %v", c.receiveMax, c.present, err)
	}
	for name, bad := range map[string][]byte{
		"refused": {0, 0x87, 0}, "short": {0}, "unknown property": {0, 0, 1, 0x7f}, "property cut off": {0, 0, 2, 0x21, 0}, "string cut off": {0, 0, 4, 0x12, 0, 9, 'x'},
	} {
		if err := c.connack(bad); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestPublishRoundTrip(t *testing.T) {
	for _, n := range []int{10, 117, 118, 200, 300, 16384, 70000} { // lengths of one to three bytes
		payload := []byte(strings.Repeat("x", n))
		c := scripted(t, appendPublish(nil, "a/b", 258, true, payload))
		p, err := c.wait(typePublish)
		if err != nil {
			t.Fatalf("%d B: %v", n, err)
		}
		topic, got, id, err := parsePublish(p)
		if err != nil || string(topic) != "a/b" || string(got) != string(payload) || id != 258 || p.first&1 == 0 {
			t.Errorf("%d B: %q, %d B, id %d, first %x, %v", n, topic, len(got), id, p.first, err)
		}
	}
}

// The subscriber tells what is missing from what came twice.
func TestSubscriberCounts(t *testing.T) {
	for _, tc := range []struct {
		name             string
		numbers          []int64
		delivered, again int64
	}{
		{"in order", []int64{0, 1, 2}, 3, 0},
		{"a gap", []int64{0, 2}, 2, 0},
		{"twice", []int64{0, 1, 1}, 2, 1},
		{"out of order", []int64{0, 2, 1}, 2, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var b []byte
			payload := payloadOf(1, 16)
			for _, n := range tc.numbers {
				b = appendPublish(b, "t", 1, false, payload(n))
			}
			var n counters
			s := &subscriber{c: scripted(t, b), n: &n, next: make([]int64, 2)}
			_ = s.take() // ends with the script
			if n.delivered.Load() != tc.delivered || n.again.Load() != tc.again {
				t.Errorf("delivered %d, again %d", n.delivered.Load(), n.again.Load())
			}
		})
	}
}

// A refused publish ends the load; it must not count as acknowledged.
func TestRefusedPublish(t *testing.T) {
	l := load{Addr: open(t), Publishers: 1, Window: 4, Payload: 64, Measure: time.Minute, Subscriber: "none"}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var n counters
	p := &publisher{n: &n, window: 1, topics: []string{"fl/bench/reported/node"}, limit: 1, payload: payloadOf(0, 64)}
	if err := p.connect(ctx, l.Addr, connect{id: "p"}); err != nil {
		t.Fatal(err)
	}
	defer p.c.disconnect()
	if err := p.run(); err == nil || !strings.Contains(err.Error(), "0x87") || n.acked.Load() != 0 {
		t.Errorf("%v, acked %d", err, n.acked.Load())
	}
}

func TestReplayed(t *testing.T) {
	addr := open(t)
	topics := retainedTopics(3000)
	if err := publishAll(t.Context(), addr, topics, 3); err != nil {
		t.Fatal(err)
	}
	for _, qos := range []byte{0, 1} {
		if s, err := replayed(t.Context(), addr, qos, len(topics)); err != nil || s <= 0 {
			t.Errorf("QoS %d: %g s, %v", qos, s, err)
		}
	}
}

func TestVerdicts(t *testing.T) {
	for _, tc := range []struct {
		name         string
		ours, theirs []float64
		bound        *bound
		void         string
		median       float64
		met          string
	}{
		{"ratio met", []float64{10, 20, 30}, []float64{10, 10, 10}, ratio(true, 2), "", 2, "yes"},
		{"ratio not met", []float64{10, 19, 30}, []float64{10, 10, 10}, ratio(true, 2), "", 1.9, "no"},
		{"ratio at most", []float64{16}, []float64{10}, ratio(false, 1.5), "", 1.6, "no"},
		{"void", []float64{30}, []float64{10}, ratio(true, 1), "as it lost", 3, "no"},
		{"nobody to compare with", []float64{30}, nil, ratio(true, 1), "", 0, ""},
		{"difference", []float64{6, 9}, []float64{2, 3}, &bound{Of: "difference", Value: 5}, "", 5, "yes"},
		{"value", []float64{13, 12, 1}, []float64{1, 1, 1}, atMost(12), "", 12, "yes"},
		{"nothing at all", []float64{1}, nil, atMost(0), "", 1, "no"},
		{"at least", []float64{19}, nil, atLeast(20), "", 19, "no"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r report
			r.add(figure{Name: tc.name, Ours: tc.ours, Theirs: tc.theirs, Bound: tc.bound, Void: tc.void})
			f := r.Figures[0]
			met := ""
			if f.Met != nil {
				met = map[bool]string{true: "yes", false: "no"}[*f.Met]
			}
			if f.Median != tc.median || met != tc.met {
				t.Errorf("median %g, met %q: %s", f.Median, met, f)
			}
			if says := strings.Contains(f.String(), "NOT MET"); says != (tc.met == "no") {
				t.Errorf("says %s", f)
			}
		})
	}
}

func TestSeed(t *testing.T) {
	topics, err := seed(t.Context(), t.TempDir(), 2)
	if err != nil || len(topics) != 2*properties || topics[properties] != "fl/bench/reported/twin/default/device-1/value00" {
		t.Errorf("%d topics, %v", len(topics), err)
	}
}

func TestPayloadNumbers(t *testing.T) {
	b := payloadOf(7, 64)(9)
	if len(b) != 64 || binary.BigEndian.Uint16(b) != 7 || binary.BigEndian.Uint64(b[2:]) != 9 {
		t.Errorf("%q", b)
	}
}
