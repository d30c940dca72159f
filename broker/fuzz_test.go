package broker_test

import (
	"bufio"
	"bytes"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

// FuzzPackets sends bytes after a valid CONNECT: the first byte chooses the
// version, whether the session stays, and how the bytes are cut into writes.
// Whatever they are, the connection ends after they do, nothing is left running,
// and another client is served meanwhile.
func FuzzPackets(f *testing.F) {
	add := func(v byte, flags byte, pks ...packets.Packet) {
		in := []byte{flags &^ 1}
		if v == 5 {
			in[0] |= 1
		}
		p := &peer{t: f, v: v}
		for _, pk := range pks {
			in = append(in, p.encode(pk)...)
		}
		f.Add(in)
	}
	for _, b := range malformed {
		f.Add(append([]byte{1}, b...))
		f.Add(append([]byte{2}, b...))
	}
	sub := func(filter string, qos byte) packets.Packet {
		return packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: 1, Filters: packets.Subscriptions{{Filter: filter, Qos: qos}}}
	}
	unsub := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe}, PacketID: 2, Filters: packets.Subscriptions{{Filter: "a/#"}, {Filter: "b"}}}
	end := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}
	ping := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}}
	for _, v := range []byte{4, 5} {
		for flags := byte(0); flags < 16; flags += 2 {
			// Own messages in every QoS with the handshakes of both sides.
			add(v, flags, sub("a/#", 2), publish("a/b", "x", 0, false, 0), publish("a/b", "x", 1, true, 3), publish("a/b", "x", 2, false, 4),
				ackOf(packets.Puback, 1), ackOf(packets.Pubrec, 2), ackOf(packets.Pubcomp, 2), ackOf(packets.Pubrel, 4), unsub, ping, end)
			add(v, flags, publish("a", "x", 2, false, 4), publish("a", "x", 2, false, 4), ackOf(packets.Pubrel, 4), ackOf(packets.Pubrel, 4), ackOf(packets.Pubrec, 9), ackOf(packets.Pubcomp, 9))
			add(v, flags, sub("$share/g/#", 1), sub("+/+", 0), sub("a#", 1), publish("", "", 1, true, 5), end)
		}
	}
	aliased := publish("a/b", "x", 1, false, 3)
	alias(1)(&aliased)
	again := publish("", "y", 1, false, 4)
	alias(1)(&again)
	full := rich(2, true)
	full.PacketID, full.Properties.MessageExpiryInterval = 6, 5
	add(5, 2, aliased, again, full, encodeAlias("", 9))
	sub5 := sub("a/+", 2)
	sub5.Filters[0].NoLocal, sub5.Filters[0].RetainAsPublished, sub5.Filters[0].RetainHandling = true, true, 1
	sub5.Properties.SubscriptionIdentifier = []int{268435455}
	later := end
	byeWith(5)(&later)
	add(5, 4, sub5, aliased, later)
	add(5, 4, connectPacket("again"), end)

	b, err := broker.Open(broker.Options{
		Dir: f.TempDir(), Node: pump, MaxPacket: 1 << 16, ConnectDeadline: time.Second,
		Authenticate: everybody, Logger: slog.New(slog.DiscardHandler),
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
	// Mutated SUBSCRIBEs and PUBLISHes do not reach this one's topic but by chance.
	other := dialPeer(f, addr, 5)
	other.welcome("other")
	other.sub("$other", 1)
	other.ping()
	idle := goroutines()
	var one sync.Mutex
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 {
			return
		}
		one.Lock()
		defer one.Unlock()
		v := 4 + in[0]&1
		change := fresh(0)
		if in[0]&2 != 0 {
			change = lasting(1)
		}
		nc, err := net.Dial("tcp", strings.TrimPrefix(addr, "mqtt://"))
		if err != nil {
			t.Fatal(err)
		}
		p := &peer{t: t, c: nc, r: bufio.NewReader(nc), v: v, wait: patience}
		if p.welcome("fuzzed", change); in[0]&4 != 0 {
			p.sub("#", 2)
		}
		rest := in[1:]
		if in[0]&8 != 0 { // in pieces
			for len(rest) > 3 {
				_, _ = nc.Write(rest[:3])
				rest = rest[3:]
			}
		}
		_, _ = nc.Write(rest)

		// Under way: the other's messages arrive.
		other.t = t
		if code := other.pub("$other", "still here", 1); code != 0 {
			t.Fatalf("PUBACK 0x%02x", code)
		}
		for m := other.next(); string(m.Payload) != "still here"; m = other.next() {
			if m.TopicName != "$other" {
				t.Fatalf("the other client got %s", m.TopicName)
			}
		}

		_ = nc.(*net.TCPConn).CloseWrite()
		_ = nc.SetReadDeadline(time.Now().Add(patience))
		var sink bytes.Buffer
		if _, err := io.Copy(&sink, p.r); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Fatalf("the broker does not end the connection: %v", err)
		}
		_ = nc.Close()
		eventually(t, "the goroutines of the connection end", func() bool { return goroutines() <= idle })
	})
}

// goroutines counts those that the broker started.
func goroutines() int {
	stacks := make([]byte, 1<<20)
	return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("created by github.com/fairlead-io/fairlead/broker."))
}
