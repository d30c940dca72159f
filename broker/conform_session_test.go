package broker_test

import (
	"slices"
	"strconv"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"
)

// outages are the ways in which a client and the broker can lose each other.
var outages = []struct {
	name  string
	setup setup
	cut   func(x *trial)
}{
	{"reconnect", setup{}, func(*trial) {}},
	{"restart", setup{}, func(x *trial) { x.stop(); x.served = x.s.start(x.t) }},
	{"kill -9", setup{Child: true}, func(x *trial) { x.restart() }},
}

// eachOutage runs a test for both versions and every outage. Clients are to be
// dropped before cut.
func eachOutage(t *testing.T, run func(t *testing.T, v byte, x *trial, cut func())) {
	for _, o := range outages {
		t.Run(o.name, func(t *testing.T) {
			both(t, func(t *testing.T, v byte) {
				s := o.setup
				s.Dir = t.TempDir()
				x := &trial{t: t, s: s, served: s.start(t)}
				run(t, v, x, func() { o.cut(x) })
			})
		})
	}
}

// present joins and wants the session of before.
func present(t *testing.T, x *trial, v byte, id string, change ...func(*packets.Packet)) *peer {
	t.Helper()
	p := dialPeer(t, x.addr, v)
	if ack := p.connect(id, append([]func(*packets.Packet){resume}, change...)...); ack.ReasonCode != 0 || !ack.SessionPresent {
		t.Fatalf("CONNACK 0x%02x, session present %v", ack.ReasonCode, ack.SessionPresent)
	}
	return p
}

// [MQTT-3.1.2-5] [MQTT-4.1.0-1] [MQTT-4.5.0-1] [MQTT-4.6.0-6]: subscriptions with
// all their options, and what was published meanwhile, in order.
func TestConformSessionKept(t *testing.T) {
	eachOutage(t, func(t *testing.T, v byte, x *trial, cut func()) {
		p := join(t, x.addr, v, "c", resume)
		p.subs(packets.Subscription{Filter: "q/1", Qos: 1, Identifier: 11})
		p.subs(packets.Subscription{Filter: "q/+", Qos: 2, Identifier: 12, NoLocal: true, RetainAsPublished: true})
		p.subs(packets.Subscription{Filter: "q/0", Qos: 0, Identifier: 13})
		p.subs(packets.Subscription{Filter: "gone", Qos: 2})
		p.unsub("gone")
		p.bye(0)
		pub := join(t, x.addr, 5, "pub")
		const n = 30
		for i := range n {
			pub.pub("q/"+strconv.Itoa(i%3), strconv.Itoa(i), byte(1+i%2), func(pk *packets.Packet) { pk.FixedHeader.Retain = i%5 == 0 })
		}
		pub.pub("gone", "x", 1)
		pub.drop()
		cut()
		p = present(t, x, v, "c")
		check := func(live bool) {
			t.Helper()
			for i := range n {
				m := p.nextIs(strconv.Itoa(i))
				topic := i % 3
				if m.TopicName != "q/"+strconv.Itoa(topic) || m.FixedHeader.Qos != byte(1+i%2) || m.FixedHeader.Dup {
					t.Errorf("%d: topic %s, QoS %d, DUP %v", i, m.TopicName, m.FixedHeader.Qos, m.FixedHeader.Dup)
				}
				if v < 5 {
					continue
				}
				want := [][]int{{12, 13}, {11, 12}, {12}}[topic]
				if ids := m.Properties.SubscriptionIdentifier; !slices.Equal(ids, want) {
					t.Errorf("%d (live %v): subscription ids %v, want %v", i, live, ids, want)
				}
				if m.FixedHeader.Retain != (i%5 == 0) {
					t.Errorf("%d (live %v): retain %v", i, live, m.FixedHeader.Retain)
				}
			}
			p.silent()
		}
		check(false)
		pub = join(t, x.addr, 5, "pub")
		for i := range n {
			pub.pub("q/"+strconv.Itoa(i%3), strconv.Itoa(i), byte(1+i%2), func(pk *packets.Packet) { pk.FixedHeader.Retain = i%5 == 0 })
		}
		check(true)
		if v == 5 {
			p.pub("q/2", "own", 1)
			p.silent()
		}
		// What was acknowledged is not sent again.
		p.drop()
		cut()
		present(t, x, v, "c").silent()
	})
}

// [MQTT-4.4.0-1] [MQTT-4.4.0-2] [MQTT-3.3.1-1] [MQTT-2.2.1-4]: what was not
// acknowledged is sent again with DUP, with its packet id, in the original order,
// before what is new. [MQTT-4.3.3-4]: for what the client has, PUBREL is.
func TestConformRedelivery(t *testing.T) {
	eachOutage(t, func(t *testing.T, v byte, x *trial, cut func()) {
		p := join(t, x.addr, v, "c", resume)
		p.sub("a", 2)
		pub := join(t, x.addr, 5, "pub")
		const n = 12
		ids := map[int]uint16{}
		for i := range n {
			pub.pub("a", strconv.Itoa(i), byte(1+i%2))
			m := p.message()
			if m.FixedHeader.Dup || string(m.Payload) != strconv.Itoa(i) {
				t.Fatalf("got %q, DUP %v", m.Payload, m.FixedHeader.Dup)
			}
			ids[i] = m.PacketID
		}
		// 3 has PUBREC, 5 is complete, 4 and 8 are acknowledged; 6 and the others are not.
		p.send(ackOf(packets.Pubrec, ids[3]))
		p.send(ackOf(packets.Pubrec, ids[5]))
		p.want(packets.Pubrel)
		p.want(packets.Pubrel)
		p.send(ackOf(packets.Pubcomp, ids[5]))
		p.send(ackOf(packets.Puback, ids[4]))
		p.send(ackOf(packets.Puback, ids[8]))
		p.ping()
		// An acknowledgement need not be durable: after a kill the client may get
		// the message again. So let the broker note them before.
		p.bye(0)
		pub.pub("a", "new", 1)
		pub.drop()
		cut()

		p = present(t, x, v, "c")
		var got []int
		for len(got) < n-4 {
			m := p.message()
			i, err := strconv.Atoi(string(m.Payload))
			if err != nil {
				t.Fatalf("got %q after %v", m.Payload, got)
			}
			if !m.FixedHeader.Dup || m.PacketID != ids[i] || m.FixedHeader.Qos != byte(1+i%2) {
				t.Errorf("%d: DUP %v, packet id %d, QoS %d, want %d and %d", i, m.FixedHeader.Dup, m.PacketID, m.FixedHeader.Qos, ids[i], 1+i%2)
			}
			got = append(got, i)
		}
		if want := []int{0, 1, 2, 6, 7, 9, 10, 11}; !slices.Equal(got, want) {
			t.Errorf("got %v again, want %v", got, want)
		}
		m := p.message()
		if string(m.Payload) != "new" || m.FixedHeader.Dup {
			t.Errorf("got %q, DUP %v", m.Payload, m.FixedHeader.Dup)
		}
		for _, id := range ids {
			if m.PacketID == id && id != ids[4] && id != ids[5] && id != ids[8] {
				t.Errorf("packet id %d is in use", id)
			}
		}
		if rel := p.want(packets.Pubrel); rel.PacketID != ids[3] {
			t.Errorf("PUBREL %d, want %d", rel.PacketID, ids[3])
		}
		p.send(ackOf(packets.Pubcomp, ids[3]))
		p.accept(m)
		for _, i := range got {
			m := packets.Packet{FixedHeader: packets.FixedHeader{Qos: byte(1 + i%2)}, PacketID: ids[i]}
			p.accept(m)
		}
		p.silent()
		p.bye(0)
		cut()
		p = present(t, x, v, "c")
		p.silent()
		if len(p.held) > 0 {
			t.Errorf("left over: %+v", p.held)
		}
	})
}

// A connection that breaks again before anything is acknowledged changes
// nothing, and a smaller Receive Maximum is kept while sending again.
func TestConformRedeliveryTwice(t *testing.T) {
	eachOutage(t, func(t *testing.T, v byte, x *trial, cut func()) {
		p := join(t, x.addr, v, "c", resume)
		p.sub("a", 1)
		pub := join(t, x.addr, 5, "pub")
		const n = 10
		for i := range n {
			pub.pub("a", strconv.Itoa(i), 1)
		}
		pub.drop()
		ids := map[string]uint16{}
		for range n {
			m := p.message()
			ids[string(m.Payload)] = m.PacketID
		}
		window := n
		for round := range 3 {
			p.drop()
			cut()
			change := []func(*packets.Packet){}
			if v == 5 {
				window = 3 + round
				change = append(change, receiveMax(uint16(window)))
			}
			p = present(t, x, v, "c", change...)
			for i := range window {
				m := p.message()
				if id := ids[strconv.Itoa(i)]; string(m.Payload) != strconv.Itoa(i) || m.PacketID != id || !m.FixedHeader.Dup {
					t.Fatalf("round %d: got %q, id %d, DUP %v, want %d, id %d", round, m.Payload, m.PacketID, m.FixedHeader.Dup, i, id)
				}
			}
			if p.ping(); len(p.held) > 0 {
				t.Fatalf("round %d: more than %d in flight", round, window)
			}
		}
		for i := range window {
			p.send(ackOf(packets.Puback, ids[strconv.Itoa(i)]))
		}
		for i := window; i < n; i++ {
			p.nextIs(strconv.Itoa(i))
		}
		p.silent()
	})
}

// [MQTT-4.3.3-10] across an outage: whether PUBREC had come or not, the client
// says the same again, and the message is delivered once.
func TestConformQoS2InAcross(t *testing.T) {
	for _, point := range []string{"before PUBREC", "after PUBREC", "after PUBREL"} {
		t.Run(point, func(t *testing.T) {
			eachOutage(t, func(t *testing.T, v byte, x *trial, cut func()) {
				sub := join(t, x.addr, 5, "sub", resume)
				sub.sub("a", 2)
				sub.bye(0)
				p := join(t, x.addr, v, "c", resume)
				p.send(publish("a", "once", 2, false, 7))
				if point != "before PUBREC" {
					p.want(packets.Pubrec)
				}
				if point == "after PUBREL" {
					p.send(ackOf(packets.Pubrel, 7))
					p.want(packets.Pubcomp)
				}
				p.drop()
				cut()
				p = present(t, x, v, "c")
				if point != "after PUBREL" {
					pk := publish("a", "once", 2, false, 7)
					pk.FixedHeader.Dup = true
					p.send(pk)
					if rec := p.want(packets.Pubrec); rec.PacketID != 7 || rec.ReasonCode != 0 {
						t.Errorf("PUBREC %d 0x%02x", rec.PacketID, rec.ReasonCode)
					}
				}
				p.send(ackOf(packets.Pubrel, 7)) // again, after PUBREL: PUBCOMP may have been lost
				comp := p.want(packets.Pubcomp)
				if want := map[bool]byte{true: 0x92}[point == "after PUBREL"]; v == 5 && comp.ReasonCode != want {
					t.Errorf("PUBCOMP 0x%02x, want 0x%02x", comp.ReasonCode, want)
				}
				if code := p.pub("a", "next", 2, func(pk *packets.Packet) { pk.PacketID = 7 }); code != 0 {
					t.Errorf("the id is not free: 0x%02x", code)
				}
				sub = present(t, x, 5, "sub")
				if m := sub.nextIs("once"); m.FixedHeader.Dup {
					t.Error("DUP on a first delivery") // [MQTT-3.3.1-3]
				}
				sub.nextIs("next")
				sub.silent()
			})
		})
	}
}

// QoS 2 from end to end while connections break at every step: each message
// arrives once and in order.
func TestConformQoS2Breaks(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		sub := join(t, addr, v, "sub", resume)
		sub.sub("a", 2)
		pub := join(t, addr, v, "pub", resume)
		var got []string
		owned := map[uint16]bool{} // the subscriber's part of method A: ids between PUBLISH and PUBREL
		step := 0
		// broken tells, in turn, that the connection ended here.
		broken := func(p **peer, id string) bool {
			if step++; step%3 != 0 {
				return false
			}
			(*p).drop()
			*p = join(t, addr, v, id, resume)
			return true
		}
		for i := range 40 {
			pk := publish("a", strconv.Itoa(i), 2, false, uint16(i%5+1))
			for state := 0; state < 4; {
				switch state {
				case 0:
					pub.send(pk)
					pk.FixedHeader.Dup = true
					state = 1
				case 1:
					pub.want(packets.Pubrec)
					state = 2
				case 2:
					pub.send(ackOf(packets.Pubrel, pk.PacketID))
					state = 3
				case 3:
					pub.want(packets.Pubcomp)
					state = 4
				}
				if broken(&pub, "pub") {
					switch state { // as a client must go on [MQTT-4.4.0-1]
					case 1:
						state = 0
					case 3:
						state = 2
					}
				}
			}
			for state := 0; state < 4; {
				var m packets.Packet
				switch state {
				case 0:
					m = sub.message()
					if !owned[m.PacketID] {
						got = append(got, string(m.Payload))
						owned[m.PacketID] = true
					}
					state = 1
				case 1:
					for id := range owned {
						sub.send(ackOf(packets.Pubrec, id))
					}
					state = 2
				case 2:
					delete(owned, sub.want(packets.Pubrel).PacketID)
					state = 3
				case 3:
					// Only the id of the PUBREL that came last can be open.
					sub.send(ackOf(packets.Pubcomp, sub.lastRel))
					sub.ping()
					state = 4
				}
				if broken(&sub, "sub") && state > 0 && state < 4 {
					// What comes again tells where the broker is.
					pk, err := sub.read()
					switch {
					case err != nil:
						t.Fatal(err)
					case pk.FixedHeader.Type == packets.Publish:
						sub.held = append(sub.held, pk)
						state = 0
					case pk.FixedHeader.Type == packets.Pubrel:
						sub.held = append(sub.held, pk)
						state = 2
					default:
						t.Fatalf("got %s", packets.PacketNames[pk.FixedHeader.Type])
					}
				}
			}
		}
		for i, payload := range got {
			if payload != strconv.Itoa(i) {
				t.Fatalf("got %q", got)
			}
		}
		if len(got) != 40 {
			t.Errorf("got %q", got)
		}
		sub.bye(0)
		pub.bye(0)
		join(t, addr, v, "sub").bye(0)
		join(t, addr, v, "pub").bye(0)
	})
}

// Retained messages of a subscription that were not delivered when the client
// went, or acknowledged, come when it is back.
func TestConformReplayAcross(t *testing.T) {
	eachOutage(t, func(t *testing.T, v byte, x *trial, cut func()) {
		pub := join(t, x.addr, 5, "pub")
		const n = 1500
		pub.streamOf(n, func(i int) packets.Packet { return publish("r/"+strconv.Itoa(i), "x", 1, true, 0) })
		pub.drop()
		p := join(t, x.addr, v, "c", resume)
		p.sub("r/#", 1)
		seen := map[string]bool{}
		for range 100 {
			seen[p.next().TopicName] = true
		}
		p.drop()
		cut()
		p = present(t, x, v, "c")
		for len(seen) < n {
			seen[p.next().TopicName] = true
		}
	})
}

// Sessions of clients whose ids resemble each other have nothing in common, and
// one that was ended does not come back.
func TestConformSessionsApart(t *testing.T) {
	eachOutage(t, func(t *testing.T, v byte, x *trial, cut func()) {
		names := []string{"a", "b", "a/b", "b\x01", "ü", "a:b"}
		for _, id := range names {
			p := join(t, x.addr, v, id, resume)
			p.sub("to/"+id, 1)
			p.bye(0)
		}
		pub := join(t, x.addr, 5, "pub")
		for _, id := range names {
			pub.pub("to/"+id, id, 1)
		}
		join(t, x.addr, v, "a").bye(0) // ends one of them
		pub.drop()
		cut()
		for _, id := range names[1:] {
			p := present(t, x, v, id)
			p.nextIs(id)
			p.silent()
		}
		p := dialPeer(t, x.addr, v)
		if p.connect("a", resume).SessionPresent {
			t.Error("a session is back that was ended")
		}
		p.silent()
	})
}
