package broker_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"
)

// [MQTT-4.7.1-1] to [MQTT-4.7.3-4], live and retained.
func TestConformWildcards(t *testing.T) {
	_, addr := open(t, t.TempDir())
	topics := []string{"a", "A", "/", "/a", "a/", "a/b", "a/b/c", "a//b", "b", " ", "a b/c", "$x/a", "$x", "é/ü"}
	pub := join(t, addr, 5, "pub")
	for _, c := range []struct {
		filter string
		want   []string
	}{
		{"a", []string{"a"}},
		{"A", []string{"A"}},
		{"#", []string{"a", "A", "/", "/a", "a/", "a/b", "a/b/c", "a//b", "b", " ", "a b/c", "é/ü"}},
		{"+", []string{"a", "A", "b", " "}},
		{"a/#", []string{"a", "a/", "a/b", "a/b/c", "a//b"}},
		{"a/+", []string{"a/", "a/b"}},
		{"+/+", []string{"/", "/a", "a/", "a/b", "a b/c", "é/ü"}},
		{"/+", []string{"/", "/a"}},
		{"+/", []string{"/", "a/"}},
		{"/", []string{"/"}},
		{"+/#", []string{"a", "A", "/", "/a", "a/", "a/b", "a/b/c", "a//b", "b", " ", "a b/c", "é/ü"}},
		{"a/+/b", []string{"a//b"}},
		{"+/b/+", []string{"a/b/c"}},
		{"+/b/#", []string{"a/b", "a/b/c"}},
		{"a//#", []string{"a/", "a//b"}},
		{"$x/#", []string{"$x/a", "$x"}},
		{"$x/+", []string{"$x/a"}},
		{"+/a", []string{"/a"}},
		{" ", []string{" "}},
		{"é/+", []string{"é/ü"}},
	} {
		t.Run(c.filter, func(t *testing.T) {
			live := join(t, addr, 5, "live")
			live.sub(c.filter, 1)
			for _, topic := range topics {
				if code := pub.pub(topic, topic, 1, retained); code != 0 {
					t.Fatalf("%q: PUBACK 0x%02x", topic, code)
				}
			}
			replay := join(t, addr, 5, "replay")
			replay.sub(c.filter, 1)
			for name, p := range map[string]*peer{"live": live, "replay": replay} {
				var got []string
				for range c.want {
					got = append(got, p.next().TopicName)
				}
				p.silent()
				if name == "live" && !slices.Equal(got, c.want) {
					t.Errorf("live: got %q, want %q", got, c.want)
				}
				slices.Sort(got)
				if want := slices.Sorted(slices.Values(c.want)); !slices.Equal(got, want) {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
			for _, topic := range topics {
				pub.pub(topic, "", 1, retained)
			}
		})
	}
}

// [MQTT-4.7.1-1] [MQTT-4.7.1-2] [MQTT-4.7.3-1] [MQTT-4.8.2-1] [MQTT-4.8.2-2]
// [MQTT-3.9.3-1] [MQTT-3.8.4-5] [MQTT-3.8.4-6]: a bad filter is refused, those beside it are taken.
func TestConformBadFilters(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		for _, f := range []string{"", "a#", "#/a", "a/#/b", "##", "+a", "a+", "a/b+/c", "++", "$share/g", "$share//a", "$share/g/", "$share/g+/a", "$share/g#/a"} {
			if v == 4 && strings.HasPrefix(f, "$share") {
				continue // an ordinary filter in MQTT 3.1.1
			}
			t.Run(f, func(t *testing.T) {
				p := join(t, addr, v, "c")
				want := []byte{1, 0x8f, 0}
				if v == 4 {
					want[1] = 0x80
				}
				ack := p.subs(packets.Subscription{Filter: "one", Qos: 1}, packets.Subscription{Filter: f, Qos: 1}, packets.Subscription{Filter: "two"})
				if !slices.Equal(ack.ReasonCodes, want) || (v == 5 && ack.Properties.ReasonString == "") {
					t.Errorf("SUBACK % x %q, want % x", ack.ReasonCodes, ack.Properties.ReasonString, want)
				}
				p.pub("one", "x", 0)
				p.nextIs("x")
				p.pub("two", "y", 0)
				p.nextIs("y")
			})
		}
	})
}

// Malformed SUBSCRIBE and UNSUBSCRIBE. [MQTT-3.8.1-1] [MQTT-3.8.3-2]
// [MQTT-3.8.3-5] [MQTT-3.10.1-1] [MQTT-3.10.3-2] [MQTT-2.2.1-3].
func TestConformBadSubscribe(t *testing.T) {
	_, addr := open(t, t.TempDir())
	for _, c := range []struct {
		name  string
		in    []byte
		codes []byte
	}{
		{"flags 0", []byte{0x80, 7, 0, 1, 0, 0, 1, 'a', 0}, []byte{0x81}},
		{"no filter", []byte{0x82, 3, 0, 1, 0}, []byte{0x81, 0x82}},
		{"packet id 0", []byte{0x82, 7, 0, 0, 0, 0, 1, 'a', 0}, []byte{0x81, 0x82}},
		{"QoS 3", []byte{0x82, 7, 0, 1, 0, 0, 1, 'a', 3}, []byte{0x81, 0x82}},
		{"retain handling 3", []byte{0x82, 7, 0, 1, 0, 0, 1, 'a', 0x30}, []byte{0x81, 0x82}},
		{"reserved option bits", []byte{0x82, 7, 0, 1, 0, 0, 1, 'a', 0xc0}, []byte{0x81}},
		{"filter not UTF-8", []byte{0x82, 7, 0, 1, 0, 0, 1, 0xff, 0}, []byte{0x81}},
		{"filter with U+0000", []byte{0x82, 7, 0, 1, 0, 0, 1, 0, 0}, []byte{0x81}},
		{"ends after a filter", []byte{0x82, 6, 0, 1, 0, 0, 1, 'a'}, []byte{0x81}},
		{"subscription id 0", []byte{0x82, 9, 0, 1, 2, 0x0b, 0, 0, 1, 'a', 0}, []byte{0x82}},
		{"two subscription ids", []byte{0x82, 11, 0, 1, 4, 0x0b, 1, 0x0b, 2, 0, 1, 'a', 0}, []byte{0x82}},
		{"[MQTT-3.8.3-4] no local on a shared subscription", append([]byte{0x82, 16, 0, 1, 0, 0, 10}, "$share/g/a\x04"...), []byte{0x82}},
		{"UNSUBSCRIBE flags 0", []byte{0xa0, 6, 0, 1, 0, 0, 1, 'a'}, []byte{0x81}},
		{"UNSUBSCRIBE no filter", []byte{0xa2, 3, 0, 1, 0}, []byte{0x81, 0x82}},
		{"UNSUBSCRIBE packet id 0", []byte{0xa2, 6, 0, 0, 0, 0, 1, 'a'}, []byte{0x81, 0x82}},
		{"UNSUBSCRIBE not UTF-8", []byte{0xa2, 6, 0, 1, 0, 0, 1, 0xff}, []byte{0x81}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := join(t, addr, 5, "c")
			p.write(c.in)
			pk, err := p.read()
			if err != nil || pk.FixedHeader.Type != packets.Disconnect || !slices.Contains(c.codes, pk.ReasonCode) {
				t.Errorf("got %s 0x%02x, %v, want DISCONNECT % x", packets.PacketNames[pk.FixedHeader.Type], pk.ReasonCode, err, c.codes)
			}
			p.gone()
		})
	}
}

// [MQTT-3.8.4-3]: a second SUBSCRIBE with the same filter replaces the first,
// without a gap, and is one subscription.
func TestConformResubscribe(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		p, pub := join(t, addr, v, "c"), join(t, addr, 5, "pub")
		pub.pub("a", "kept", 2, retained)
		for _, qos := range []byte{2, 0, 1} {
			p.sub("a", qos)
			if m := p.nextIs("kept"); m.FixedHeader.Qos != qos || !m.FixedHeader.Retain {
				t.Errorf("replay with QoS %d, retain %v, want %d", m.FixedHeader.Qos, m.FixedHeader.Retain, qos)
			}
			pub.pub("a", "live", 2)
			if m := p.nextIs("live"); m.FixedHeader.Qos != qos {
				t.Errorf("live with QoS %d, want %d", m.FixedHeader.Qos, qos)
			}
			p.silent()
		}
		if v == 5 {
			p.subs(packets.Subscription{Filter: "a", Identifier: 5, RetainHandling: 2, RetainAsPublished: true, NoLocal: true, Qos: 1})
			pub.pub("a", "flags", 1, retained)
			if m := p.nextIs("flags"); !m.FixedHeader.Retain || !slices.Equal(m.Properties.SubscriptionIdentifier, []int{5}) {
				t.Errorf("retain %v, ids %v", m.FixedHeader.Retain, m.Properties.SubscriptionIdentifier)
			}
			p.pub("a", "own", 1)
			p.silent()
			p.subs(packets.Subscription{Filter: "a", RetainHandling: 2}) // all of it is gone
			p.pub("a", "own", 1, retained)
			if m := p.nextIs("own"); m.FixedHeader.Retain || len(m.Properties.SubscriptionIdentifier) > 0 || m.FixedHeader.Qos != 0 {
				t.Errorf("retain %v, ids %v, QoS %d", m.FixedHeader.Retain, m.Properties.SubscriptionIdentifier, m.FixedHeader.Qos)
			}
		}
	})
}

// [MQTT-3.10.4-1] to [MQTT-3.10.4-6] [MQTT-3.11.3-1] [MQTT-3.11.3-2].
func TestConformUnsubscribe(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		p, pub := join(t, addr, v, "c"), join(t, addr, 5, "pub")
		p.subs(packets.Subscription{Filter: "a/#", Qos: 1}, packets.Subscription{Filter: "b", Qos: 1}, packets.Subscription{Filter: "$share/g/a", Qos: 1})
		ack := p.unsub("a/b", "b", "a/+", "$share/h/a", "$share/g/a")
		if want := []byte{0x11, 0, 0x11, 0x11, 0}; v == 5 && !slices.Equal(ack.ReasonCodes, want) {
			t.Errorf("UNSUBACK % x, want % x", ack.ReasonCodes, want)
		}
		pub.pub("b", "x", 1)
		pub.pub("a", "y", 1) // compared as text: a/# is still there
		p.nextIs("y")
		p.silent()
		p.unsub("a/#")
		pub.pub("a", "z", 1)
		p.silent()
		if ack := p.unsub("a/#"); v == 5 && ack.ReasonCodes[0] != 0x11 {
			t.Errorf("UNSUBACK % x", ack.ReasonCodes)
		}
	})
}

// [MQTT-3.8.4-8]: the lower of what was published and what was granted.
// [MQTT-3.3.1-3]: DUP is not passed on. [MQTT-3.3.1-2]: QoS 0 has none.
func TestConformQoS(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		for published := range byte(3) {
			for granted := range byte(3) {
				sub, pub := join(t, addr, v, "sub"), join(t, addr, v, "pub")
				sub.sub("a", granted)
				if code := pub.pub("a", "x", published, func(pk *packets.Packet) { pk.FixedHeader.Dup = published > 0 }); code != 0 {
					t.Fatalf("QoS %d: 0x%02x", published, code)
				}
				m := sub.nextIs("x")
				if want := min(published, granted); m.FixedHeader.Qos != want || m.FixedHeader.Dup || (m.PacketID > 0) != (want > 0) {
					t.Errorf("published %d, granted %d: QoS %d, DUP %v", published, granted, m.FixedHeader.Qos, m.FixedHeader.Dup)
				}
				sub.silent()
			}
		}
	})
}

// [MQTT-3.3.4-2] [MQTT-3.3.4-3] [MQTT-3.3.4-4] [MQTT-3.3.4-5]: each overlapping
// subscription is served, by one copy or several, with the highest QoS and all ids.
func TestConformOverlap(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		p, pub := join(t, addr, v, "c"), join(t, addr, 5, "pub")
		p.subs(packets.Subscription{Filter: "a/b", Qos: 0, Identifier: 1})
		p.subs(packets.Subscription{Filter: "a/+", Qos: 2, Identifier: 268435455})
		p.subs(packets.Subscription{Filter: "a/#", Qos: 1}) // without an id
		pub.pub("a/b", "x", 2)
		pub.pub("a/b/c", "end", 0)
		var ids []int
		highest := byte(0)
		for m := p.next(); string(m.Payload) == "x"; m = p.next() {
			highest = max(highest, m.FixedHeader.Qos)
			ids = append(ids, m.Properties.SubscriptionIdentifier...)
		}
		if slices.Sort(ids); highest != 2 || v == 5 && !slices.Equal(ids, []int{1, 268435455}) {
			t.Errorf("QoS %d, ids %v", highest, ids)
		}
	})
}

// Shared subscriptions [MQTT 5, 4.8.2]: each message goes to one member of each
// group, and to every ordinary subscription.
func TestConformShared(t *testing.T) {
	_, addr := open(t, t.TempDir())
	const n = 300
	counts := map[string]int{}
	var members []*peer
	for _, name := range []string{"g1", "g2", "g3"} {
		p := join(t, addr, 5, name)
		p.sub("$share/g/s/#", 1)
		members = append(members, p)
	}
	h := join(t, addr, 5, "h")
	h.sub("$share/h/s/+", 1)
	plain := join(t, addr, 4, "plain")
	plain.sub("s/a", 1)
	dual := join(t, addr, 5, "dual") // member of another group, and by itself
	dual.subs(packets.Subscription{Filter: "$share/d/s/a", Qos: 1, Identifier: 1})
	dual.subs(packets.Subscription{Filter: "s/a", Qos: 1, Identifier: 2})
	members = append(members, h, plain)
	pub := join(t, addr, 5, "pub")
	seen := map[string]int{}
	for i := range n {
		pub.pub("s/a", strconv.Itoa(i), 1)
	}
	pub.pub("s/b", "kept", 1, retained)
	for _, p := range members {
		p.sub(fmt.Sprintf("end/%p", p), 1)
		pub.pub(fmt.Sprintf("end/%p", p), "end", 1)
		last := -1
		for m := p.next(); string(m.Payload) != "end"; m = p.next() {
			i, err := strconv.Atoi(string(m.Payload))
			if err == nil {
				if i <= last {
					t.Errorf("%d after %d", i, last)
				}
				last = i
			}
			if p != h && p != plain {
				seen[string(m.Payload)]++
			}
			counts[fmt.Sprintf("%p", p)]++
		}
	}
	if len(seen) != n+1 {
		t.Errorf("group g got %d of %d", len(seen), n+1)
	}
	for payload, k := range seen {
		if k != 1 {
			t.Errorf("group g got %s %d times", payload, k)
		}
	}
	if got := counts[fmt.Sprintf("%p", h)]; got != n+1 {
		t.Errorf("group h got %d", got)
	}
	if got := counts[fmt.Sprintf("%p", plain)]; got != n {
		t.Errorf("the ordinary subscription got %d", got)
	}
	for _, p := range members[:3] {
		if got := counts[fmt.Sprintf("%p", p)]; got < n/10 {
			t.Errorf("one member of three got %d of %d", got, n)
		}
	}
	var ids []int
	for len(ids) < 2*n {
		ids = append(ids, dual.next().Properties.SubscriptionIdentifier...)
	}
	dual.silent()
	slices.Sort(ids)
	if ids[n-1] != 1 || ids[n] != 2 {
		t.Error("subscription ids of a shared and an ordinary subscription are mixed up")
	}
	// No retained messages for a new member; $share is case sensitive.
	p := join(t, addr, 5, "late")
	p.sub("$share/g/s/b", 1)
	p.silent()
	p.sub("$SHARE/g/x", 1)
	pub.pub("x", "x", 1)
	p.silent()
}

// "Never to an offline member while one is online"; when all are away one of
// them gets it later; and what a member did not acknowledge goes to another when
// its session ends [MQTT-4.8.2-5].
func TestConformSharedAway(t *testing.T) {
	_, addr := open(t, t.TempDir())
	pub := join(t, addr, 5, "pub")
	away := join(t, addr, 5, "away", resume)
	away.sub("$share/g/a", 1)
	here := join(t, addr, 5, "here", resume)
	here.sub("$share/g/a", 1)
	away.bye(0)
	for i := range 100 {
		pub.pub("a", strconv.Itoa(i), 1)
		here.nextIs(strconv.Itoa(i))
	}
	here.bye(0)
	for i := range 10 {
		pub.pub("a", strconv.Itoa(i), 1)
	}
	here, away = join(t, addr, 5, "here", resume), join(t, addr, 5, "away", resume)
	got := 0
	for _, p := range []*peer{here, away} {
		p.sub(fmt.Sprintf("end/%p", p), 1)
		got += len(p.until("end", func() { pub.pub(fmt.Sprintf("end/%p", p), "end", 1) }))
	}
	if got != 10 {
		t.Errorf("%d of 10 came back to the group", got)
	}
	// here takes some and never acknowledges; then its session ends.
	away.bye(0)
	for i := range 10 {
		pub.pub("a", strconv.Itoa(i), 1)
	}
	for range 10 {
		here.message()
	}
	away = join(t, addr, 5, "away", resume)
	here.bye(0, func(pk *packets.Packet) { pk.Properties.SessionExpiryIntervalFlag = true })
	for i := range 10 {
		away.nextIs(strconv.Itoa(i))
	}
	away.silent()
	// So does what waits for a member that is away, when its session is ended by
	// a clean start.
	away.bye(0)
	other := join(t, addr, 5, "other", resume)
	other.sub("$share/g/a", 1)
	other.bye(0)
	for i := range 10 {
		pub.pub("a", strconv.Itoa(i), 1)
	}
	join(t, addr, 5, "away").bye(0)
	join(t, addr, 5, "here").bye(0)
	other = join(t, addr, 5, "other", resume)
	var all []string
	for range 10 {
		all = append(all, string(other.next().Payload))
	}
	other.silent()
	if slices.Sort(all); strings.Join(all, "") != "0123456789" {
		t.Errorf("got %q", all)
	}
}
