package broker_test

import (
	"bytes"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
)

// malformed are packets that have ended a broker, or might.
var malformed = map[string][]byte{
	"SUBSCRIBE ends after a filter":   {0x82, 0x06, 0, 1, 0, 0, 1, 'a'},
	"SUBSCRIBE without filters":       {0x82, 0x03, 0, 1, 0},
	"UNSUBSCRIBE without filters":     {0xa2, 0x03, 0, 1, 0},
	"PUBLISH without topic":           {0x30, 0x00},
	"PUBLISH with a wildcard":         {0x30, 0x05, 0, 2, 'a', '#', 0},
	"PUBLISH QoS 3":                   {0x36, 0x07, 0, 1, 'a', 0, 1, 0, 'x'},
	"PUBLISH QoS 1 id 0":              {0x32, 0x07, 0, 1, 'a', 0, 0, 0, 'x'},
	"PUBLISH with a topic alias":      {0x30, 0x08, 0, 1, 'a', 3, 0x23, 0, 1, 'x'},
	"PUBLISH with bad UTF-8":          {0x30, 0x04, 0, 1, 0xff, 0},
	"PUBLISH with a zero byte":        {0x30, 0x04, 0, 1, 0, 0},
	"PUBLISH, properties too long":    {0x30, 0x05, 0, 1, 'a', 0x7f, 0},
	"PUBLISH, a subscription id":      {0x30, 0x06, 0, 1, 'a', 2, 0x0b, 1},
	"PUBACK too short":                {0x40, 0x01, 0},
	"PUBREC nobody waits for":         {0x50, 0x02, 0, 9},
	"PUBREL nobody waits for":         {0x62, 0x02, 0, 9},
	"PUBCOMP nobody waits for":        {0x70, 0x02, 0, 9},
	"DISCONNECT, properties too long": {0xe0, 0x02, 0, 0x7f},
	"AUTH":                            {0xf0, 0x00},
	"CONNACK from a client":           {0x20, 0x02, 0, 0},
	"SUBACK from a client":            {0x90, 0x03, 0, 1, 0},
	"reserved type 0":                 {0x00, 0x00},
	"PINGREQ with flags":              {0xcf, 0x00},
	"length without end":              {0x30, 0x80, 0x80, 0x80, 0x80, 0x80},
}

func TestMalformed(t *testing.T) {
	b, addr := open(t, t.TempDir())
	ws := listen(t, b, "ws://127.0.0.1:0")
	for name, in := range malformed {
		t.Run(name, func(t *testing.T) {
			for _, at := range []string{addr, ws} {
				for _, v := range []byte{4, 5} {
					r, _ := connect(t, at, v, "x")
					r.write(in)
					r.write(encode(t, v, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}))
					r.closed()
					r = dialRaw(t, at, v) // before CONNECT
					_, _ = r.Write(in)
					_ = r.Close()
				}
			}
			r, _ := connect(t, addr, 5, "x")
			r.nothing()
		})
	}
}

// FuzzClient feeds a listener with what a client might send after its CONNECT
// (or, for an odd first byte, instead of it). The broker must go on serving.
// The broker's own goroutines make the coverage noisy: -fuzzminimizetime 1x.
func FuzzClient(f *testing.F) {
	for _, b := range malformed {
		f.Add(append([]byte{0}, b...))
		f.Add(append([]byte{1}, b...))
	}
	for _, v := range []byte{4, 5} {
		con := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{
			ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "x", WillFlag: true, WillTopic: "w", WillPayload: []byte("x"), WillRetain: true, Keepalive: 9}}
		f.Add(append([]byte{1}, encode(f, v, con)...))
		f.Add(append([]byte{0}, encode(f, v, publish("a/b", "x", 2, true, 3))...))
		f.Add(append([]byte{0}, encode(f, v, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel}, PacketID: 3})...))
		f.Add(append([]byte{0}, encode(f, v, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: 1,
			Filters: packets.Subscriptions{{Filter: "$share/g/a/#", Qos: 2, NoLocal: true}, {Filter: "+/b", Qos: 1, RetainHandling: 1, RetainAsPublished: true}}})...))
		f.Add(append([]byte{0}, encode(f, v, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe}, PacketID: 1, Filters: packets.Subscriptions{{Filter: "a"}}})...))
	}
	b, err := broker.Open(broker.Options{
		Dir: f.TempDir(), Node: pump, MaxPacket: 1 << 16, ConnectDeadline: time.Second,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{Role: access.Local}, nil },
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := b.Close(); err != nil {
			f.Error(err)
		}
	})
	addr, err := b.Listen("127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	con := encode(f, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "x"}})
	var dial sync.Mutex
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 {
			return
		}
		dial.Lock()
		defer dial.Unlock()
		c, err := net.Dial("tcp", strings.TrimPrefix(addr, "mqtt://"))
		if err != nil {
			t.Fatal(err)
		}
		if in[0]&1 == 0 {
			_, _ = c.Write(con)
		}
		_, _ = c.Write(in[1:])
		_ = c.(*net.TCPConn).CloseWrite()
		_ = c.SetReadDeadline(time.Now().Add(patience))
		var sink bytes.Buffer
		if _, err := sink.ReadFrom(c); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Fatalf("the broker does not end the connection: %v", err)
		}
		_ = c.Close()
	})
}
