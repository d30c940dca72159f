package broker_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// roles lets a client in as what its user name says.
func roles(o *broker.Options) {
	o.Authenticate = func(ci broker.ConnectInfo) (access.Identity, error) {
		switch ci.Username {
		case "cloud":
			return access.Identity{Role: access.Cloud}, nil
		case "node":
			return access.Identity{Role: access.Node, Name: pump}, nil
		case "operator":
			return access.Identity{Role: access.Operator}, nil
		case "mapper":
			return access.Identity{Role: access.Mapper, Name: "modbus"}, nil
		case "local":
			return access.Identity{Role: access.Local}, nil
		}
		return access.Identity{}, errors.New("who are you? give a user name")
	}
}

func TestConnectRefused(t *testing.T) {
	_, addr := open(t, t.TempDir(), roles)
	r, ack := connect(t, addr, 5, "x", user("stranger"))
	if ack.ReasonCode != 0x86 || ack.Properties.ReasonString != "who are you? give a user name" {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	r.closed()
	r, ack = connect(t, addr, 4, "x", user("stranger"))
	if ack.ReasonCode != 5 { // MQTT 3.1.1: not authorized
		t.Errorf("v3.1.1: got 0x%02x", ack.ReasonCode)
	}
	r.closed()
	r, ack = connect(t, addr, 5, "x", user("local"), will(reading, "{}", true))
	if ack.ReasonCode != 0x86 || !hasAll(ack.Properties.ReasonString, "will", "mapper") {
		t.Errorf("will: got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	r.closed()
	r, ack = connect(t, addr, 5, "x", user("mapper"), will(reading, "{}", false))
	if ack.ReasonCode != 0x86 || !hasAll(ack.Properties.ReasonString, "will", "retain") {
		t.Errorf("will without retain: got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	r.closed()
	_, ack = connect(t, addr, 5, "x", user("mapper"), will(reading, "{}", true))
	if ack.ReasonCode != 0 {
		t.Errorf("got 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
}

// One line per role and topic; what each may do, and the reason it is given.
func TestAccess(t *testing.T) {
	const other = "plant-8"
	state := func(node string) string { return string(topic.ReportedNode(node)) }
	wish := string(topic.DesiredTwin(pump, "default", "pump", "p"))
	for _, broken := range []struct {
		node  string // of the broker
		cases []accessCase
	}{
		{pump, []accessCase{
			{"local", "home/lamp", true, 0, ""},
			{"local", "home/lamp", false, 0, ""},
			{"local", set, false, 0, ""},
			{"local", set, true, 0x87, "without the retain flag"},
			{"local", reading, true, 0x87, "publish a wish to " + set},
			{"local", wish, true, 0x87, "the cloud"},
			{"local", state(pump), true, 0x87, "agent"},
			{"local", "fl/" + other + "/set/default/pump/p", false, 0x87, pump},
			{"local", "fl/nonsense", true, 0x90, "not a Fairlead topic"},
			{"local", "fl", true, 0x90, "not a Fairlead topic"},
			{"local", "fl/" + pump + "/set/default/pump/p/more", false, 0x90, "not a Fairlead topic"},
			{"local", "fl/" + pump + "/event/alarm/x", false, 0, ""},
			{"local", "$SYS/broker/version", true, 0x90, "$SYS"},
			{"mapper", reading, true, 0, ""},
			{"mapper", reading, false, 0x87, "with the retain flag"},
			{"mapper", string(topic.ReportedDevice(pump, "default", "pump")), true, 0, ""},
			{"mapper", set, false, 0, ""},
			{"mapper", string(topic.ReportedTarget(pump, "default", "pump", "p")), true, 0x87, "agent"},
		}},
		{"", []accessCase{
			{"cloud", wish, true, 0, ""},
			{"cloud", reading, true, 0x87, "mapper"},
			{"node", state(pump), true, 0, ""},
			{"node", reading, true, 0, ""},
			{"node", state(other), true, 0x87, "below fl/" + pump},
			{"node", wish, true, 0x87, "cloud"},
			{"node", "home/lamp", true, 0x87, ""},
			{"operator", "home/lamp", true, 0, ""},
			{"operator", wish, true, 0x87, "cloud"},
		}},
	} {
		b, addr := open(t, t.TempDir(), roles, func(o *broker.Options) { o.Node = broken.node })
		for i, c := range broken.cases {
			r, ack := connect(t, addr, 5, fmt.Sprint("c", i), user(c.user))
			if ack.ReasonCode != 0 {
				t.Fatal(ack)
			}
			got := r.publish(c.topic, "{}", c.retain)
			if got.ReasonCode != c.code || !hasAll(got.Properties.ReasonString, c.reason) {
				t.Errorf("%s to %s (retain %v): 0x%02x %q, want 0x%02x and %q", c.user, c.topic, c.retain, got.ReasonCode, got.Properties.ReasonString, c.code, c.reason)
			}
			_, kept := b.Retained(topic.Topic(c.topic))
			if want := c.code == 0 && c.retain; kept != want {
				t.Errorf("%s to %s: retained %v, want %v", c.user, c.topic, kept, want)
			}
			r.bye(0)
			_ = b.Publish(t.Context(), broker.Message{Topic: topic.Topic(c.topic), Retain: true})
		}
	}
}

type accessCase struct {
	user, topic string
	retain      bool
	code        byte
	reason      string
}

// The same for QoS 2, whose negative answer is PUBREC, and QoS 0, which has none.
func TestRefusedQoS(t *testing.T) {
	b, addr := open(t, t.TempDir(), roles)
	r, _ := connect(t, addr, 5, "x", user("local"))
	r.send(publish(reading, "{}", 2, true, 3))
	if got := r.expect(packets.Pubrec); got.ReasonCode != 0x87 || got.Properties.ReasonString == "" {
		t.Errorf("got 0x%02x %q", got.ReasonCode, got.Properties.ReasonString)
	}
	r.send(publish(reading, "{}", 0, true, 0))
	r.nothing()
	if _, ok := b.Retained(topic.Topic(reading)); ok {
		t.Error("a refused message is retained")
	}
}

// MQTT 3.1.1 has no negative acknowledgement: a refused publish is acknowledged
// and dropped [MQTT 3.1.1, 3.3.5-2].
func TestRefusedV311(t *testing.T) {
	b, addr := open(t, t.TempDir(), roles)
	r, _ := connect(t, addr, 4, "x", user("local"))
	r.send(publish(reading, "{}", 1, true, 3))
	r.expect(packets.Puback)
	r.send(publish(reading, "{}", 2, true, 4))
	r.expect(packets.Pubrec)
	r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel}, PacketID: 4})
	r.expect(packets.Pubcomp)
	if _, ok := b.Retained(topic.Topic(reading)); ok {
		t.Error("a refused message is retained")
	}
	if got := r.publish("home/lamp", "on", true); got.PacketID != 7 {
		t.Errorf("got %+v", got)
	}
	if _, ok := b.Retained("home/lamp"); !ok {
		t.Error("an allowed message is not retained")
	}
}

func TestSubscribeRefused(t *testing.T) {
	_, addr := open(t, t.TempDir(), roles, func(o *broker.Options) { o.Node = "" })
	for i, c := range []struct {
		filter string
		code   byte
	}{
		{"fl/plant-7/#", 1},
		{"fl/plant-7/desired/digest", 1},
		{"$share/g/fl/plant-7/#", 1},
		{"fl/plant-8/#", 0x87},
		{"$share/g/fl/plant-8/#", 0x87},
		{"$SHARE/g/fl/plant-8/#", 0x87},
		{"fl/+/desired/#", 0x87},
		{"#", 0x87},
		{"$SYS/#", 0x87},
		{"fl/plant-7/#/x", 0x8f},
	} {
		r, _ := connect(t, addr, 5, fmt.Sprint("c", i), user("node"))
		got := r.subscribe(packets.Subscription{Filter: c.filter, Qos: 1})
		if got.ReasonCodes[0] != c.code {
			t.Errorf("%s: 0x%02x, want 0x%02x", c.filter, got.ReasonCodes[0], c.code)
		}
		if c.code == 0x87 && !hasAll(got.Properties.ReasonString, "fl/plant-7/#") {
			t.Errorf("%s: reason %q", c.filter, got.Properties.ReasonString)
		}
		r.bye(0)
	}
	r, _ := connect(t, addr, 4, "v3", user("node"))
	if got := r.subscribe(packets.Subscription{Filter: "#"}, packets.Subscription{Filter: "fl/plant-7/#", Qos: 2}); got.ReasonCodes[0] != 0x80 || got.ReasonCodes[1] != 2 {
		t.Errorf("v3.1.1: got %x", got.ReasonCodes)
	}
}

// A client id belongs to its identity. Within it, the newer connection takes over.
func TestTakeover(t *testing.T) {
	b, addr := open(t, t.TempDir(), roles)
	for _, v := range []byte{5, 4} {
		first, _ := connect(t, addr, v, "same", user("local"), will("gone", fmt.Sprint(v), true))
		foreign, _ := connect(t, addr, v, "same", user("mapper"))
		first.nothing()
		first.subscribe(packets.Subscription{Filter: "a", Qos: 1})
		second, ack := connect(t, addr, v, "same", user("local"), func(pk *packets.Packet) { pk.Connect.Clean = false })
		if ack.ReasonCode != 0 || ack.SessionPresent {
			t.Fatalf("got %+v", ack)
		}
		bye := first.closed()
		if v == 5 && (bye == nil || bye.ReasonCode != 0x8e) {
			t.Errorf("the first connection heard %+v", bye)
		}
		if v == 4 && bye != nil {
			t.Error("MQTT 3.1.1 has no DISCONNECT from the server")
		}
		// The Will is out before anything that the second connection does.
		if err := b.Do(t.Context(), func() []broker.Message { return nil }); err != nil {
			t.Fatal(err)
		}
		if p, _ := b.Retained("gone"); string(p) != fmt.Sprint(v) {
			t.Errorf("will: got %q", p)
		}
		foreign.nothing()
		second.nothing()
		second.publish("a", "not for the new session", false)
		second.nothing()
		second.bye(0)
		foreign.bye(0)
		second.closed()
	}
}

// Many connections fight for one client id: all but one lose, and that one works.
func TestTakeoverRace(t *testing.T) {
	b, addr := open(t, t.TempDir(), roles)
	const n = 20
	up := make(chan *raw, n)
	for range n {
		go func() {
			r := dialRaw(t, addr, 5)
			r.write(encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{
				ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "same", UsernameFlag: true, Username: []byte("local")}}))
			up <- r
		}()
	}
	var rs []*raw
	for range n {
		rs = append(rs, <-up)
	}
	won := make(chan *raw, n)
	for _, r := range rs {
		go func() {
			_ = r.SetWriteDeadline(time0)
			if pk, err := r.read(); err != nil || pk.FixedHeader.Type != packets.Connack {
				won <- nil
				return
			}
			_, err := r.Write(append(
				encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: 1, Filters: packets.Subscriptions{{Filter: "x", Qos: 1}}}),
				encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})...))
			for err == nil {
				var pk packets.Packet
				if pk, err = r.read(); err == nil && pk.FixedHeader.Type == packets.Publish {
					won <- r
					return
				}
			}
			won <- nil
		}()
	}
	for range n - 1 {
		if r := <-won; r != nil {
			t.Fatal("a connection that lost its id got a message")
		}
	}
	if err := b.Publish(t.Context(), broker.Message{Topic: "x", Payload: []byte("y"), QoS: 1}); err != nil {
		t.Fatal(err)
	}
	for {
		select {
		case r := <-won:
			if r == nil {
				t.Fatal("nobody won")
			}
			return
		default:
			// The winner may not have subscribed yet.
			if err := b.Publish(t.Context(), broker.Message{Topic: "x", Payload: []byte("y"), QoS: 1}); err != nil {
				t.Fatal(err)
			}
		}
	}
}
