package broker_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/gorilla/websocket"
	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

// trial is one run of a case against one broker.
type trial struct {
	t *testing.T
	s setup
	*served
}

// dial opens a connection whose failures are the broker's fault.
func (x *trial) dial(v byte) *peer {
	x.t.Helper()
	p := dialPeer(x.t, x.addr, v)
	p.soft = true
	if x.s.Stock {
		p.wait = time.Second // it is known not to come
	}
	return p
}

func (x *trial) join(v byte, id string, change ...func(*packets.Packet)) *peer {
	x.t.Helper()
	p := x.dial(v)
	p.welcome(id, change...)
	return p
}

func (p *peer) welcome(id string, change ...func(*packets.Packet)) packets.Packet {
	p.t.Helper()
	ack := p.connect(id, change...)
	if ack.ReasonCode != 0 {
		p.fail("CONNACK 0x%02x %q", ack.ReasonCode, ack.Properties.ReasonString)
	}
	return ack
}

// restart kills the broker with -9 and starts it on what it left.
func (x *trial) restart() {
	x.t.Helper()
	x.kill()
	x.served = x.s.start(x.t)
}

// do runs the case and turns a soft peer's complaint into an error.
func (x *trial) do(run func(*trial) error) (err error) {
	defer complain(&err)
	return run(x)
}

// complain is deferred: it turns a soft peer's complaint into an error.
func complain(err *error) {
	switch f := recover().(type) {
	case nil:
	case fault:
		*err = f.error
	default:
		panic(f)
	}
}

// regress is a fault of mochi 2.7.9 that the broker must not have.
type regress struct {
	name string
	// fault is part of what the case says of stock mochi.
	fault string
	// tries bounds how often stock mochi is asked, where its fault is random; 0 is once.
	tries  int
	setup  setup
	stored bool // stock mochi gets a store as well
	run    func(x *trial) error
}

// The faults of mochi 2.7.9 that can be seen on the wire, each with the words in
// which it was reported. Every case runs against stock mochi, where the fault
// must show, and against the broker, where it must not.
//
// Not here: several auth hooks are OR-ed and the inline client bypasses ACL and
// acks (the broker has one hook and no inline client; TestConnectRefused and
// TestPublishRefused hold its own rules), ErrRejectPacket gives no PUBACK (a
// matter of the hook), the map of retained messages copied every second and the
// 66.8 kB per client (figures of the benchmark), the deadlock of a recursive
// read lock in NextImmediate (needs a writer in between; the stall that comes
// with it is here).
var regressions = []regress{
	{
		// "PUBACK is written before the subscribers' copies exist."
		name: "acknowledged before the copies are stored", fault: "acknowledged while its copy is not stored",
		setup: setup{Disk: true}, stored: true,
		run: func(x *trial) error {
			sub := x.join(5, "sub", resume)
			sub.sub("a", 1)
			sub.bye(0)
			pub := x.join(5, "pub")
			pub.ping() // stock mochi stores the client after CONNACK
			if err := x.disk("hold"); err != nil {
				return err
			}
			pub.send(publish("a", "x", 1, false, 1))
			if err := x.disk("await"); err != nil {
				return err
			}
			pub.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pingreq}})
			pk, err := pub.read()
			if err := errors.Join(err, x.disk("release")); err != nil {
				return err
			}
			if pk.FixedHeader.Type == packets.Puback {
				return errors.New("acknowledged while its copy is not stored")
			}
			if ack := pub.want(packets.Puback); ack.ReasonCode != 0 {
				return fmt.Errorf("PUBACK 0x%02x", ack.ReasonCode)
			}
			return nil
		},
	},
	{
		// "Killed in between, an acked message is gone, synced store or not." The
		// store syncs within 20 ms.
		name: "acknowledged and lost to kill -9", fault: "acknowledged and gone", tries: 5,
		setup: setup{Child: true, Sync: 20 * time.Millisecond}, stored: true,
		run: func(x *trial) error {
			sub := x.join(5, "sub", resume)
			sub.sub("a", 1)
			sub.bye(0)
			pub := x.join(5, "pub")
			for i := range 3 {
				if code := pub.pub("a", strconv.Itoa(i), 1); code != 0 {
					return fmt.Errorf("PUBACK 0x%02x", code)
				}
			}
			x.restart()
			sub = x.dial(5)
			if !sub.welcome("sub", resume).SessionPresent {
				return errors.New("the session is gone")
			}
			got := sub.until("end", func() { x.join(5, "end").pub("a", "end", 1) })
			for i := range 3 {
				if !slices.Contains(got, strconv.Itoa(i)) {
					return fmt.Errorf("%d was acknowledged and gone after kill -9: got %q", i, got)
				}
			}
			return nil
		},
	},
	{
		// "Offline QoS 1 queues live in RAM."
		name: "offline queue in memory", fault: "the session is gone",
		setup: setup{Child: true},
		run: func(x *trial) error {
			sub := x.join(5, "sub", resume)
			sub.sub("a", 1)
			sub.bye(0)
			x.join(5, "pub").pub("a", "x", 1)
			x.restart()
			sub = x.dial(5)
			if !sub.welcome("sub", resume).SessionPresent {
				return errors.New("the session is gone")
			}
			sub.nextIs("x")
			return nil
		},
	},
	{
		// "A plain error falls through: stored, PUBACK 0x00." "Other hooks return
		// nothing, so a failed write is invisible."
		name: "store fails and PUBACK says 0x00", fault: "PUBACK 0x00",
		setup: setup{Child: true, Disk: true}, stored: true,
		run: func(x *trial) error {
			pub := x.join(5, "pub")
			if code := pub.pub("a", "x", 1, retained); code != 0 {
				return fmt.Errorf("PUBACK 0x%02x while the store works", code)
			}
			if err := x.disk("fail"); err != nil {
				return err
			}
			if code := pub.pub("a", "y", 1, retained); code != 0x83 {
				return fmt.Errorf("PUBACK 0x%02x while the store fails, want 0x83", code)
			}
			return nil
		},
	},
	{
		// "When full the newest is dropped after the publisher got its ack."
		name: "offline queue drops the newest", fault: "the newest",
		run: func(x *trial) error {
			sub := x.join(5, "sub", resume)
			sub.sub("a", 1)
			sub.bye(0)
			acked := x.join(5, "pub").stream("a", 9000)
			sub = x.join(5, "sub", resume)
			return sub.hasTail(acked, func() { x.join(5, "end").pub("a", "end", 1) })
		},
	},
	{
		// "Online, a full outbound channel drops QoS 1 silently."
		name: "online queue drops silently", fault: "the newest",
		run: func(x *trial) error {
			sub := x.join(5, "sub")
			sub.sub("a", 1)
			acked := x.join(5, "pub").stream("a", 9000)
			return sub.hasTail(acked, func() { x.join(5, "end").pub("a", "end", 1) })
		},
	},
	{
		// "A slow QoS 1 subscriber blocks publishers (15 s seen)."
		name: "slow subscriber blocks publishers", fault: "timeout",
		run: func(x *trial) error {
			slow := x.dial(5)
			if err := slow.c.(*net.TCPConn).SetReadBuffer(4096); err != nil {
				return err
			}
			slow.welcome("slow")
			slow.sub("a", 1)
			quick := x.join(5, "quick")
			quick.sub("a", 1)
			pub := x.join(5, "pub")
			payload := strings.Repeat("x", 64<<10)
			for i := range 200 { // 12.5 MiB: more than the sockets take
				if code := pub.pub("a", payload, 1); code != 0 {
					return fmt.Errorf("PUBACK 0x%02x for %d", code, i)
				}
				quick.next()
			}
			return nil
		},
	},
	{
		// "After a reconnect, order within a second is random."
		name: "order after a reconnect", fault: "out of order", tries: 3,
		run: func(x *trial) error {
			sub := x.join(5, "sub", resume)
			sub.sub("a", 1)
			sub.bye(0)
			acked := x.join(5, "pub").stream("a", 100)
			sub = x.join(5, "sub", resume)
			for i, want := range acked {
				if m := sub.next(); string(m.Payload) != want {
					return fmt.Errorf("out of order: got %q at %d", m.Payload, i)
				}
			}
			return nil
		},
	},
	{
		// "Receive Maximum: delivery stalls and can deadlock."
		name: "Receive Maximum stalls delivery", fault: "want Publish",
		run: func(x *trial) error {
			sub := x.join(5, "sub", receiveMax(2))
			sub.sub("a", 1)
			pub := x.join(5, "pub")
			pub.stream("a", 50)
			for range 50 {
				sub.next()
			}
			return nil
		},
	},
	{
		// "One packet-id map for both directions: a client that publishes and
		// subscribes on one connection can erase a delivery."
		name: "one packet id space: delivery erased", fault: "got 0 of 1",
		run: func(x *trial) error {
			c := x.join(5, "c", resume)
			c.sub("a", 1)
			x.join(5, "pub").pub("a", "x", 1)
			m := c.message() // not acknowledged
			c.send(publish("b", "mine", 1, false, m.PacketID))
			c.want(packets.Puback)
			c.ping() // else stock mochi may say PUBACK again
			c.drop()
			c = x.join(5, "c", resume)
			if got := c.until("end", func() { x.join(5, "end").pub("a", "end", 1) }); len(got) != 1 {
				return fmt.Errorf("got %d of 1 unacknowledged messages again", len(got))
			}
			return nil
		},
	},
	{
		// "… or get 0x91."
		name: "one packet id space: 0x91", fault: "0x91",
		run: func(x *trial) error {
			c := x.join(5, "c")
			c.sub("a", 1)
			x.join(5, "pub").pub("a", "x", 1)
			m := c.message()
			c.lastID = m.PacketID - 1
			c.sub("b", 1)
			return nil
		},
	},
	{
		// "A wildcard SUBSCRIBE replays at most MaximumInflight of them."
		name: "replay of retained messages is cut", fault: "retained messages of",
		run: func(x *trial) error {
			const n = 8192 + 300
			acked := x.join(5, "pub").streamOf(n, func(i int) packets.Packet {
				return publish("r/"+strconv.Itoa(i), "x", 1, true, 0)
			})
			if len(acked) != n {
				return fmt.Errorf("%d of %d acknowledged", len(acked), n)
			}
			sub := x.join(5, "sub")
			sub.sub("r/#", 1)
			seen := map[string]bool{}
			for len(seen) < n {
				m, err := sub.try()
				if err != nil {
					return fmt.Errorf("%d retained messages of %d: %w", len(seen), n, err)
				}
				seen[m.TopicName] = true
			}
			return nil
		},
	},
	{
		// "ACL runs before topic aliases are resolved: an aliased publish is
		// checked as ''."
		name: "access checked before the alias", fault: "0x87",
		setup: setup{Allow: []string{"ok/"}},
		run: func(x *trial) error {
			sub := x.join(5, "sub")
			sub.sub("ok/#", 1)
			c := x.dial(5)
			if c.welcome("c").Properties.TopicAliasMaximum == 0 && !x.s.Stock { // stock mochi takes them without saying so
				return errors.New("no topic aliases")
			}
			for range 2 { // it may be used once more after a refusal
				if code := c.pub(reading, "x", 1, alias(2), retained); code != 0x87 {
					return fmt.Errorf("%s: PUBACK 0x%02x", reading, code)
				}
			}
			if code := c.pub("ok/1", "x", 1, alias(1)); code != 0 {
				return fmt.Errorf("PUBACK 0x%02x", code)
			}
			if code := c.pub("", "y", 1, alias(1)); code != 0 {
				return fmt.Errorf("aliased: PUBACK 0x%02x", code)
			}
			sub.nextIs("x")
			if m := sub.nextIs("y"); m.TopicName != "ok/1" {
				return fmt.Errorf("got topic %q", m.TopicName)
			}
			return nil
		},
	},
	{
		// "No deadline before CONNECT."
		name: "no deadline before CONNECT", fault: "stays open",
		setup: setup{Deadline: 50 * time.Millisecond},
		run: func(x *trial) error {
			x.dial(5).gone()
			return nil
		},
	},
	{
		// "No packet size limit."
		name: "no packet size limit", fault: "accepted",
		run: func(x *trial) error {
			c := x.join(5, "c")
			_, _ = c.c.Write(c.encode(publish("a", strings.Repeat("x", 8<<20), 1, false, 1)))
			pk, err := c.read()
			if err == nil && pk.FixedHeader.Type == packets.Puback {
				return errors.New("accepted a packet of 8 MiB")
			}
			if err != nil || pk.FixedHeader.Type != packets.Disconnect || pk.ReasonCode != 0x95 {
				return fmt.Errorf("want DISCONNECT 0x95, got type %d 0x%02x, %w", pk.FixedHeader.Type, pk.ReasonCode, err)
			}
			return nil
		},
	},
	{
		// "Any WebSocket Origin."
		name: "any WebSocket Origin", fault: "let in",
		run: func(x *trial) error {
			d := websocket.Dialer{Subprotocols: []string{"mqtt"}}
			ws, resp, err := d.DialContext(x.t.Context(), x.ws, http.Header{"Origin": {"http://evil.example"}})
			if err == nil {
				_ = ws.Close()
				return errors.New("a page of another origin was let in")
			}
			if resp == nil {
				return err
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusForbidden {
				return fmt.Errorf("status %d", resp.StatusCode)
			}
			return nil
		},
	},
	{
		// [MQTT-4.7.1-2]: # is for the parent level too, and + for the first.
		name: "plus and hash miss retained messages of one level", fault: "got 0",
		run: func(x *trial) error {
			c := x.join(5, "c")
			c.pub("a", "x", 1, retained)
			c.sub("+/#", 1)
			if got := c.until("end", func() { x.join(5, "end").pub("z/z", "end", 1) }); len(got) != 1 {
				return fmt.Errorf("got %d messages", len(got))
			}
			return nil
		},
	},
	{
		// [MQTT-3.3.1-13] for each of two overlapping subscriptions.
		name: "Retain As Published of overlapping subscriptions", fault: "without the retain flag",
		run: func(x *trial) error {
			c := x.join(5, "c")
			c.subs(packets.Subscription{Filter: "a/b", Qos: 1})
			c.subs(packets.Subscription{Filter: "a/+", Qos: 1, RetainAsPublished: true})
			c.ping() // stock mochi looks for retained messages after SUBACK
			pub := x.join(5, "pub")
			pub.pub("a/b", "x", 1, retained)
			pub.pub("a/b", "end", 1)
			for retain := false; ; {
				switch m := c.next(); {
				case string(m.Payload) == "x":
					retain = retain || m.FixedHeader.Retain
				case !retain:
					return errors.New("delivered without the retain flag that one subscription asked for")
				default:
					return nil
				}
			}
		},
	},
	{
		// One and a half of the keepalive is computed in 16 bits.
		name: "keepalive above 43,690 s", fault: "Connack",
		run: func(x *trial) error {
			for _, k := range []uint16{43691, 65535} {
				c := x.join(5, "c", func(pk *packets.Packet) { pk.Connect.Keepalive = k })
				c.ping()
			}
			return nil
		},
	},
	{
		// The decoder reads the options of a filter past the packet's end.
		name: "malformed SUBSCRIBE ends the process", fault: "the process is gone", tries: 3,
		setup: setup{Child: true},
		run: func(x *trial) error {
			x.join(5, "other")
			c := x.join(5, "c")
			c.write([]byte{0x82, 0x06, 0, 1, 0, 0, 1, 'a'})
			c.gone()
			// A process that panics closes the connection first and takes a
			// while to end.
			for range 20 {
				nc, err := net.Dial("tcp", strings.TrimPrefix(x.addr, "mqtt://"))
				if err == nil {
					c = newPeer(x.t, nc, 5)
					c.soft = true
					err = c.attempt(func() { c.welcome("c"); c.ping() })
				}
				if err != nil {
					return fmt.Errorf("the process is gone: %w", err)
				}
				time.Sleep(20 * time.Millisecond)
			}
			return nil
		},
	},
	{
		// Between PUBACK and fan-out there is the store of mochi's hooks; who
		// subscribes then gets a retained message twice.
		name: "message doubled between PUBACK and SUBACK", fault: "got it twice", tries: 5,
		setup: setup{Sync: 20 * time.Millisecond}, stored: true,
		run: func(x *trial) error {
			pub := x.join(5, "pub")
			for i := range 20 {
				topic := "a/" + strconv.Itoa(i)
				sub := x.join(5, "sub"+strconv.Itoa(i))
				pub.pub(topic, "x", 1, retained)
				sub.sub(topic, 1)
				pub.pub(topic, "end", 1)
				sub.nextIs("x")
				if m := sub.next(); string(m.Payload) != "end" {
					return fmt.Errorf("got it twice: %q, retain %v", m.Payload, m.FixedHeader.Retain)
				}
				sub.drop()
			}
			return nil
		},
	},
}

func TestRegressions(t *testing.T) {
	for _, c := range regressions {
		t.Run(c.name, func(t *testing.T) {
			t.Run("mochi", func(t *testing.T) {
				for i := range max(c.tries, 1) {
					s := c.setup
					s.Stock, s.Child = true, true // it may deadlock
					if c.stored {
						s.Dir = t.TempDir()
					}
					x := &trial{t: t, s: s, served: s.start(t)}
					err := x.do(c.run)
					x.kill()
					if err == nil {
						continue
					}
					if !strings.Contains(err.Error(), c.fault) {
						t.Fatalf("it fails otherwise than it should: %v; want %q", err, c.fault)
					}
					t.Logf("try %d: %v", i+1, err)
					return
				}
				t.Error("the fault does not show")
			})
			t.Run("fairlead", func(t *testing.T) {
				s := c.setup
				s.Dir = t.TempDir()
				x := &trial{t: t, s: s, served: s.start(t)}
				if err := x.do(c.run); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// alias gives a publish a topic alias.
func alias(n uint16) func(*packets.Packet) {
	return func(pk *packets.Packet) { pk.Properties.TopicAlias, pk.Properties.TopicAliasFlag = n, true }
}

// attempt gives a soft peer's complaint.
func (p *peer) attempt(fn func()) (err error) {
	defer complain(&err)
	fn()
	return nil
}

// try is next of a soft peer, without a complaint where nothing comes.
func (p *peer) try() (m packets.Packet, err error) {
	err = p.attempt(func() { m = p.next() })
	return m, err
}

// until gives the payloads that come before one that is the end. end publishes it.
func (p *peer) until(end string, publish func()) (got []string) {
	p.t.Helper()
	publish()
	for {
		m := p.next()
		if string(m.Payload) == end {
			return got
		}
		got = append(got, string(m.Payload))
	}
}

// stream publishes n numbers with QoS 1, many at a time, and gives those that
// were acknowledged with success, in order.
func (p *peer) stream(topic string, n int) (acked []string) {
	p.t.Helper()
	return p.streamOf(n, func(i int) packets.Packet { return publish(topic, strconv.Itoa(i), 1, false, 0) })
}

func (p *peer) streamOf(n int, message func(int) packets.Packet) (acked []string) {
	p.t.Helper()
	const window = 64
	sent, ids := 0, map[uint16]int{}
	for got := 0; got < n; got++ {
		for ; sent < n && len(ids) < window; sent++ {
			pk := message(sent)
			pk.PacketID = p.id()
			ids[pk.PacketID] = sent
			p.send(pk)
		}
		ack := p.want(packets.Puback)
		i, ok := ids[ack.PacketID]
		if !ok {
			p.fail("PUBACK for %d, which is not in flight", ack.PacketID)
		}
		delete(ids, ack.PacketID)
		if ack.ReasonCode < 0x80 {
			acked = append(acked, strconv.Itoa(i))
		}
	}
	return acked
}

// hasTail wants what arrives to be the acknowledged messages in order, or, where
// a bound dropped some, the newest of them.
func (p *peer) hasTail(acked []string, end func()) error {
	p.t.Helper()
	var got []string
	for len(got) < len(acked) {
		m, err := p.try()
		if err != nil {
			break
		}
		if got = append(got, string(m.Payload)); got[len(got)-1] == acked[len(acked)-1] {
			break
		}
	}
	if len(got) == 0 || got[len(got)-1] != acked[len(acked)-1] {
		return fmt.Errorf("of %d acknowledged messages %d arrived and the newest did not", len(acked), len(got))
	}
	if !slices.Equal(got, acked[len(acked)-len(got):]) {
		return fmt.Errorf("what arrived is not the newest %d of %d in order", len(got), len(acked))
	}
	if more := p.until("end", end); len(more) > 0 {
		return fmt.Errorf("%d more arrived", len(more))
	}
	return nil
}

// "Retained messages die after 24 h unless MaximumMessageExpiryInterval is 0."
// Here time is synctest's, so the connections are pipes and the store is in memory.
func TestRegressionRetainedForADay(t *testing.T) {
	dead := func(t *testing.T, connect func() net.Conn) bool {
		p := newPeer(t, connect(), 5)
		p.welcome("c")
		p.pub("a", "x", 1, retained)
		p.bye(0)
		time.Sleep(25 * time.Hour)
		p = newPeer(t, connect(), 5)
		p.welcome("c")
		p.pub("b", "x", 1, retained)
		p.sub("+", 1)
		got := []string{p.next().TopicName}
		if got[0] == "a" {
			got = append(got, p.next().TopicName)
		}
		p.silent()
		p.bye(0)
		return !slices.Contains(got, "a")
	}
	t.Run("mochi", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			srv := mqtt.New(&mqtt.Options{
				Logger:                 slog.New(slog.DiscardHandler),
				SysTopicResendInterval: 3600, // each reads the memory statistics
			})
			if err := errors.Join(srv.AddHook(&stockHook{disk: newDisk(0)}, nil), srv.Serve()); err != nil {
				t.Fatal(err)
			}
			if !dead(t, func() net.Conn {
				here, there := net.Pipe()
				go func() { _ = srv.EstablishConnection("pipe", there) }()
				return newPumped(here)
			}) {
				t.Error("the fault does not show")
			}
			_ = srv.Close()
		})
	})
	t.Run("fairlead", func(t *testing.T) {
		bubble(t, func(t *testing.T, b *broker.Broker) {
			if dead(t, func() net.Conn { return pipe(t, b) }) {
				t.Error("a retained message died within 25 h")
			}
		})
	})
}

// bubble runs a broker in a time of its own, which passes when everybody waits.
// Its store is in memory, its clients are pipes.
func bubble(t *testing.T, run func(t *testing.T, b *broker.Broker)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := openMem(t, vfs.NewCrashableMem())
		defer func() {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}()
		run(t, b)
	})
}

// openMem starts a broker on a store in memory; it is the caller's to close.
func openMem(t *testing.T, fs vfs.FS) *broker.Broker {
	t.Helper()
	o := broker.Options{
		Dir: "/store", Node: pump, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Authenticate: everybody,
	}
	o.Store.FS = fs
	b, err := broker.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
