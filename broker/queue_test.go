package broker_test

import (
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
)

// counted is the value of a metric with a label.
func counted(t *testing.T, reg *prometheus.Registry, name, label string) float64 {
	t.Helper()
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fams {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

// The oldest messages of a full queue go, and are counted; what is left is in
// order, also when the broker was restarted in between.
func TestQueueDropsOldest(t *testing.T) {
	const limit, n = 10, 25
	for name, limits := range map[string]broker.QueueLimits{
		"messages": {Messages: limit},
		"bytes":    {Bytes: limit * 1100},
	} {
		t.Run(name, func(t *testing.T) {
			dir, reg := t.TempDir(), prometheus.NewRegistry()
			bounded := func(o *broker.Options) { o.Queue, o.Metrics = limits, reg }
			b, addr := open(t, dir, bounded)
			p := join(t, addr, 5, "away", resume)
			p.sub("a", 1)
			p.bye(0)
			pub := join(t, addr, 5, "pub")
			fill := strings.Repeat("x", 1000)
			for i := range n {
				if i == n/2 {
					if err := b.Close(); err != nil {
						t.Fatal(err)
					}
					reg = prometheus.NewRegistry()
					b, addr = open(t, dir, bounded)
					pub = join(t, addr, 5, "pub")
				}
				if code := pub.pub("a", fill+strconv.Itoa(i), 1); code != 0 {
					t.Fatalf("message %d: PUBACK 0x%02x", i, code)
				}
			}
			p = join(t, addr, 5, "away", resume)
			first := strings.TrimPrefix(string(p.next().Payload), fill)
			at, err := strconv.Atoi(first)
			if err != nil || n-at > limit || n-at < limit-1 {
				t.Fatalf("the first that is left is %q, of %d with room for %d", first, n, limit)
			}
			for at++; at < n; at++ {
				p.nextIs(fill + strconv.Itoa(at))
			}
			p.silent()
			if got := counted(t, reg, "fairlead_broker_messages_dropped_total", "queue_full"); got < n-n/2-1 || got > n-n/2+1 {
				t.Errorf("%v counted as dropped since the restart", got)
			}
		})
	}
}

// Publishers that came by a listener with queue-full=refuse are refused instead,
// in MQTT 3.1.1 by hanging up; nothing that waits is touched, and those who came
// by another listener go on.
func TestQueueRefuses(t *testing.T) {
	reg := prometheus.NewRegistry()
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.Queue.Messages, o.Metrics = 3, reg })
	strict, err := b.Listen("127.0.0.1:0?queue-full=refuse")
	if err != nil {
		t.Fatal(err)
	}
	p := join(t, addr, 5, "away", resume)
	p.sub("a/#", 2)
	p.bye(0)
	here := join(t, addr, 5, "here")
	here.sub("a/#", 1)
	pub := join(t, strict, 5, "pub")
	for i := range 3 {
		if code := pub.pub("a", strconv.Itoa(i), 1+byte(i%2)); code != 0 {
			t.Fatalf("message %d: 0x%02x", i, code)
		}
		here.nextIs(strconv.Itoa(i))
	}
	for _, qos := range []byte{1, 2} {
		if code := pub.pub("a", "over", qos); code != 0x97 {
			t.Errorf("QoS %d: 0x%02x, want 0x97", qos, code)
		}
	}
	if code := pub.pub("a", "kept", 1, retained); code != 0x97 {
		t.Errorf("retained: 0x%02x, want 0x97", code)
	}
	if v, ok := b.Retained("a"); ok {
		t.Errorf("retained %q though it was refused", v)
	}
	here.silent()
	old := join(t, strict, 4, "old")
	old.send(publish("a", "over", 1, false, 1))
	old.refused(0)
	pub.pub("a", "QoS 0", 0) // nobody's queue
	here.nextIs("QoS 0")
	if got := counted(t, reg, "fairlead_broker_refused_total", "queue_full"); got != 4 {
		t.Errorf("%v counted as refused, want 4", got)
	}
	if code := join(t, addr, 5, "other").pub("a", "3", 1); code != 0 {
		t.Errorf("by the other listener: 0x%02x", code)
	}
	here.nextIs("3")
	p = join(t, addr, 5, "away", resume)
	for i := 1; i < 4; i++ {
		p.nextIs(strconv.Itoa(i))
	}
	p.silent()
	if code := pub.pub("a", "room", 1); code != 0 {
		t.Errorf("with room again: 0x%02x", code)
	}
	for _, bad := range []string{"127.0.0.1:0?queue-full=maybe", "127.0.0.1:0?other=1"} {
		if _, err := b.Listen(bad); err == nil || !strings.Contains(err.Error(), "queue-full=refuse") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// A client that does not acknowledge is cut off when its queue is full, and has
// the newest messages when it is back; its publisher never knows.
func TestQueueOfSilentClient(t *testing.T) {
	const limit, n = 400, 1000
	_, addr := open(t, t.TempDir(), func(o *broker.Options) { o.Queue.Messages = limit })
	p := join(t, addr, 5, "silent", resume, receiveMax(5))
	p.sub("a", 1)
	pub := join(t, addr, 5, "pub")
	for i := range n {
		if code := pub.pub("a", strconv.Itoa(i), 1); code != 0 {
			t.Fatalf("message %d: 0x%02x", i, code)
		}
	}
	p.refused(0x97)
	p = join(t, addr, 5, "silent", resume)
	for i := n - limit; i < n; i++ {
		if m := p.nextIs(strconv.Itoa(i)); m.FixedHeader.Dup {
			t.Fatalf("%d was never sent and has DUP", i)
		}
	}
	p.silent()
}
