package broker_test

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

// The conformance suite, conform_*_test.go: what MQTT 3.1.1 and 5 demand of a
// server, by the numbers of the statements in MQTT 5 where both have it.
// Statements that other tests hold are not repeated: retain handling, retain
// flag and no local (retained_test.go), Receive Maximum and packet size
// (limits_test.go), Wills without delay (will_test.go), reason codes of access
// (access_test.go).

// both runs a test for MQTT 3.1.1 and 5.
func both(t *testing.T, run func(t *testing.T, v byte)) {
	for _, v := range []byte{4, 5} {
		t.Run("V"+strconv.Itoa(int(v)), func(t *testing.T) { run(t, v) })
	}
}

// connectBytes is a CONNECT by hand: name, level and flags, then what follows
// the keepalive.
func connectBytes(name string, level, flags byte, rest ...byte) []byte {
	body := append([]byte{0, byte(len(name))}, name...)
	body = append(append(body, level, flags, 0, 60), rest...)
	return append([]byte{0x10, byte(len(body))}, body...)
}

func TestConformBadConnect(t *testing.T) {
	_, addr := open(t, t.TempDir())
	for _, c := range []struct {
		name string
		v    byte
		in   []byte
		code byte // of CONNACK, 0 for any or none
	}{
		{"[MQTT-3.1.0-1] PINGREQ first", 5, []byte{0xc0, 0}, 0},
		{"[MQTT-3.1.0-1] PUBLISH first", 4, []byte{0x30, 4, 0, 1, 'a', 'x'}, 0},
		{"[MQTT-3.1.2-1] name", 5, connectBytes("MQTQ", 5, 2, 0, 0, 1, 'x'), 0},
		{"[MQTT-3.1.2-2] level 6", 5, connectBytes("MQTT", 6, 2, 0, 0, 1, 'x'), 0x84},
		{"[MQTT-3.1.2-2] level 2", 4, connectBytes("MQTT", 2, 2, 0, 1, 'x'), 0x01},
		{"[MQTT-3.1.2-3] reserved flag", 5, connectBytes("MQTT", 5, 3, 0, 0, 1, 'x'), 0},
		{"[MQTT-3.1.2-3] reserved flag, 3.1.1", 4, connectBytes("MQTT", 4, 3, 0, 1, 'x'), 0},
		{"[MQTT-3.1.2-11] Will QoS without Will", 5, connectBytes("MQTT", 5, 0x0a, 0, 0, 1, 'x'), 0},
		{"[MQTT-3.1.2-12] Will QoS 3", 5, connectBytes("MQTT", 5, 0x1e, 0, 0, 1, 'x', 0, 0, 1, 'w', 0, 1, 'p'), 0},
		{"[MQTT-3.1.2-13] Will retain without Will", 5, connectBytes("MQTT", 5, 0x22, 0, 0, 1, 'x'), 0},
		{"[MQTT-3.1.3-11] Will topic with a wildcard", 5, connectBytes("MQTT", 5, 0x06, 0, 0, 1, 'x', 0, 0, 1, '#', 0, 1, 'p'), 0},
		{"[MQTT-3.1.2-17] user name flag without one", 5, connectBytes("MQTT", 5, 0x82, 0, 0, 1, 'x'), 0},
		{"[MQTT-3.1.2-22] password without user name, 3.1.1", 4, connectBytes("MQTT", 4, 0x42, 0, 1, 'x', 0, 1, 'p'), 0},
		{"[MQTT-3.1.3-4] client id not UTF-8", 5, connectBytes("MQTT", 5, 2, 0, 0, 1, 0xff), 0},
		{"[MQTT-3.1.3-8] no client id and a lasting session, 3.1.1", 4, connectBytes("MQTT", 4, 0, 0, 0), 0x02},
		{"Receive Maximum 0", 5, connectBytes("MQTT", 5, 2, 3, 0x21, 0, 0, 0, 1, 'x'), 0},
		{"Receive Maximum twice", 5, connectBytes("MQTT", 5, 2, 6, 0x21, 0, 1, 0x21, 0, 1, 0, 1, 'x'), 0},
		{"Maximum Packet Size 0", 5, connectBytes("MQTT", 5, 2, 5, 0x27, 0, 0, 0, 0, 0, 1, 'x'), 0},
		{"Request Problem Information 2", 5, connectBytes("MQTT", 5, 2, 2, 0x17, 2, 0, 1, 'x'), 0},
		{"a property of PUBLISH", 5, connectBytes("MQTT", 5, 2, 3, 0x23, 0, 1, 0, 1, 'x'), 0},
		{"properties longer than the packet", 5, connectBytes("MQTT", 5, 2, 0x7f, 0, 1, 'x'), 0},
		{"[MQTT-4.12.0-1] unknown authentication method", 5, connectBytes("MQTT", 5, 2, 4, 0x15, 0, 1, 'm', 0, 1, 'x'), 0x8c},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := dialPeer(t, addr, c.v)
			p.write(c.in)
			pk, err := p.read()
			if err == nil {
				if pk.FixedHeader.Type != packets.Connack || pk.ReasonCode == 0 || pk.SessionPresent { // [MQTT-3.2.2-6]
					t.Fatalf("got %s 0x%02x", packets.PacketNames[pk.FixedHeader.Type], pk.ReasonCode)
				}
				if bye := p.gone(); bye != nil { // [MQTT-3.2.2-7] [MQTT-3.14.0-1]
					t.Errorf("DISCONNECT 0x%02x after CONNACK 0x%02x", bye.ReasonCode, pk.ReasonCode)
				}
			}
			if c.code != 0 && pk.ReasonCode != c.code {
				t.Errorf("got CONNACK 0x%02x (%v), want 0x%02x", pk.ReasonCode, err, c.code)
			}
		})
	}
}

// [MQTT-3.1.0-2].
func TestConformSecondConnect(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		p := join(t, addr, v, "c")
		p.send(connectPacket("c"))
		p.refused(0x82)
	})
}

// [MQTT-3.1.3-6] [MQTT-3.1.3-7] [MQTT-3.2.2-16].
func TestConformAssignedClientID(t *testing.T) {
	_, addr := open(t, t.TempDir())
	ids := map[string]bool{}
	for range 10 {
		p := dialPeer(t, addr, 5)
		ids[p.connect("").Properties.AssignedClientID] = true
	}
	if len(ids) != 10 || ids[""] {
		t.Errorf("assigned %v", ids)
	}
	join(t, addr, 4, "").ping() // with clean session it may be empty
	p := dialPeer(t, addr, 5)
	if id := p.connect("mine").Properties.AssignedClientID; id != "" {
		t.Errorf("assigned %q to who had one", id)
	}
	// The session goes by that name from then on.
	p = dialPeer(t, addr, 5)
	id := p.connect("", resume).Properties.AssignedClientID
	p.sub("a", 1)
	p.bye(0)
	join(t, addr, 5, "pub").pub("a", "x", 1)
	p = dialPeer(t, addr, 5)
	if !p.connect(id, resume).SessionPresent {
		t.Error("the session is not there")
	}
	p.nextIs("x")
}

// [MQTT-3.2.2-21] [MQTT-3.2.2-22]: where the server wants another keepalive it says so.
func TestConformServerKeepAlive(t *testing.T) {
	_, addr := open(t, t.TempDir())
	for want, keepalive := range map[uint16]uint16{0: 60, 43690: 65535} {
		p := dialPeer(t, addr, 5)
		ack := p.connect("c", func(pk *packets.Packet) { pk.Connect.Keepalive = keepalive })
		if got := ack.Properties; got.ServerKeepAlive != want || got.ServerKeepAliveFlag != (want > 0) {
			t.Errorf("keepalive %d: the server says %d, %v", keepalive, got.ServerKeepAlive, got.ServerKeepAliveFlag)
		}
	}
}

// [MQTT-3.1.2-22]: one and a half of the keepalive, from the last packet.
func TestConformKeepAliveExpires(t *testing.T) {
	for _, v := range []byte{4, 5} {
		bubble(t, func(t *testing.T, b *broker.Broker) {
			p := newPeer(t, pipe(t, b), v)
			p.welcome("c", func(pk *packets.Packet) { pk.Connect.Keepalive = 10 })
			for range 3 {
				time.Sleep(14 * time.Second)
				p.ping()
			}
			idle := newPeer(t, pipe(t, b), v)
			idle.welcome("idle") // 0 is for ever
			time.Sleep(16 * time.Second)
			if bye := p.gone(); v == 4 && bye != nil {
				t.Errorf("got %+v", bye)
			}
			time.Sleep(time.Hour)
			idle.ping()
		})
	}
}

// [MQTT-3.1.2-24] [MQTT-3.1.2-25]: a message over the client's maximum counts as
// delivered; those behind it come.
func TestConformClientMaximumPacketSize(t *testing.T) {
	dir := t.TempDir()
	b, addr := open(t, dir)
	for qos := range byte(3) {
		sub := join(t, addr, 5, "sub", fresh(3600), receiveMax(2), func(pk *packets.Packet) { pk.Properties.MaximumPacketSize = 100 })
		sub.sub("a", qos)
		pub := join(t, addr, 5, "pub")
		for range 5 {
			pub.pub("a", strings.Repeat("x", 100), qos)
		}
		pub.pub("a", "small", qos)
		sub.nextIs("small")
		sub.silent()
		sub.bye(0)
		sub = join(t, addr, 5, "sub", resume)
		sub.silent()
		// [MQTT-3.4.2-2]: a reason string that does not fit is left out.
		p := join(t, addr, 5, "p", func(pk *packets.Packet) { pk.Properties.MaximumPacketSize = 20 })
		pk := publish(reading, "x", 1, true, 5)
		p.send(pk)
		if ack := p.answered(pk); ack.ReasonCode != 0x87 || ack.Properties.ReasonString != "" {
			t.Errorf("PUBACK 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, addr = open(t, dir)
	join(t, addr, 5, "sub", resume).silent() // they are not in the store either
}

// [MQTT-3.1.2-29].
func TestConformRequestProblemInformation(t *testing.T) {
	_, addr := open(t, t.TempDir())
	for _, info := range []byte{0, 1} {
		p := join(t, addr, 5, "c", func(pk *packets.Packet) {
			pk.Properties.RequestProblemInfo, pk.Properties.RequestProblemInfoFlag = info, true
		})
		pk := publish(reading, "x", 1, true, 5)
		p.send(pk)
		if ack := p.answered(pk); ack.ReasonCode != 0x87 || (ack.Properties.ReasonString != "") != (info == 1) {
			t.Errorf("info %d: PUBACK 0x%02x %q", info, ack.ReasonCode, ack.Properties.ReasonString)
		}
		if ack := p.subs(packets.Subscription{Filter: "a#"}); ack.ReasonCodes[0] != 0x8f || (ack.Properties.ReasonString != "") != (info == 1) {
			t.Errorf("info %d: SUBACK %v %q", info, ack.ReasonCodes, ack.Properties.ReasonString)
		}
		// User properties of a PUBLISH are passed on nevertheless.
		p.sub("u", 0)
		p.pub("u", "x", 0, func(pk *packets.Packet) { pk.Properties.User = []packets.UserProperty{{Key: "k", Val: "v"}} })
		if m := p.next(); len(m.Properties.User) != 1 {
			t.Errorf("info %d: user properties %v", info, m.Properties.User)
		}
	}
}

// [MQTT-3.1.4-3]: the old connection of a client is told and ended; the session
// goes over without a gap. [MQTT-3.2.2-2] [MQTT-3.2.2-3].
func TestConformTakeover(t *testing.T) {
	_, addr := open(t, t.TempDir())
	both(t, func(t *testing.T, v byte) {
		old := join(t, addr, v, "c", resume)
		old.sub("a", 1)
		pub := join(t, addr, 5, "pub")
		const n = 2000
		acked := make(chan []string, 1)
		go func() { acked <- pub.stream("a", n) }()
		last, seen := -1, 0
		for seen < n {
			p := dialPeer(t, addr, v)
			if !p.connect("c", resume).SessionPresent {
				t.Fatal("the session is not there")
			}
			old.refused(0x8e)
			old = p
			for range 100 {
				m := p.next()
				i, _ := strconv.Atoi(string(m.Payload))
				switch {
				case i == last+1:
					last, seen = i, seen+1
				case i > last || !m.FixedHeader.Dup:
					t.Fatalf("got %d after %d, DUP %v", i, last, m.FixedHeader.Dup)
				}
				if seen == n {
					break
				}
			}
		}
		if a := <-acked; len(a) != n {
			t.Errorf("%d of %d acknowledged", len(a), n)
		}
		old.bye(0)
		join(t, addr, v, "c").bye(0) // clean: ends the session
	})
}

// [MQTT-3.1.2-4] [MQTT-3.1.2-5] [MQTT-3.1.2-6] [MQTT-3.2.2-2] [MQTT-3.2.2-3].
func TestConformCleanStart(t *testing.T) {
	_, addr := open(t, t.TempDir())
	pub := join(t, addr, 5, "pub")
	both(t, func(t *testing.T, v byte) {
		start := func(present bool, change ...func(*packets.Packet)) *peer {
			t.Helper()
			p := dialPeer(t, addr, v)
			if ack := p.connect("c", change...); ack.SessionPresent != present {
				t.Fatalf("session present %v, want %v", ack.SessionPresent, present)
			}
			return p
		}
		p := start(false, resume)
		p.sub("a", 1)
		p.bye(0)
		pub.pub("a", "queued", 1)
		p = start(true, resume)
		p.nextIs("queued")
		p.drop()
		pub.pub("a", "again", 1)
		p = start(true, resume)
		p.nextIs("again")
		p.bye(0)
		pub.pub("a", "lost", 1)
		p = start(false) // clean: subscriptions and queue are gone
		pub.pub("a", "lost as well", 1)
		p.silent()
		p.bye(0)
		p = start(false, resume) // a clean session of 3.1.1, or one without expiry, left nothing
		p.silent()
		p.bye(0)
		if v == 5 { // clean start with a session that stays
			p = start(false, fresh(100))
			p.sub("a", 1)
			p.bye(0)
			p = start(true, resume)
			p.bye(0)
		}
		start(false).bye(0)
	})
}

// AUTH without a method in CONNECT, and packets that only a server sends.
func TestConformServerPackets(t *testing.T) {
	_, addr := open(t, t.TempDir())
	for name, in := range map[string][]byte{
		"AUTH": {0xf0, 2, 0x18, 0}, "CONNACK": {0x20, 3, 0, 0, 0}, "SUBACK": {0x90, 4, 0, 1, 0, 0},
		"UNSUBACK": {0xb0, 4, 0, 1, 0, 0}, "PINGRESP": {0xd0, 0}, "type 0": {0x00, 0},
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, v byte) {
				p := join(t, addr, v, "c")
				p.write(in)
				if bye := p.gone(); v == 5 && (bye == nil || bye.ReasonCode != 0x81 && bye.ReasonCode != 0x82) {
					t.Errorf("got %+v", bye)
				}
			})
		})
	}
}

// The topics that dashboards made for mosquitto read. [MQTT-4.7.2-1]: # does not
// select them.
func TestConformSys(t *testing.T) {
	bubble(t, func(t *testing.T, b *broker.Broker) {
		p := newPeer(t, pipe(t, b), 5)
		p.wait = time.Minute
		p.welcome("c")
		p.sub("$SYS/#", 0)
		missing := map[string]bool{}
		for _, name := range []string{
			"version", "uptime", "clients/total", "clients/connected", "clients/disconnected", "clients/maximum", "clients/expired",
			"clients/active", "clients/inactive", "messages/received", "messages/sent", "messages/stored", "store/messages/count", "store/messages/bytes",
			"retained messages/count", "subscriptions/count", "bytes/received", "bytes/sent",
			"publish/messages/received", "publish/messages/sent", "publish/messages/dropped", "publish/bytes/received", "publish/bytes/sent",
			"load/messages/received/1min", "load/messages/sent/5min", "load/publish/received/15min", "load/publish/sent/1min",
			"load/bytes/received/1min", "load/bytes/sent/1min", "load/sockets/1min", "load/connections/1min",
		} {
			missing["$SYS/broker/"+name] = true
		}
		for late := time.Now().Add(3 * time.Minute); len(missing) > 0; {
			m, err := p.read()
			if err != nil || time.Now().After(late) {
				t.Fatalf("%v; missing: %v", err, missing)
			}
			if !strings.HasPrefix(m.TopicName, "$SYS/broker/") || len(m.Payload) == 0 {
				t.Errorf("got %s %q", m.TopicName, m.Payload)
			}
			delete(missing, m.TopicName)
		}
		all := newPeer(t, pipe(t, b), 5)
		all.welcome("all")
		all.sub("#", 0)
		all.sub("+/broker/uptime", 0)
		time.Sleep(time.Minute) // they are published meanwhile
		all.silent()
		// They are the broker's own.
		if code := all.pub("$SYS/broker/version", "x", 1); code != 0x87 && code != 0x90 {
			t.Errorf("PUBACK 0x%02x", code)
		}
	})
}
