package client

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/eclipse/paho.golang/packets"
)

// fake is the broker's end of a connection: it says exactly what a test wants.
// Everything it reads after the CONNECT comes out of in.
type fake struct {
	t  *testing.T
	nc net.Conn
	in chan *packets.ControlPacket
}

// faked gives a client whose broker does what script says. Script may return
// while the connection is up; it stays so until the client closes it.
func faked(t *testing.T, cfg Config, script func(*fake)) *Client {
	t.Helper()
	cfg.Dial = func(context.Context) (net.Conn, error) {
		here, there := net.Pipe()
		f := &fake{t: t, nc: there, in: make(chan *packets.ControlPacket, 100_000)}
		go func() {
			if p, err := packets.ReadPacket(there); err != nil || p.Type != packets.CONNECT {
				t.Errorf("want CONNECT, got %v, %v", p, err)
				return
			}
			go func() {
				defer close(f.in)
				for {
					p, err := packets.ReadPacket(there)
					if err != nil {
						return
					}
					f.in <- p
				}
			}()
			script(f)
		}()
		return here, nil
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (f *fake) say(p *packets.ControlPacket) { _, _ = p.WriteTo(f.nc) }

func (f *fake) connack(change ...func(*packets.Connack)) {
	p := packets.NewControlPacket(packets.CONNACK)
	for _, c := range change {
		c(p.Content.(*packets.Connack))
	}
	f.say(p)
}

// suback answers the SUBSCRIBE, which is the next packet.
func (f *fake) suback(codes ...byte) {
	s, ok := (<-f.in).Content.(*packets.Subscribe)
	if !ok {
		f.t.Error("want SUBSCRIBE")
		return
	}
	p := packets.NewControlPacket(packets.SUBACK)
	p.Content.(*packets.Suback).PacketID, p.Content.(*packets.Suback).Reasons = s.PacketID, codes
	f.say(p)
}

func (f *fake) disconnect(code byte, reason string) {
	p := packets.NewControlPacket(packets.DISCONNECT)
	d := p.Content.(*packets.Disconnect)
	d.ReasonCode, d.Properties.ReasonString = code, reason
	f.say(p)
}

// pong answers pings and publishes from now on, as long as live says so, and
// counts the pings.
func (f *fake) pong(live func() bool) *atomic.Int32 {
	var n atomic.Int32
	go func() {
		for p := range f.in {
			switch c := p.Content.(type) {
			case *packets.Pingreq:
				n.Add(1)
				if live() {
					f.say(packets.NewControlPacket(packets.PINGRESP))
				}
			case *packets.Publish:
				if live() && c.QoS == 1 {
					a := packets.NewControlPacket(packets.PUBACK)
					a.Content.(*packets.Puback).PacketID = c.PacketID
					f.say(a)
				}
			}
		}
	}()
	return &n
}

func always() bool { return true }

// start runs one connection; err gets its end.
func start(t *testing.T, c *Client) (stop func(), err <-chan error) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.once(ctx)
		done <- err
	}()
	return cancel, done
}

// What the broker does wrong while the connection is made ends the attempt, as
// soon as it is known and with its reason.
func TestBadBeginnings(t *testing.T) {
	two := []Subscription{{Filter: "a", QoS: 1}, {Filter: "b", QoS: 1}}
	for _, c := range []struct {
		name   string
		subs   []Subscription
		script func(*fake)
		want   string
		within time.Duration
	}{
		{"silence", nil, func(*fake) {}, "no answer within 10s", dialTimeout},
		{"hung up", nil, func(f *fake) { _ = f.nc.Close() }, "hung up without an answer", 0},
		{"half a packet", nil, func(f *fake) {
			_, _ = f.nc.Write([]byte{0x20, 10, 0})
			_ = f.nc.Close()
		}, "connect", 0},
		{"another packet", nil, func(f *fake) { f.say(packets.NewControlPacket(packets.PINGRESP)) }, "unexpected packet", 0},
		{"refused", nil, func(f *fake) {
			f.connack(func(a *packets.Connack) { a.ReasonCode, a.Properties.ReasonString = 0x87, "who are you?" })
		}, "who are you? (0x87)", 0},
		{"refused without words", nil, func(f *fake) {
			f.connack(func(a *packets.Connack) { a.ReasonCode = 0x88 })
		}, "reason code 0x88", 0},
		{"no SUBACK", two, func(f *fake) { f.connack(); f.pong(always) }, "subscribe: no answer within 10s", 10 * time.Second},
		{"hung up before SUBACK", two, func(f *fake) {
			f.connack()
			<-f.in
			_ = f.nc.Close()
		}, "subscribe: EOF", 0},
		{"disconnected before SUBACK", two, func(f *fake) {
			f.connack()
			<-f.in
			f.disconnect(0x97, "enough of you")
		}, "enough of you (0x97)", 0},
		{"too many reason codes", two, func(f *fake) { f.connack(); f.suback(0, 0, 0x87) }, "3 reason codes for 2", 0},
		{"too few reason codes", two, func(f *fake) { f.connack(); f.suback(1) }, "1 reason codes for 2", 0},
		{"the second is refused", two, func(f *fake) { f.connack(); f.suback(1, 0x87) }, "subscribe b: ", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := faked(t, Config{Subscriptions: c.subs, OnUp: func(context.Context) { t.Error("up") }}, c.script)
				began := time.Now()
				_, end := start(t, cl)
				err := <-end
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
				if took := time.Since(began); took != c.within { // the bubble's time
					t.Errorf("took %s, want %s", took, c.within)
				}
			})
		})
	}
}

// A dead link is noticed one and a half keepalives after its last sign of life,
// also where the broker wants no keepalive, or a longer one.
func TestDeadWithin(t *testing.T) {
	const keepAlive = 20 * time.Second
	for _, c := range []struct {
		name   string
		server *uint16
		want   time.Duration
	}{
		{"ours", nil, 30 * time.Second},
		{"none", new(uint16), 30 * time.Second},
		{"longer", ptr(uint16(600)), 30 * time.Second},
		{"shorter", ptr(uint16(10)), 15 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var live atomic.Bool
				live.Store(true)
				var pings *atomic.Int32
				up := make(chan struct{})
				cl := faked(t, Config{KeepAlive: keepAlive, OnUp: func(context.Context) { close(up) }}, func(f *fake) {
					pings = f.pong(live.Load)
					f.connack(func(a *packets.Connack) { a.Properties.ServerKeepAlive = c.server })
				})
				_, end := start(t, cl)
				<-up
				time.Sleep(time.Hour)
				interval := c.want * 2 / 3
				if n := pings.Load(); time.Duration(n) < time.Hour/interval-1 || time.Duration(n) > time.Hour/interval {
					t.Errorf("%d pings in an hour", n)
				}
				// An exchange is the last sign of life.
				time.Sleep(time.Second)
				if err := cl.Publish(t.Context(), Message{Topic: "a", QoS: 1}); err != nil {
					t.Error(err)
				}
				live.Store(false)
				last := time.Now()
				if err := <-end; !errors.Is(err, errNoPong) {
					t.Errorf("got %v", err)
				}
				// It cannot say goodbye, and takes goodbye's time over it at most.
				if took := time.Since(last); took < c.want || took > c.want+goodbye {
					t.Errorf("noticed after %s", took)
				}
			})
		})
	}
}

func ptr[T any](v T) *T { return &v }

// A packet that takes longer than a keepalive to come in is a sign of life all
// the while; and acknowledgements make pings needless.
func TestSignsOfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := make(chan struct{})
		got := make(chan Message, 1000)
		var f *fake
		var pings *atomic.Int32
		cl := faked(t, Config{KeepAlive: 10 * time.Second, OnMessage: func(m Message) { got <- m }, OnUp: func(context.Context) { close(up) }},
			func(b *fake) {
				f = b
				pings = f.pong(func() bool { return false }) // the answers stand behind the large packet
				f.connack()
			})
		stop, end := start(t, cl)
		<-up
		var b bytes.Buffer
		if _, err := publishPacket(&Message{Topic: "a", Payload: make([]byte, 1000), QoS: 1}, 1).WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		for _, x := range b.Bytes() {
			if _, err := f.nc.Write([]byte{x}); err != nil {
				t.Fatalf("given up: %v", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if m := <-got; len(m.Payload) != 1000 {
			t.Errorf("got %+v", m)
		}
		before := pings.Load()
		for i := range 100 {
			f.say(publishPacket(&Message{Topic: "a", QoS: 1}, uint16(i+2)))
			<-got
			time.Sleep(time.Second)
		}
		if n := pings.Load() - before; n > 1 {
			t.Errorf("%d pings beside a message a second", n)
		}
		stop()
		if err := <-end; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A message beyond the broker's limit is refused here: sent, it would end the
// connection, again and again.
func TestTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := make(chan struct{})
		cl := faked(t, Config{OnUp: func(context.Context) { close(up) }}, func(f *fake) {
			f.pong(always)
			f.connack(func(a *packets.Connack) { a.Properties.MaximumPacketSize = ptr(uint32(1000)) })
		})
		stop, end := start(t, cl)
		<-up
		for qos := byte(0); qos <= 1; qos++ {
			m := Message{Topic: "a", QoS: qos}
			m.Payload = make([]byte, 1000)
			m.Payload = m.Payload[:1000-(int(size(&m))-1000)]
			if size(&m) != 1000 {
				t.Fatalf("size %d", size(&m))
			}
			if err := cl.Publish(t.Context(), m); err != nil {
				t.Errorf("at the limit: %v", err)
			}
			m.Payload = append(m.Payload, 0)
			var r *Refused
			if err := cl.Publish(t.Context(), m); !errors.As(err, &r) || r.Code != 0x95 || !strings.Contains(r.Reason, "1001 bytes") {
				t.Errorf("over the limit: %v", err)
			}
		}
		stop()
		if err := <-end; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A broker that acknowledges nothing holds nobody beyond his own patience.
func TestNoAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := make(chan struct{})
		var alive atomic.Bool
		cl := faked(t, Config{OnUp: func(context.Context) { close(up) }}, func(f *fake) {
			go func() {
				for p := range f.in {
					if p.Type == packets.PINGREQ {
						f.say(packets.NewControlPacket(packets.PINGRESP))
					}
				}
			}()
			f.connack(func(a *packets.Connack) { a.Properties.ReceiveMaximum = ptr(uint16(1)) })
			alive.Store(true)
		})
		stop, end := start(t, cl)
		<-up
		first, err := cl.Send(t.Context(), Message{Topic: "a", QoS: 1})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		stuck := make(chan error, 1)
		go func() {
			_, err := cl.Send(context.Background(), Message{Topic: "b", QoS: 1})
			stuck <- err
		}()
		synctest.Wait()
		// One behind the one that is stuck.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := cl.Send(ctx, Message{Topic: "c", QoS: 1}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("got %v after %s", err, time.Since(began))
		}
		if _, err := cl.Send(ctx, Message{Topic: "c"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ended before: %v", err)
		}
		if err := <-stuck; !errors.Is(err, errStuck) || time.Since(began) != 10*time.Second {
			t.Errorf("got %v after %s", err, time.Since(began))
		}
		// The end of the connection frees everybody.
		for range 3 {
			go func() { stuck <- cl.Publish(context.Background(), Message{Topic: "d", QoS: 1}) }()
		}
		synctest.Wait()
		cl.Drop(errors.New("test"))
		for range 3 {
			if err := <-stuck; !errors.Is(err, ErrOffline) && !errors.Is(err, ErrLost) {
				t.Errorf("got %v", err)
			}
		}
		if err := <-first; !errors.Is(err, ErrLost) {
			t.Errorf("got %v", err)
		}
		if err := <-end; err == nil || err.Error() != "test" {
			t.Errorf("got %v", err)
		}
		stop()
	})
}

// OnMessage waits for an answer that never comes while the link dies.
func TestOnMessageOnDeadLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up, got := make(chan struct{}), make(chan error, 1)
		var cl *Client
		cl = faked(t, Config{
			OnUp:      func(context.Context) { close(up) },
			OnMessage: func(Message) { got <- cl.Publish(context.Background(), Message{Topic: "b", QoS: 1}) },
		}, func(f *fake) {
			f.connack()
			<-up
			f.say(publishPacket(&Message{Topic: "a", QoS: 1}, 1))
		})
		_, end := start(t, cl)
		if err := <-got; !errors.Is(err, ErrLost) {
			t.Errorf("got %v", err)
		}
		if err := <-end; !errors.Is(err, errNoPong) {
			t.Errorf("got %v", err)
		}
	})
}

func TestBackoffConfig(t *testing.T) {
	for _, c := range []struct {
		lo, hi, min, max time.Duration
		ok               bool
	}{
		{0, 0, time.Second, 30 * time.Second, true},
		{0, time.Millisecond, time.Millisecond, time.Millisecond, true},
		{time.Millisecond, 0, time.Millisecond, 30 * time.Second, true},
		{-1, 0, 0, 0, false},
		{0, -1, 0, 0, false},
		{time.Minute, 0, 0, 0, false},
	} {
		cl, err := New(Config{URL: "x", MinBackoff: c.lo, MaxBackoff: c.hi})
		if (err == nil) != c.ok || c.ok && (cl.cfg.MinBackoff != c.min || cl.cfg.MaxBackoff != c.max) {
			t.Errorf("%s to %s: %v", c.lo, c.hi, err)
		}
	}
}

// The wait between attempts is a tenth of the outage, jittered, and short again
// after a connection that had been working.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const outage = 20 * time.Minute
		var at []time.Time
		ctx, cancel := context.WithCancel(t.Context())
		var cl *Client
		cl = faked(t, Config{OnUp: func(context.Context) {
			go func() {
				time.Sleep(time.Minute)
				cl.Drop(errors.New("test"))
			}()
		}}, func(f *fake) { f.pong(always); f.connack() })
		dial, began, connected := cl.dial, time.Now(), 0
		cl.dial = func(ctx context.Context) (net.Conn, error) {
			at = append(at, time.Now())
			if time.Since(began) < outage {
				return nil, errors.New("nobody there")
			}
			if connected++; connected == 2 {
				cancel()
				return nil, ctx.Err()
			}
			return dial(ctx)
		}
		if err := cl.Run(ctx); err != nil {
			t.Error(err)
		}
		last := len(at) - 1
		for i, x := range at[:last-1] {
			want := min(max(x.Sub(began)/10, time.Second), 30*time.Second)
			if got := at[i+1].Sub(x); got < want/2 || got > want {
				t.Errorf("%s into the outage it waited %s, want %s to %s", x.Sub(began), got, want/2, want)
			}
		}
		if n := len(at); n < 60 || n > 200 {
			t.Errorf("%d attempts in %s", n, outage)
		}
		if got := at[last].Sub(at[last-1]); got < time.Minute || got > time.Minute+time.Second+goodbye {
			t.Errorf("after a connection of a minute: %s", got-time.Minute)
		}
	})
}
