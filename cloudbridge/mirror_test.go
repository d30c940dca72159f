package cloudbridge

import (
	"log/slog"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

type fakeClock struct{ t time.Time }

func (c *fakeClock) now() time.Time { return c.t }

func newTestMirror(t *testing.T) (*mirror, *fakeClock) {
	t.Helper()
	c := &fakeClock{time.UnixMilli(at)}
	return newMirror(slog.New(slog.NewTextHandler(t.Output(), nil)), c.now, linkGrace), c
}

func (m *mirror) tell(t *testing.T, tp topic.Topic, p string) news {
	t.Helper()
	parsed, err := topic.Parse(string(tp))
	if err != nil {
		t.Fatal(err)
	}
	return m.put(parsed, []byte(p))
}

// TestLinkState: a link that was seen to end is down at once; one that this
// process has not seen yet gets the time of an edge's longest back-off.
func TestLinkState(t *testing.T) {
	m, c := newTestMirror(t)
	want := func(s linkState, when string) {
		t.Helper()
		if got := m.node("n").state; got != s {
			t.Errorf("%s: state %d, want %d", when, got, s)
		}
	}
	link := topic.ReportedLink("n")
	want(linkUnknown, "before the broker was heard")
	m.tell(t, link, `{"online":false,"since":1}`)
	m.complete(map[topic.Topic]struct{}{link: {}})
	want(linkUnknown, "just after the start")
	c.t = c.t.Add(linkGrace)
	want(linkDown, "after the grace")
	if n := m.tell(t, link, `{"online":true,"since":2}`); !n.linkChanged || !n.urgent {
		t.Errorf("coming up is no news: %+v", n)
	}
	want(linkUp, "online")
	if n := m.tell(t, link, `{"online":true,"since":3}`); n.linkChanged {
		t.Error("a takeover counts as a change of the link")
	}
	m.tell(t, link, `{"online":false,"since":3}`)
	want(linkDown, "the Will")
	m.tell(t, link, `{"online":true,"since":4}`)
	m.lost()
	want(linkUnknown, "without a broker")
	m.complete(map[topic.Topic]struct{}{})
	want(linkUnknown, "back at a broker that lost its data")
	c.t = c.t.Add(linkGrace)
	want(linkDown, "and the node did not come")
}

func TestMayCreate(t *testing.T) {
	m, _ := newTestMirror(t)
	may := func(want bool, when string) {
		t.Helper()
		if got := m.node("n").mayCreate; got != want {
			t.Errorf("%s: may create %t", when, got)
		}
		m.created("n")
	}
	m.tell(t, topic.ReportedLink("n"), `{"online":true,"since":1}`)
	may(true, "link up")
	m.tell(t, topic.ReportedLink("n"), `{"online":true,"since":1}`)
	may(false, "the same again")
	m.tell(t, topic.ReportedNode("n"), `{"agent":"a","os":"linux","arch":"arm64"}`)
	may(true, "reported/node")
	m.tell(t, topic.ReportedNode("n"), `{"agent":"a","os":"linux","arch":"arm64"}`)
	may(false, "the same again")
	m.tell(t, topic.ReportedLink("n"), `{"online":false,"since":1}`)
	may(false, "link down")
	m.tell(t, topic.ReportedLink("n"), `{"online":true,"since":2}`)
	may(true, "link up again")
}

// TestUrgent: which reports a person must see within a second.
func TestUrgent(t *testing.T) {
	m, _ := newTestMirror(t)
	twin := topic.ReportedTwin("n", "d", "p", "speed")
	for _, tc := range []struct {
		tp     topic.Topic
		p      string
		urgent bool
	}{
		{twin, `{"v":1,"t":1}`, false},
		{twin, `{"v":2,"t":2}`, false},
		{twin, `{"v":null,"lv":2,"t":3,"q":"bad:timeout"}`, true},
		{twin, `{"v":null,"lv":2,"t":4,"q":"bad:timeout"}`, false},
		{twin, `{"v":3,"t":5}`, true},
		{twin, `{"v":3,"t":6,"ack":9}`, true},
		{twin, `{"v":3,"t":7,"ack":9,"err":"range"}`, true},
		{topic.ReportedDevice("n", "d", "p"), `{"uid":"u","rev":1,"state":"Online","since":1}`, true},
		{topic.ReportedDevice("n", "d", "p"), `{"uid":"u","rev":1,"state":"Online","since":1}`, false},
		{topic.ReportedDevice("n", "d", "p"), `{"uid":"u","rev":1,"state":"Offline","since":2}`, true},
		{topic.ReportedTarget("n", "d", "p", "speed"), `{"v":1,"rev":5,"uid":"u","by":"local","t":1}`, true},
		{topic.ReportedTarget("n", "d", "p", "speed"), ``, true},
	} {
		if n := m.tell(t, tc.tp, tc.p); n.urgent != tc.urgent || n.object != "d/p" || n.malformed {
			t.Errorf("%s %s: %+v, want urgent %t", tc.tp, tc.p, n, tc.urgent)
		}
	}
}

// TestMalformedReport: the last good report stands until the next good one.
func TestMalformedReport(t *testing.T) {
	m, _ := newTestMirror(t)
	tp := topic.ReportedTwin("n", "d", "p", "speed")
	m.tell(t, tp, `{"v":1,"t":1}`)
	for _, bad := range []string{`}`, `[]`, `{"v":1,"t":"now"}`, "\xff\xfe"} {
		if n := m.tell(t, tp, bad); !n.malformed {
			t.Errorf("%q was taken", bad)
		}
	}
	if r := m.device("n", "d/p").readings["speed"]; r.T != 1 {
		t.Errorf("reading %+v", r)
	}
	m.tell(t, tp, `{"v":2,"t":2}`)
	if r := m.device("n", "d/p").readings["speed"]; r.T != 2 {
		t.Errorf("reading %+v", r)
	}
}

// TestComplete: what a reconnect does not bring again is gone.
func TestComplete(t *testing.T) {
	m, _ := newTestMirror(t)
	kept, gone := topic.ReportedTwin("n", "d", "p", "speed"), topic.ReportedTwin("n", "d", "p", "pressure")
	m.tell(t, kept, `{"v":1,"t":1}`)
	m.tell(t, gone, `{"v":1,"t":1}`)
	m.tell(t, topic.ReportedTarget("n", "d", "p", "speed"), `{"v":1,"rev":5,"uid":"u","by":"local","t":1}`)
	m.tell(t, topic.ReportedPod("n", "d", "web"), `{"uid":"u","rev":1,"status":{}}`)
	if r := m.targetRev("n", "d/p", "speed"); r != 5 {
		t.Errorf("target rev %d", r)
	}
	m.complete(map[topic.Topic]struct{}{kept: {}})
	v := m.device("n", "d/p")
	if len(v.readings) != 1 || len(v.targets) != 0 || v.readings["speed"].T != 1 {
		t.Errorf("%+v", v)
	}
	if _, ok := m.pod("n", "d/web"); ok {
		t.Error("the pod is still there")
	}
}
