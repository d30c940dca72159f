package broker_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// An over-long packet is answered as soon as its header is there, over every
// kind of listener, and nothing of it is buffered.
func TestPacketTooLarge(t *testing.T) {
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.MaxPacket = 1000 })
	ws := listen(t, b, "ws://127.0.0.1:0")
	for _, addr := range []string{addr, ws} {
		r, ack := connect(t, addr, 5, "x")
		if ack.Properties.MaximumPacketSize != 1000 {
			t.Errorf("CONNACK says %d", ack.Properties.MaximumPacketSize)
		}
		if got := r.publish("a", strings.Repeat("x", 1000-3-3-2-1), true); got.ReasonCode != 0 { // exactly 1000
			t.Errorf("got %+v", got)
		}
		// The one before it in the same segment counts.
		good := encode(t, 5, publish("before", "it", 1, true, 5))
		r.write(append(good, 0x32, 0xff, 0xff, 0xff, 0x7f))
		bye := r.closed()
		eventually(t, "the good one", func() bool { _, ok := b.Retained("before"); return ok })
		if bye == nil || bye.ReasonCode != 0x95 || !hasAll(bye.Properties.ReasonString, "268435460", "1000") {
			t.Errorf("got %+v", bye)
		}
		r, _ = connect(t, addr, 4, "x")
		r.write([]byte{0x32, 0xff, 0xff, 0xff, 0x7f})
		if bye := r.closed(); bye != nil {
			t.Errorf("MQTT 3.1.1 got %+v", bye)
		}
		r, _ = connect(t, addr, 5, "x")
		r.write([]byte{0x32, 0x80, 0x80, 0x80, 0x80, 0x01})
		if bye := r.closed(); bye == nil || bye.ReasonCode != 0x81 {
			t.Errorf("five length bytes: got %+v", bye)
		}
	}
	// Nobody is known before CONNECT: 64 KiB at most, whatever the limit.
	b, addr = open(t, t.TempDir())
	r := dialRaw(t, addr, 5)
	r.write([]byte{0x10, 0x81, 0x80, 0x04})
	r.closed()
	r = dialRaw(t, listen(t, b, "ws://127.0.0.1:0"), 5)
	r.write([]byte{0x10, 0x81, 0x80, 0x04})
	r.closed()
}

// While a client is written to, its over-long packet must not write in between:
// a WebSocket panics on that.
func TestTooLargeWhileDelivering(t *testing.T) {
	b, _ := open(t, t.TempDir(), func(o *broker.Options) { o.MaxPacket = 1 << 20 })
	for _, addr := range []string{"ws://127.0.0.1:0", "127.0.0.1:0"} {
		at := listen(t, b, addr)
		for range 10 {
			r, _ := connect(t, at, 5, "x")
			r.subscribe(packets.Subscription{Filter: "a"})
			var ms []broker.Message
			for range 2000 {
				ms = append(ms, broker.Message{Topic: "a", Payload: make([]byte, 1000)})
			}
			done := make(chan error, 1)
			go func() { done <- b.Publish(t.Context(), ms...) }()
			r.next()
			r.write([]byte{0x32, 0xff, 0xff, 0xff, 0x7f})
			r.closed()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestConnectDeadline(t *testing.T) {
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.ConnectDeadline = 50 * time.Millisecond })
	ws := listen(t, b, "ws://127.0.0.1:0")
	for _, addr := range []string{addr, ws} {
		silent := dialRaw(t, addr, 5)
		silent.closed()
		half := dialRaw(t, addr, 5)
		half.write([]byte{0x10, 0x20, 0, 4, 'M', 'Q'})
		half.closed()
	}
	// Neither an HTTP request nor half a one holds a WebSocket listener.
	c, err := net.Dial("tcp", strings.TrimSuffix(strings.TrimPrefix(ws, "ws://"), "/"))
	if err != nil {
		t.Fatal(err)
	}
	r := newRaw(t, c, 5)
	r.write([]byte("GET / HTTP/1.1\r\nHost:"))
	r.closed()
	// It does not concern those who are in.
	in, _ := connect(t, addr, 5, "x")
	later, _ := connect(t, addr, 5, "y")
	dead := dialRaw(t, addr, 5)
	dead.closed()
	in.nothing()
	later.nothing()
}

// A client that is silent for one and a half of its keepalive is gone.
func TestKeepAlive(t *testing.T) {
	_, addr := open(t, t.TempDir())
	r, _ := connect(t, addr, 5, "x", func(pk *packets.Packet) { pk.Connect.Keepalive = 1 })
	r.closed()
	// mochi computes in 16 bits: these would be dead at once.
	for _, k := range []uint16{43690, 43691, 43692, 65535} {
		r, ack := connect(t, addr, 5, "x", func(pk *packets.Packet) { pk.Connect.Keepalive = k })
		r.nothing()
		if k > 43690 && ack.Properties.ServerKeepAlive != 43690 {
			t.Errorf("keepalive %d: CONNACK says %d", k, ack.Properties.ServerKeepAlive)
		}
		r.bye(0)
	}
}

// [MQTT-3.3.4-9]: no more than the client's Receive Maximum is in flight to it,
// replay and live alike, and it goes on as soon as the client acknowledges.
func TestReceiveMaximumOut(t *testing.T) {
	b, addr := open(t, t.TempDir())
	const n, window = 50, 3
	var ms []broker.Message
	for i := range n {
		ms = append(ms, broker.Message{Topic: topicN(i), Payload: []byte("x"), QoS: 1, Retain: true})
	}
	if err := b.Publish(t.Context(), ms...); err != nil {
		t.Fatal(err)
	}
	r, _ := connect(t, addr, 5, "x", func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = window })
	r.subscribe(packets.Subscription{Filter: "t/#", Qos: 1})
	if err := b.Publish(t.Context(), ms...); err != nil { // live, behind the replay
		t.Fatal(err)
	}
	var ids []uint16
	live := 0
	get := func() {
		var m packets.Packet
		if len(r.early) > 0 {
			m, r.early = r.early[0], r.early[1:]
		} else {
			m = r.expect(packets.Publish)
		}
		for _, id := range ids {
			if id == m.PacketID {
				t.Fatalf("packet id %d is in flight already", id)
			}
		}
		ids = append(ids, m.PacketID)
		if !m.FixedHeader.Retain {
			live++
		}
	}
	for range window {
		get()
	}
	for i := 0; live < n; i++ {
		// Full: a ping is answered, and nothing else comes.
		r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
		r.expect(packets.Pingresp)
		j := i % window
		r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}, PacketID: ids[j]})
		ids = append(ids[:j], ids[j+1:]...)
		get()
	}
}

// [MQTT-3.3.4-7]: who publishes beyond our Receive Maximum is disconnected.
func TestReceiveMaximumIn(t *testing.T) {
	_, addr := open(t, t.TempDir())
	r, ack := connect(t, addr, 5, "x")
	limit := int(ack.Properties.ReceiveMaximum)
	if limit == 0 || limit == 65535 {
		t.Fatalf("CONNACK says %d", limit)
	}
	var all []byte
	for i := range limit + 1 {
		all = append(all, encode(t, 5, publish("a", "x", 2, false, uint16(i+1)))...)
	}
	r.write(all)
	if bye := r.closed(); bye == nil || bye.ReasonCode != 0x93 {
		t.Errorf("got %+v", bye)
	}
	// One that releases them goes on for ever.
	r, _ = connect(t, addr, 5, "x")
	for i := range 3 * limit {
		id := uint16(i%limit + 1)
		r.send(publish("a", "x", 2, false, id))
		r.expect(packets.Pubrec)
		r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel}, PacketID: id})
		if pk := r.expect(packets.Pubcomp); pk.ReasonCode != 0 {
			t.Fatalf("got %+v", pk)
		}
	}
}

// [MQTT-4.3.3-10]: a QoS 2 publish that comes again is acknowledged, not published, again.
func TestQoS2Once(t *testing.T) {
	_, addr := open(t, t.TempDir())
	for _, v := range []byte{5, 4} {
		sub, _ := connect(t, addr, 5, "sub")
		sub.subscribe(packets.Subscription{Filter: "a", Qos: 2})
		r, _ := connect(t, addr, v, "x")
		r.send(publish("a", "1", 2, false, 3))
		r.expect(packets.Pubrec)
		r.send(publish("a", "1", 2, false, 3))
		r.expect(packets.Pubrec)
		r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel}, PacketID: 3})
		r.expect(packets.Pubcomp)
		r.send(publish("a", "2", 2, false, 3))
		r.expect(packets.Pubrec)
		for _, want := range []string{"1", "2"} {
			if m := sub.next(); string(m.Payload) != want {
				t.Errorf("got %q, want %q", m.Payload, want)
			}
		}
		sub.nothing()
	}
}

// A subscriber that does not read is disconnected at its bound, is told so if
// it reads again in time, and neither the publisher nor anybody else waits for it.
func TestSlowSubscriber(t *testing.T) {
	reg := prometheus.NewRegistry()
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.Metrics = reg })
	ws := listen(t, b, "ws://127.0.0.1:0")
	for _, at := range []string{addr, ws} {
		t.Run(at[:2], func(t *testing.T) {
			slow, _ := connect(t, at, 5, "slow", func(pk *packets.Packet) { pk.Connect.Keepalive = 0 })
			slow.subscribe(packets.Subscription{Filter: "flood"})
			fast, msgs := dial(t, addr, "fast", client.Subscription{Filter: "flood", QoS: 1})
			pub, _ := dial(t, addr, "pub")
			before := slowClients(t, reg)
			for i := 0; slowClients(t, reg) == before; i++ {
				if err := pub.Publish(t.Context(), client.Message{Topic: "flood", Payload: make([]byte, 256<<10), QoS: 1}); err != nil {
					t.Fatal(err)
				}
				next(t, msgs)
				if i > 1000 {
					t.Fatal("256 MiB wait for a client that does not read")
				}
			}
			slow.closed()
			if !fast.Connected() || !pub.Connected() {
				t.Error("others went with it")
			}
		})
	}
}

func slowClients(t *testing.T, reg *prometheus.Registry) int {
	t.Helper()
	return counter(t, reg, "fairlead_broker_slow_clients_disconnected_total")
}

func counter(t *testing.T, reg *prometheus.Registry, name string) int {
	t.Helper()
	fams, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fams {
		if f.GetName() == name {
			return int(f.GetMetric()[0].GetCounter().GetValue())
		}
	}
	return 0
}

// A half-dead connection whose socket is full does not keep its client from
// coming back: the takeover does not wait for it.
func TestTakeoverOfStuckClient(t *testing.T) {
	b, addr := open(t, t.TempDir())
	ws := listen(t, b, "ws://127.0.0.1:0")
	for _, at := range []string{addr, ws} {
		stuck, _ := connect(t, at, 5, "x", func(pk *packets.Packet) { pk.Connect.Keepalive = 0 })
		stuck.subscribe(packets.Subscription{Filter: "flood"})
		for range 40 { // more than the socket buffers hold, less than the bound
			if err := b.Publish(t.Context(), broker.Message{Topic: "flood", Payload: make([]byte, 256<<10)}); err != nil {
				t.Fatal(err)
			}
		}
		again, ack := connect(t, at, 5, "x")
		if ack.ReasonCode != 0 {
			t.Fatalf("got %+v", ack)
		}
		again.nothing()
	}
}

// Close does not wait for clients that do not read, say nothing, or are half-way in.
func TestCloseWithStuckClients(t *testing.T) {
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.ConnectDeadline = time.Hour })
	ws := listen(t, b, "ws://127.0.0.1:0")
	var rs []*raw
	for i, at := range []string{addr, ws} {
		stuck, _ := connect(t, at, 5, fmt.Sprint(i), func(pk *packets.Packet) { pk.Connect.Keepalive = 0 })
		stuck.subscribe(packets.Subscription{Filter: "flood"})
		silent := dialRaw(t, at, 5)
		half := dialRaw(t, at, 5)
		half.write([]byte{0x10, 0x20, 0})
		idle, _ := connect(t, at, 4, "idle"+fmt.Sprint(i), func(pk *packets.Packet) { pk.Connect.Keepalive = 0 })
		rs = append(rs, stuck, silent, half, idle)
	}
	d, err := net.Dial("tcp", strings.TrimSuffix(strings.TrimPrefix(ws, "ws://"), "/"))
	if err != nil {
		t.Fatal(err)
	}
	rs = append(rs, newRaw(t, d, 5)) // not even a handshake
	for range 40 {
		if err := b.Publish(t.Context(), broker.Message{Topic: "flood", Payload: make([]byte, 256<<10)}); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 2)
	for range 2 {
		go func() { done <- b.Close() }()
	}
	for range 2 {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(patience):
			t.Fatal("Close does not return")
		}
	}
	for _, r := range rs {
		r.closed()
	}
}

// Each publisher's messages arrive in its order, however many there are.
func TestOrderPerPublisher(t *testing.T) {
	const publishers, each = 1000, 10
	b, addr := open(t, t.TempDir(), func(o *broker.Options) { o.MaxClients = publishers + 10 })
	type item struct {
		from uint32
		n    uint32
	}
	got := make(chan item, publishers*each)
	stop, err := b.Watch(t.Context(), "o/#", func(m broker.Message) {
		got <- item{binary.BigEndian.Uint32(m.Payload), binary.BigEndian.Uint32(m.Payload[4:])}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	sub, msgs := dial(t, addr, "sub", client.Subscription{Filter: "o/#", QoS: 1})
	_ = sub
	var wg sync.WaitGroup
	gate := make(chan struct{}, 100) // dialing all at once overflows the backlog
	for p := range publishers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			gate <- struct{}{}
			r, _ := connect(t, addr, 5, fmt.Sprint(p))
			<-gate
			var all []byte
			for i := range each {
				payload := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, uint32(p)), uint32(i))
				all = append(all, encode(t, 5, publish("o/"+fmt.Sprint(p%7), string(payload), byte(1+i%2), i%3 == 0, uint16(i+1)))...)
			}
			if _, err := r.Write(all); err != nil {
				t.Error(err)
				return
			}
			for range each {
				if pk, err := r.read(); err != nil || pk.ReasonCode != 0 {
					t.Errorf("publisher %d: %+v, %v", p, pk, err)
					return
				}
			}
		}()
	}
	wg.Wait()
	next1 := map[uint32]uint32{}
	next2 := map[uint32]uint32{}
	for range publishers * each {
		i := <-got
		if next1[i.from] != i.n {
			t.Fatalf("watch: publisher %d: message %d, want %d", i.from, i.n, next1[i.from])
		}
		next1[i.from]++
		m := next(t, msgs)
		from, n := binary.BigEndian.Uint32(m.Payload), binary.BigEndian.Uint32(m.Payload[4:])
		if next2[from] != n {
			t.Fatalf("subscriber: publisher %d: message %d, want %d", from, n, next2[from])
		}
		next2[from]++
	}
}

// Subscribing again and again without acknowledging costs no memory.
func TestReplaysAreBounded(t *testing.T) {
	b, addr := open(t, t.TempDir())
	if err := b.Publish(t.Context(), broker.Message{Topic: "a", Payload: []byte("x"), QoS: 1, Retain: true}, broker.Message{Topic: "b", Payload: []byte("x"), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	r, _ := connect(t, addr, 5, "x", func(pk *packets.Packet) { pk.Properties.ReceiveMaximum = 1 })
	for range 100 {
		r.subscribe(packets.Subscription{Filter: "#", Qos: 1})
	}
	// One message is in flight and one waits; then the last replay alone goes on.
	for _, want := range []topic.Topic{"a", "b", "a", "b"} {
		if m := r.next(); m.TopicName != string(want) {
			t.Errorf("got %s, want %s", m.TopicName, want)
		}
	}
	r.nothing()
	many := make(packets.Subscriptions, 1000)
	for i := range 17 {
		for j := range many {
			many[j] = packets.Subscription{Filter: fmt.Sprintf("many/%d/%d", i, j)}
		}
		r.write(encode(t, 5, packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: 2, Filters: many}))
	}
	if bye := r.closed(); bye == nil || bye.ReasonCode != 0x97 {
		t.Errorf("got %+v", bye)
	}
}

// [MQTT-3.1.2-25]: what is larger than the client takes counts as delivered, and
// the rest follows.
func TestClientMaximumPacketSize(t *testing.T) {
	b, addr := open(t, t.TempDir())
	r, _ := connect(t, addr, 5, "x", func(pk *packets.Packet) {
		pk.Properties.MaximumPacketSize = 100
		pk.Properties.ReceiveMaximum = 1
	})
	big := broker.Message{Topic: "a", Payload: make([]byte, 200), QoS: 1, Retain: true}
	small := broker.Message{Topic: "b", Payload: []byte("x"), QoS: 1, Retain: true}
	if err := b.Publish(t.Context(), big, small); err != nil {
		t.Fatal(err)
	}
	r.subscribe(packets.Subscription{Filter: "+", Qos: 1})
	if err := b.Publish(t.Context(), big, small); err != nil {
		t.Fatal(err)
	}
	for m := r.next(); m.FixedHeader.Retain; m = r.next() {
		if m.TopicName != "b" {
			t.Errorf("got %s", m.TopicName)
		}
	}
	r.nothing()
}

// $SYS is there for dashboards, and for nobody to write.
func TestSys(t *testing.T) {
	_, addr := open(t, t.TempDir())
	r, _ := connect(t, addr, 5, "x")
	r.subscribe(packets.Subscription{Filter: "$SYS/broker/version"})
	if m := r.next(); m.TopicName != "$SYS/broker/version" || len(m.Payload) == 0 {
		t.Errorf("got %+v", m)
	}
	all, _ := connect(t, addr, 5, "all")
	all.subscribe(packets.Subscription{Filter: "#"}) // [MQTT-4.7.2-1]
	all.nothing()
}
