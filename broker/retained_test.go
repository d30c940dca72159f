package broker_test

import (
	"context"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

func TestRetainedSetReplaceClear(t *testing.T) {
	b, addr := open(t, t.TempDir())
	r, _ := connect(t, addr, 5, "x")
	for _, p := range []string{"1", "2", "", "3", ""} {
		r.publish("a", p, true)
		got, ok := b.Retained("a")
		if ok != (p != "") || string(got) != p {
			t.Errorf("after %q: %q, %v", p, got, ok)
		}
		sub, _ := connect(t, addr, 5, "sub")
		sub.subscribe(packets.Subscription{Filter: "a", Qos: 1})
		if p == "" {
			sub.nothing()
			continue
		}
		if m := sub.next(); string(m.Payload) != p || !m.FixedHeader.Retain {
			t.Errorf("after %q: %+v", p, m)
		}
		sub.nothing()
	}
	r.publish("a", "kept", true)
	r.publish("a", "live", false) // replaces nothing
	if got, _ := b.Retained("a"); string(got) != "kept" {
		t.Errorf("got %q", got)
	}
}

// The retain flag tells a replay from news; with Retain As Published news keep it.
func TestRetainFlag(t *testing.T) {
	_, addr := open(t, t.TempDir())
	pub, _ := connect(t, addr, 5, "pub")
	v3, _ := connect(t, addr, 4, "v3")
	plain, _ := connect(t, addr, 5, "plain")
	rap, _ := connect(t, addr, 5, "rap")
	v3.subscribe(packets.Subscription{Filter: "a", Qos: 1})
	plain.subscribe(packets.Subscription{Filter: "a", Qos: 1})
	rap.subscribe(packets.Subscription{Filter: "a", Qos: 1, RetainAsPublished: true})
	for _, c := range []struct {
		payload string
		retain  bool
	}{{"x", true}, {"y", false}, {"", true}} {
		pub.publish("a", c.payload, c.retain)
		for _, s := range []*raw{v3, plain, rap} {
			m := s.next()
			if want := s == rap && c.retain; m.FixedHeader.Retain != want || string(m.Payload) != c.payload {
				t.Errorf("retain %v: %+v, want retain %v", c.retain, m, want)
			}
		}
	}
}

// [MQTT-3.3.1-9] to [MQTT-3.3.1-11].
func TestRetainHandling(t *testing.T) {
	_, addr := open(t, t.TempDir())
	pub, _ := connect(t, addr, 5, "pub")
	pub.publish("a", "x", true)
	for _, c := range []struct {
		handling      byte
		first, second bool
	}{{0, true, true}, {1, true, false}, {2, false, false}} {
		sub, _ := connect(t, addr, 5, "sub")
		for i, want := range []bool{c.first, c.second} {
			sub.subscribe(packets.Subscription{Filter: "a", Qos: 1, RetainHandling: c.handling})
			if want {
				sub.next()
			}
			sub.nothing()
			_ = i
		}
		sub.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe}, PacketID: 3, Filters: packets.Subscriptions{{Filter: "a"}}})
		sub.expect(packets.Unsuback)
		pub.publish("a", "x", true)
		sub.nothing()
		sub.subscribe(packets.Subscription{Filter: "a", Qos: 1, RetainHandling: c.handling})
		if c.first {
			sub.next()
		}
		sub.nothing()
	}
	// [MQTT-4.8.2]: a shared subscription gets no retained messages.
	sub, _ := connect(t, addr, 5, "sub")
	sub.subscribe(packets.Subscription{Filter: "$share/g/a", Qos: 1})
	sub.nothing()
	pub.publish("a", "y", false)
	sub.next()
}

func TestNoLocal(t *testing.T) {
	_, addr := open(t, t.TempDir())
	me, _ := connect(t, addr, 5, "me")
	other, _ := connect(t, addr, 5, "other")
	me.subscribe(packets.Subscription{Filter: "a/#", Qos: 1, NoLocal: true})
	me.publish("a/b", "mine", false)
	me.nothing()
	other.publish("a/b", "other's", false)
	if m := me.next(); string(m.Payload) != "other's" {
		t.Errorf("got %q", m.Payload)
	}
	// Another subscription without the option still wants it.
	me.subscribe(packets.Subscription{Filter: "a/b", Qos: 1})
	me.send(publish("a/b", "mine", 0, false, 0))
	if m := me.next(); string(m.Payload) != "mine" {
		t.Errorf("got %q", m.Payload)
	}
	me.nothing()
}

// [MQTT-3.3.4-3]: replayed and live messages name the subscriptions they are for.
func TestSubscriptionIDs(t *testing.T) {
	_, addr := open(t, t.TempDir())
	r, _ := connect(t, addr, 5, "x")
	r.publish("a/b", "old", true)
	r.subscribe(packets.Subscription{Filter: "a/+", Qos: 1, Identifier: 7})
	ids := func() []int { t.Helper(); return r.next().Properties.SubscriptionIdentifier }
	if got := ids(); len(got) != 1 || got[0] != 7 {
		t.Errorf("replay: %v", got)
	}
	r.send(publish("a/b", "new", 0, false, 0))
	if got := ids(); len(got) != 1 || got[0] != 7 {
		t.Errorf("live: %v", got)
	}
	r.subscribe(packets.Subscription{Filter: "a/#", Qos: 1, Identifier: 300, RetainHandling: 2})
	r.send(publish("a/b", "both", 0, false, 0))
	if got := ids(); len(got) != 2 || got[0] != 7 || got[1] != 300 {
		t.Errorf("overlapping: %v", got)
	}
	r.nothing()
}

// Properties travel with a message, live, replayed, and after a restart.
func TestProperties(t *testing.T) {
	dir := t.TempDir()
	b, addr := open(t, dir)
	pub, _ := connect(t, addr, 5, "pub")
	live, _ := connect(t, addr, 5, "live")
	live.subscribe(packets.Subscription{Filter: "a", Qos: 1})
	pk := publish("a", "x", 1, true, 4)
	pk.Properties = packets.Properties{
		ContentType: "text/plain", ResponseTopic: "re/a", CorrelationData: []byte{1, 0, 2},
		PayloadFormat: 1, PayloadFormatFlag: true,
		User: []packets.UserProperty{{Key: "k", Val: "1"}, {Key: "k", Val: "2"}},
	}
	pub.send(pk)
	pub.expect(packets.Puback)
	check := func(what string, m packets.Packet) {
		t.Helper()
		p := m.Properties
		if p.ContentType != "text/plain" || p.ResponseTopic != "re/a" || string(p.CorrelationData) != "\x01\x00\x02" ||
			!p.PayloadFormatFlag || p.PayloadFormat != 1 || len(p.User) != 2 || p.User[0].Val != "1" || p.User[1].Val != "2" {
			t.Errorf("%s: %+v", what, p)
		}
	}
	check("live", live.next())
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, addr = open(t, dir)
	sub, _ := connect(t, addr, 5, "sub")
	sub.subscribe(packets.Subscription{Filter: "#", Qos: 1})
	check("after a restart", sub.next())
}

// [MQTT-3.3.2-5] [MQTT-3.3.2-6].
func TestMessageExpiry(t *testing.T) {
	dir := t.TempDir()
	short := func(o *broker.Options) { o.Checkpoint = 20 * time.Millisecond }
	b, addr := open(t, dir, short)
	pub, _ := connect(t, addr, 5, "pub")
	for topic, seconds := range map[string]uint32{"a/short": 1, "a/long": 1000} {
		pk := publish(topic, "x", 1, true, 4)
		pk.Properties.MessageExpiryInterval = seconds
		pub.send(pk)
		pub.expect(packets.Puback)
	}
	expired := make(chan struct{})
	stop, err := b.Watch(t.Context(), "a/short", func(m broker.Message) {
		if m.Retain && len(m.Payload) == 0 {
			close(expired)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	check := func(what string, addr string) {
		t.Helper()
		sub, _ := connect(t, addr, 5, "sub")
		sub.subscribe(packets.Subscription{Filter: "a/#", Qos: 1})
		m := sub.next()
		if left := m.Properties.MessageExpiryInterval; m.TopicName != "a/long" || left > 1000 || left < 900 {
			t.Errorf("%s: %s, %d s left", what, m.TopicName, left)
		}
		sub.nothing()
	}
	eventually(t, "no longer retained", func() bool { _, ok := b.Retained("a/short"); return !ok })
	check("expired", addr)
	select {
	case <-expired:
	case <-time.After(patience):
		t.Fatal("the watch was not told")
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, addr = open(t, dir, short)
	check("after a restart", addr)
}

// What expired while the broker was down is gone.
func TestExpiredWhileDown(t *testing.T) {
	dir := t.TempDir()
	b, _ := open(t, dir)
	expires := time.Now().Add(20 * time.Millisecond).UnixMilli()
	if err := b.Publish(t.Context(), broker.Message{Topic: "a", Payload: []byte("x"), Retain: true, Expires: expires}); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "time passes", func() bool { return time.Now().UnixMilli() > expires })
	b, _ = open(t, dir)
	if p, ok := b.Retained("a"); ok {
		t.Errorf("got %q", p)
	}
	if ms := b.RetainedMatch("#"); len(ms) != 0 {
		t.Errorf("got %v", ms)
	}
	if err := b.Do(context.Background(), func() []broker.Message { return nil }); err != nil {
		t.Error(err)
	}
}

// A replay that is slower than the changes still ends with the newest of each topic.
func TestReplayDuringChanges(t *testing.T) {
	b, addr := open(t, t.TempDir())
	const n = 2000
	put := func(v string) {
		var ms []broker.Message
		for i := range n {
			ms = append(ms, broker.Message{Topic: topicN(i), Payload: []byte(v), QoS: 1, Retain: true})
		}
		if err := b.Publish(t.Context(), ms...); err != nil {
			t.Error(err)
		}
	}
	put("1")
	sub, _ := connect(t, addr, 5, "sub")
	sub.subscribe(packets.Subscription{Filter: "t/#", Qos: 1})
	go put("2")
	last := map[string]string{}
	newest := 0
	for newest < n {
		m := sub.next()
		if last[m.TopicName] == "2" {
			newest--
		}
		if last[m.TopicName] = string(m.Payload); last[m.TopicName] == "2" {
			newest++
		}
	}
}

// What is published after SUBACK arrives once, live, even while the replay of
// what was there before goes on.
func TestNoReplayOfNews(t *testing.T) {
	b, addr := open(t, t.TempDir())
	pub, _ := connect(t, addr, 5, "pub")
	for i := range 100 {
		pub.publish("t/old", "x", true)
		if err := b.Do(t.Context(), func() []broker.Message { return nil }); err != nil { // it is out
			t.Fatal(err)
		}
		sub, _ := connect(t, addr, 5, "sub")
		sub.subscribe(packets.Subscription{Filter: "t/#", Qos: 1})
		pub.publish("t/new", "y", true)
		if m := sub.next(); m.TopicName != "t/old" || !m.FixedHeader.Retain {
			t.Fatalf("round %d: got %s, retain %v", i, m.TopicName, m.FixedHeader.Retain)
		}
		if m := sub.next(); m.TopicName != "t/new" || m.FixedHeader.Retain {
			t.Fatalf("round %d: got %s, retain %v", i, m.TopicName, m.FixedHeader.Retain)
		}
		sub.nothing()
		if err := b.Publish(t.Context(), broker.Message{Topic: "t/new", Retain: true}); err != nil {
			t.Fatal(err)
		}
		sub.bye(0)
	}
}
