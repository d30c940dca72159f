package broker_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

// Malformed packets and protocol errors around PUBLISH [MQTT-4.13.1-1].
func TestConformBadPublish(t *testing.T) {
	b, addr := open(t, t.TempDir())
	for _, c := range []struct {
		name  string
		in    []byte // for MQTT 5
		in3   []byte // for MQTT 3.1.1, nil for none
		codes []byte
	}{
		{"[MQTT-2.2.1-3] packet id 0", []byte{0x32, 6, 0, 1, 'a', 0, 0, 0}, []byte{0x32, 5, 0, 1, 'a', 0, 0}, []byte{0x81, 0x82}},
		{"[MQTT-3.3.1-4] QoS 3", []byte{0x36, 6, 0, 1, 'a', 0, 1, 0}, []byte{0x36, 5, 0, 1, 'a', 0, 1}, []byte{0x81}},
		{"[MQTT-3.3.1-2] DUP with QoS 0", []byte{0x38, 4, 0, 1, 'a', 0}, []byte{0x38, 3, 0, 1, 'a'}, []byte{0x81, 0x82}},
		{"[MQTT-3.3.2-2] wildcard", []byte{0x30, 4, 0, 1, '#', 0}, []byte{0x30, 3, 0, 1, '+'}, []byte{0x81, 0x82, 0x90}},
		{"[MQTT-3.3.2-8] no topic, no alias", []byte{0x30, 3, 0, 0, 0}, []byte{0x30, 2, 0, 0}, []byte{0x82, 0x90}},
		{"[MQTT-1.5.4-1] topic not UTF-8", []byte{0x30, 4, 0, 1, 0xff, 0}, []byte{0x30, 3, 0, 1, 0xff}, []byte{0x81}},
		{"[MQTT-1.5.4-1] topic with a surrogate", []byte{0x30, 6, 0, 3, 0xed, 0xa0, 0x80, 0}, []byte{0x30, 5, 0, 3, 0xed, 0xa0, 0x80}, []byte{0x81}},
		{"[MQTT-1.5.4-2] topic with U+0000", []byte{0x30, 4, 0, 1, 0, 0}, []byte{0x30, 3, 0, 1, 0}, []byte{0x81, 0x82}},
		{"topic longer than the packet", []byte{0x30, 4, 0, 9, 'a', 0}, []byte{0x30, 3, 0, 9, 'a'}, []byte{0x81}},
		{"[MQTT-3.3.4-6] subscription id", []byte{0x30, 6, 0, 1, 'a', 2, 0x0b, 1}, nil, []byte{0x82}},
		{"[MQTT-3.3.2-14] response topic with a wildcard", []byte{0x30, 8, 0, 1, 'a', 4, 0x08, 0, 1, '#'}, nil, []byte{0x81, 0x82}},
		{"response topic not UTF-8", []byte{0x30, 8, 0, 1, 'a', 4, 0x08, 0, 1, 0xff}, nil, []byte{0x81}},
		{"content type not UTF-8", []byte{0x30, 8, 0, 1, 'a', 4, 0x03, 0, 1, 0xff}, nil, []byte{0x81}},
		{"user property not UTF-8", []byte{0x30, 11, 0, 1, 'a', 7, 0x26, 0, 1, 'k', 0, 1, 0xff}, nil, []byte{0x81}},
		{"message expiry twice", []byte{0x30, 14, 0, 1, 'a', 10, 0x02, 0, 0, 0, 9, 0x02, 0, 0, 0, 9}, nil, []byte{0x82}},
		{"topic alias twice", []byte{0x30, 10, 0, 1, 'a', 6, 0x23, 0, 1, 0x23, 0, 1}, nil, []byte{0x82}},
		{"a property of CONNECT", []byte{0x30, 7, 0, 1, 'a', 3, 0x21, 0, 1}, nil, []byte{0x81, 0x82}},
		{"an unknown property", []byte{0x30, 6, 0, 1, 'a', 2, 0x7e, 1}, nil, []byte{0x81, 0x82}},
		{"properties longer than the packet", []byte{0x30, 5, 0, 1, 'a', 0x7f, 0}, nil, []byte{0x81}},
		{"a property cut short", []byte{0x30, 6, 0, 1, 'a', 2, 0x02, 0}, nil, []byte{0x81}},
		{"[MQTT-3.3.2-8] alias 0", []byte{0x30, 7, 0, 1, 'a', 3, 0x23, 0, 0}, nil, []byte{0x94}},
		{"[MQTT-3.3.2-9] alias above the maximum", []byte{0x30, 7, 0, 1, 'a', 3, 0x23, 0xff, 0xff}, nil, []byte{0x94}},
		{"an alias that stands for nothing", []byte{0x30, 6, 0, 0, 3, 0x23, 0, 1}, nil, []byte{0x82}},
		{"PUBACK with flags", []byte{0x42, 2, 0, 1}, []byte{0x42, 2, 0, 1}, []byte{0x81}},
		{"PUBACK cut short", []byte{0x40, 1, 0}, []byte{0x40, 1, 0}, []byte{0x81}},
		{"[MQTT-3.6.1-1] PUBREL without flags", []byte{0x60, 2, 0, 1}, []byte{0x60, 2, 0, 1}, []byte{0x81}},
		{"[MQTT-2.1.3-1] PINGREQ with flags", []byte{0xc1, 0}, []byte{0xc1, 0}, []byte{0x81}},
		{"[MQTT-1.5.5-1] length of five bytes", []byte{0x30, 0x80, 0x80, 0x80, 0x80, 1}, []byte{0x30, 0x80, 0x80, 0x80, 0x80, 1}, []byte{0x81}},
	} {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, v byte) {
				in := c.in
				if v == 4 {
					in = c.in3
				}
				if in == nil {
					return
				}
				p := join(t, addr, v, "c")
				p.sub("#", 0)
				p.write(in)
				pk, err := p.read()
				if v == 4 && err == nil {
					t.Errorf("got %s", packets.PacketNames[pk.FixedHeader.Type])
				}
				if v == 5 && (err != nil || pk.FixedHeader.Type != packets.Disconnect || !slices.Contains(c.codes, pk.ReasonCode)) {
					t.Errorf("got %s 0x%02x, %v, want DISCONNECT % x", packets.PacketNames[pk.FixedHeader.Type], pk.ReasonCode, err, c.codes)
				}
				if err == nil && pk.FixedHeader.Type != packets.Publish {
					p.gone()
				}
			})
		})
	}
	if ms := b.RetainedMatch("#"); len(ms) > 0 {
		t.Errorf("retained: %v", ms)
	}
}

// Aliases of the client's [MQTT-3.3.2-7] to [MQTT-3.3.2-12]: they last as long
// as the connection, and are replaced by a new topic.
func TestConformAliasIn(t *testing.T) {
	_, addr := open(t, t.TempDir())
	sub := join(t, addr, 5, "sub")
	sub.sub("t/#", 2)
	p := dialPeer(t, addr, 5)
	most := p.connect("c", resume).Properties.TopicAliasMaximum
	if most == 0 {
		t.Fatal("the server takes no aliases")
	}
	for qos := range byte(3) {
		for _, c := range []struct {
			topic string
			alias uint16
			want  string
		}{
			{"t/1", 1, "t/1"}, {"", 1, "t/1"}, {"t/2", most, "t/2"}, {"", 1, "t/1"}, {"", most, "t/2"},
			{"t/3", 1, "t/3"}, {"", 1, "t/3"}, {"t/4", 0, "t/4"}, {"t/3", most, "t/3"}, {"", most, "t/3"},
		} {
			var change []func(*packets.Packet)
			if c.alias > 0 {
				change = append(change, alias(c.alias))
			}
			if code := p.pub(c.topic, "x", qos, change...); code != 0 {
				t.Fatalf("QoS %d, %+v: 0x%02x", qos, c, code)
			}
			if m := sub.next(); m.TopicName != c.want || m.Properties.TopicAlias != 0 { // [MQTT-3.1.2-27]
				t.Errorf("%+v: got %q, alias %d", c, m.TopicName, m.Properties.TopicAlias)
			}
		}
	}
	// Retained by its topic, not by the alias.
	p.pub("", "kept", 1, alias(1), retained)
	late := join(t, addr, 5, "late")
	late.sub("#", 1)
	if m := late.nextIs("kept"); m.TopicName != "t/3" {
		t.Errorf("retained as %q", m.TopicName)
	}
	// Gone with the connection, not with the session.
	p.drop()
	p = join(t, addr, 5, "c", resume)
	p.send(encodeAlias("", 1))
	p.refused(0x82)
}

func encodeAlias(topic string, n uint16) packets.Packet {
	pk := publish(topic, "x", 0, false, 0)
	alias(n)(&pk)
	return pk
}

// Aliases to the client [MQTT-3.1.2-26] [MQTT-3.1.2-27]: no more than it takes,
// each said with its topic before it stands alone, and none from before.
func TestConformAliasOut(t *testing.T) {
	_, addr := open(t, t.TempDir())
	pub := join(t, addr, 5, "pub")
	for _, most := range []uint16{0, 1, 3, 65535} {
		t.Run(strconv.Itoa(int(most)), func(t *testing.T) {
			takes := func(pk *packets.Packet) { pk.Properties.TopicAliasMaximum = most }
			sub := join(t, addr, 5, "sub", resume, takes)
			sub.sub("t/#", 1)
			alone := 0
			for range 2 {
				known := map[uint16]string{}
				for i := range 40 {
					want := "t/" + strconv.Itoa(i*i%5)
					pub.pub(want, "x", byte(i%2))
					m := sub.next()
					topic, a := m.TopicName, m.Properties.TopicAlias
					switch {
					case a > most || m.Properties.TopicAliasFlag && a == 0:
						t.Fatalf("alias %d, the maximum is %d", a, most)
					case topic != "" && a > 0:
						known[a] = topic
					case topic == "":
						topic = known[a]
						alone++
					}
					if topic != want {
						t.Fatalf("got %q (%q, alias %d), want %q", topic, m.TopicName, a, want)
					}
				}
				sub.drop() // the second time it must say the topics again
				sub = join(t, addr, 5, "sub", resume, takes)
			}
			if (alone > 0) != (most > 0) {
				t.Errorf("maximum %d: %d topics were left out", most, alone)
			}
			sub.bye(0)
			join(t, addr, 5, "sub").bye(0)
		})
	}
}

// rich is a message with every property that travels.
func rich(qos byte, retain bool) packets.Packet {
	pk := publish("a", "\x00\xffpayload", qos, retain, 0)
	pk.Properties = packets.Properties{
		ContentType: "text/ü", ResponseTopic: "re/a", CorrelationData: []byte{0, 255, 1},
		PayloadFormatFlag: true, // 0: bytes
		User:              []packets.UserProperty{{Key: "b", Val: "1"}, {Key: "a", Val: ""}, {Key: "b", Val: "2"}, {Key: "", Val: "ü"}},
	}
	return pk
}

// [MQTT-3.3.2-4] [MQTT-3.3.2-15] to [MQTT-3.3.2-20]: payload and properties
// arrive unchanged and in order, live, retained, queued, and after a restart;
// MQTT 3.1.1 gets the payload.
func TestConformProperties(t *testing.T) {
	dir := t.TempDir()
	b, addr := open(t, dir)
	check := func(what string, p *peer, v byte, qos byte) {
		t.Helper()
		m, want := p.next(), rich(0, false)
		if v == 4 {
			want.Properties = packets.Properties{}
		}
		if string(m.Payload) != string(want.Payload) || m.FixedHeader.Qos != qos {
			t.Errorf("%s: payload %q, QoS %d", what, m.Payload, m.FixedHeader.Qos)
		}
		if diff := cmp.Diff(want.Properties, m.Properties); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	pub := join(t, addr, 5, "pub")
	for _, v := range []byte{4, 5} {
		away := join(t, addr, v, fmt.Sprint("away", v), resume)
		away.sub("a", 2)
		away.bye(0)
	}
	for qos := range byte(3) {
		for _, v := range []byte{4, 5} {
			live := join(t, addr, v, "live")
			live.subs(packets.Subscription{Filter: "a", Qos: 2, RetainHandling: 2})
			if v == 4 && qos > 0 {
				live.next() // what is retained from before
			}
			pk := rich(qos, true)
			pk.PacketID = pub.id()
			pub.send(pk)
			pub.answered(pk)
			check("live", live, v, qos)
			late := join(t, addr, v, "late")
			late.sub("a", 2)
			check("retained", late, v, qos)
			live.bye(0)
			late.bye(0)
		}
	}
	pub.pub("a", "", 1, retained)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, addr = open(t, dir)
	for _, v := range []byte{4, 5} {
		away := join(t, addr, v, fmt.Sprint("away", v), resume)
		for _, qos := range []byte{1, 1, 2, 2} { // QoS 0 is not kept
			check("queued", away, v, qos)
		}
		away.nextIs("")
	}
}

// [MQTT-3.3.2-5] [MQTT-3.3.2-6]: what waits expires, and what is sent carries
// the time that is left; so does what is retained.
func TestConformMessageExpiry(t *testing.T) {
	bubble(t, func(t *testing.T, b *broker.Broker) {
		here := func(v byte, id string, change ...func(*packets.Packet)) *peer {
			p := newPeer(t, pipe(t, b), v)
			p.welcome(id, change...)
			return p
		}
		for _, v := range []byte{4, 5} {
			p := here(v, fmt.Sprint("away", v), resume)
			p.sub("#", 1)
			p.bye(0)
		}
		pub := here(5, "pub")
		expires := func(seconds uint32) func(*packets.Packet) {
			return func(pk *packets.Packet) { pk.Properties.MessageExpiryInterval = seconds }
		}
		pub.pub("queue", "short", 1, expires(10))
		pub.pub("queue", "long", 1, expires(100))
		pub.pub("queue", "for ever", 1)
		pub.pub("kept/short", "short", 1, expires(10), retained)
		pub.pub("kept/long", "long", 1, expires(100), retained)
		time.Sleep(30 * time.Second)
		for _, v := range []byte{4, 5} {
			p := here(v, fmt.Sprint("away", v), resume)
			for _, want := range []struct {
				payload string
				left    uint32
			}{{"long", 70}, {"for ever", 0}, {"long", 70}} {
				if m := p.nextIs(want.payload); v == 5 && m.Properties.MessageExpiryInterval != want.left {
					t.Errorf("%s: %d s left, want %d", want.payload, m.Properties.MessageExpiryInterval, want.left)
				}
			}
			p.silent()
		}
		late := here(5, "late")
		late.sub("kept/#", 1)
		if m := late.nextIs("long"); m.Properties.MessageExpiryInterval != 70 {
			t.Errorf("%d s left", m.Properties.MessageExpiryInterval)
		}
		late.silent()
		time.Sleep(time.Hour)
		late = here(5, "late")
		late.sub("kept/#", 1)
		late.silent()
	})
}

// [MQTT-4.3.3-7] to [MQTT-4.3.3-13], the client's side of QoS 2: a message
// counts once until PUBREL, and its id is free after PUBCOMP.
func TestConformQoS2In(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		sub, p := join(t, addr, 5, "sub"), join(t, addr, v, "c")
		sub.sub("a", 2)
		for range 3 { // each a new message with the same id
			for i := range 3 {
				pk := publish("a", "x", 2, false, 7)
				pk.FixedHeader.Dup = i > 0
				p.send(pk)
				if rec := p.want(packets.Pubrec); rec.PacketID != 7 || rec.ReasonCode != 0 {
					t.Fatalf("PUBREC %d 0x%02x", rec.PacketID, rec.ReasonCode)
				}
			}
			sub.nextIs("x")
			for i := range 2 {
				p.send(ackOf(packets.Pubrel, 7))
				comp := p.want(packets.Pubcomp)
				if want := byte(i * 0x92); comp.PacketID != 7 || v == 5 && comp.ReasonCode != want {
					t.Errorf("PUBCOMP %d 0x%02x, want 0x%02x", comp.PacketID, comp.ReasonCode, want)
				}
			}
			sub.silent()
		}
		// A refused one leaves its id free.
		if v == 5 {
			for range 2 {
				pk := publish(reading, "x", 2, true, 9)
				p.send(pk)
				if rec := p.want(packets.Pubrec); rec.ReasonCode != 0x87 || rec.Properties.ReasonString == "" {
					t.Errorf("PUBREC 0x%02x %q", rec.ReasonCode, rec.Properties.ReasonString)
				}
			}
			pk := publish("a", "y", 2, false, 9)
			p.send(pk)
			p.answered(pk)
			sub.nextIs("y")
		}
		// Several at once, released in another order.
		for id := range uint16(5) {
			p.send(publish("a", strconv.Itoa(int(id)), 2, false, id+20))
		}
		for id := range uint16(5) {
			if rec := p.want(packets.Pubrec); rec.PacketID != id+20 { // [MQTT-4.6.0-3]
				t.Errorf("PUBREC %d", rec.PacketID)
			}
			sub.nextIs(strconv.Itoa(int(id)))
		}
		for id := uint16(24); id >= 20; id-- {
			p.send(ackOf(packets.Pubrel, id))
			p.want(packets.Pubcomp)
		}
	})
}

// The server's side of QoS 2 [MQTT-4.3.3-1] to [MQTT-4.3.3-6]: PUBREL follows
// PUBREC in its order [MQTT-4.6.0-4], an unknown id is answered 0x92, an error
// code ends the handshake.
func TestConformQoS2Out(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		sub, pub := join(t, addr, v, "sub"), join(t, addr, 5, "pub")
		sub.sub("a", 2)
		var ids []uint16
		for i := range 5 {
			pub.pub("a", strconv.Itoa(i), 2)
			m := sub.message()
			if string(m.Payload) != strconv.Itoa(i) || slices.Contains(ids, m.PacketID) {
				t.Fatalf("got %q, id %d of %v", m.Payload, m.PacketID, ids)
			}
			ids = append(ids, m.PacketID)
		}
		for _, id := range ids {
			sub.send(ackOf(packets.Pubrec, id))
		}
		for _, id := range ids {
			if rel := sub.want(packets.Pubrel); rel.PacketID != id || rel.FixedHeader.Qos != 1 {
				t.Errorf("PUBREL %d, want %d", rel.PacketID, id)
			}
		}
		sub.send(ackOf(packets.Pubrec, ids[0])) // again: nothing is lost by it
		if rel := sub.want(packets.Pubrel); rel.PacketID != ids[0] || rel.ReasonCode != 0 {
			t.Errorf("PUBREL %d 0x%02x", rel.PacketID, rel.ReasonCode)
		}
		for _, id := range ids {
			sub.send(ackOf(packets.Pubcomp, id))
		}
		sub.send(ackOf(packets.Pubrec, ids[0]))
		if rel := sub.want(packets.Pubrel); v == 5 && rel.ReasonCode != 0x92 {
			t.Errorf("PUBREL 0x%02x, want 0x92", rel.ReasonCode)
		}
		if v == 5 {
			pub.pub("a", "refused", 2)
			rec := ackOf(packets.Pubrec, sub.message().PacketID)
			rec.ReasonCode = 0x97
			sub.send(rec)
		}
		sub.ping()
		pub.pub("a", "next", 2)
		sub.nextIs("next")
		sub.silent()
	})
}

// [MQTT-4.6.0-1] to [MQTT-4.6.0-6]: every subscriber gets a publisher's messages
// of one topic and QoS in order, and acknowledgements come in the publishes' order.
func TestConformOrder(t *testing.T) {
	_, addr := open(t, t.TempDir())
	sub3, sub5, pub := join(t, addr, 4, "sub3"), join(t, addr, 5, "sub5", receiveMax(7)), join(t, addr, 5, "pub")
	sub3.sub("#", 2)
	sub5.sub("#", 2)
	const n = 300
	var all []byte
	var want []uint16
	for i := range n {
		pk := publish("t/"+strconv.Itoa(i%3), strconv.Itoa(i), byte(i%3), false, 0)
		if pk.FixedHeader.Qos > 0 {
			pk.PacketID = pub.id()
			want = append(want, pk.PacketID)
		}
		all = append(all, pub.encode(pk)...)
	}
	pub.write(all)
	var got1, got2 []uint16
	for range want {
		pk, err := pub.read()
		switch {
		case err != nil || pk.ReasonCode >= 0x80:
			t.Fatalf("%+v, %v", pk, err)
		case pk.FixedHeader.Type == packets.Puback:
			got1 = append(got1, pk.PacketID)
		case pk.FixedHeader.Type == packets.Pubrec:
			got2 = append(got2, pk.PacketID)
		}
	}
	if !slices.IsSorted(got1) || !slices.IsSorted(got2) || len(got1)+len(got2) != len(want) {
		t.Errorf("PUBACK %v, PUBREC %v", got1, got2)
	}
	for name, p := range map[string]*peer{"3.1.1": sub3, "5": sub5} {
		last := map[string]int{}
		for range n {
			m := p.next()
			i, err := strconv.Atoi(string(m.Payload))
			if was, ok := last[m.TopicName]; err != nil || ok && i != was+3 || m.TopicName != "t/"+strconv.Itoa(i%3) {
				t.Fatalf("%s: got %s %q after %d", name, m.TopicName, m.Payload, was)
			}
			last[m.TopicName] = i
		}
	}
}

// A refused publish says why in MQTT 5; the connection goes on.
func TestConformRefusalReason(t *testing.T) {
	_, addr := open(t, t.TempDir())
	p := join(t, addr, 5, "c")
	for qos := byte(1); qos < 3; qos++ {
		pk := publish(reading, "x", qos, true, 4)
		p.send(pk)
		if ack := p.answered(pk); ack.ReasonCode != 0x87 || !strings.Contains(ack.Properties.ReasonString, "mapper") {
			t.Errorf("QoS %d: 0x%02x %q", qos, ack.ReasonCode, ack.Properties.ReasonString)
		}
	}
	p.silent()
}
