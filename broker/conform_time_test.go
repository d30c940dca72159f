package broker_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
)

// enter connects over a pipe and tells whether there was a session.
func enter(t *testing.T, b *broker.Broker, v byte, id string, change ...func(*packets.Packet)) (*peer, bool) {
	t.Helper()
	p := newPeer(t, pipe(t, b), v)
	return p, p.welcome(id, change...).SessionPresent
}

// byeWith disconnects and changes the Session Expiry Interval.
func byeWith(seconds uint32) func(*packets.Packet) {
	return func(pk *packets.Packet) {
		pk.Properties.SessionExpiryInterval, pk.Properties.SessionExpiryIntervalFlag = seconds, true
	}
}

const never = 0xffffffff

// [MQTT-3.1.2-23] [MQTT-4.1.0-2]: a session lasts as long as its client said,
// from the end of the connection, and not longer.
func TestConformSessionExpiry(t *testing.T) {
	for _, c := range []struct {
		name  string
		v     byte
		in    func(*packets.Packet)
		out   func(p *peer)
		after time.Duration
		want  bool
	}{
		{"0", 5, lasting(0), (*peer).drop, 0, false},
		{"not said", 5, func(pk *packets.Packet) { pk.Connect.Clean = false }, (*peer).drop, 0, false},
		{"10, after 9", 5, lasting(10), (*peer).drop, 9 * time.Second, true},
		{"10, after 11", 5, lasting(10), (*peer).drop, 11 * time.Second, false},
		{"clean start and 10, after 9", 5, fresh(10), (*peer).drop, 9 * time.Second, true},
		{"never, after 10 years", 5, lasting(never), (*peer).drop, 0, true},
		{"3.1.1, without clean session", 4, resume, (*peer).drop, 24 * time.Hour, true},
		{"3.1.1, clean session", 4, fresh(0), (*peer).drop, 0, false},
		{"10, DISCONNECT says 100, after 99", 5, lasting(10), func(p *peer) { p.bye(0, byeWith(100)) }, 99 * time.Second, true},
		{"10, DISCONNECT says 100, after 101", 5, lasting(10), func(p *peer) { p.bye(0, byeWith(100)) }, 101 * time.Second, false},
		{"100, DISCONNECT says 10, after 11", 5, lasting(100), func(p *peer) { p.bye(0, byeWith(10)) }, 11 * time.Second, false},
		{"100, DISCONNECT says 0", 5, lasting(100), func(p *peer) { p.bye(0, byeWith(0)) }, 0, false},
		{"100, DISCONNECT says nothing, after 99", 5, lasting(100), func(p *peer) { p.bye(0) }, 99 * time.Second, true},
		{"100, DISCONNECT 0x04, after 99", 5, lasting(100), func(p *peer) { p.bye(4) }, 99 * time.Second, true},
		{"10, connected for long", 5, lasting(10), func(p *peer) { time.Sleep(time.Minute); p.drop() }, 9 * time.Second, true},
	} {
		for _, restarted := range []bool{false, true} {
			name := c.name
			if restarted {
				name += ", the broker down meanwhile"
			}
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					fs := vfs.NewCrashableMem()
					b := openMem(t, fs)
					defer func() {
						if err := b.Close(); err != nil {
							t.Error(err)
						}
					}()
					p, _ := enter(t, b, c.v, "c", c.in)
					p.sub("a", 1)
					c.out(p)
					synctest.Wait()
					pub, _ := enter(t, b, 5, "pub")
					pub.pub("a", "x", 1)
					pub.bye(0)
					after := c.after
					if c.name == "never, after 10 years" {
						after = 10 * 365 * 24 * time.Hour
						if !restarted {
							after = 48 * time.Hour // the broker's own clockwork takes its time
						}
					}
					if restarted {
						if err := b.Close(); err != nil {
							t.Fatal(err)
						}
						time.Sleep(after)
						b = openMem(t, fs)
					} else {
						time.Sleep(after)
					}
					p, present := enter(t, b, c.v, "c", resume)
					if present != c.want {
						t.Errorf("session present %v, want %v", present, c.want)
					}
					if c.want {
						p.nextIs("x")
					}
					p.silent()
				})
			})
		}
	}
}

// [MQTT-3.14.2-2]: from 0 in CONNECT there is no way to a session.
func TestConformSessionExpiryFromZero(t *testing.T) {
	bubble(t, func(t *testing.T, b *broker.Broker) {
		watch, _ := enter(t, b, 5, "watch")
		watch.sub("will", 1)
		p, _ := enter(t, b, 5, "c", delayedWill("will", "gone", 0))
		pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}}
		byeWith(10)(&pk)
		p.send(pk)
		p.refused(0x82)
		watch.nextIs("gone") // it was not a normal disconnection
		if _, present := enter(t, b, 5, "c", resume); present {
			t.Error("there is a session")
		}
	})
}

// The Will Delay Interval [MQTT-3.1.3-9] [MQTT-3.1.2-8] [MQTT-3.1.2-10]
// [MQTT-3.14.4-3]: when the Will comes, in seconds after the client went.
func TestConformWillDelay(t *testing.T) {
	const no = -1
	for _, c := range []struct {
		name   string
		expiry uint32
		delay  uint32
		out    func(t *testing.T, b *broker.Broker, p *peer)
		want   int // seconds, or no
	}{
		{"delay 0", 100, 0, hungUp, 0},
		{"delay 10", 100, 10, hungUp, 10},
		{"delay 10, session ends at 5", 5, 10, hungUp, 5},
		{"delay 10, no session", 0, 10, hungUp, 0},
		{"delay 10, session for ever", never, 10, hungUp, 10},
		{"normal disconnection", 100, 10, func(_ *testing.T, _ *broker.Broker, p *peer) { p.bye(0) }, no},
		{"disconnection with Will", 100, 10, func(_ *testing.T, _ *broker.Broker, p *peer) { p.bye(4) }, 10},
		{"disconnection with Will, expiry changed to 5", 100, 10, func(_ *testing.T, _ *broker.Broker, p *peer) { p.bye(4, byeWith(5)) }, 5},
		{"back after 5", 100, 10, func(t *testing.T, b *broker.Broker, p *peer) {
			p.drop()
			time.Sleep(5 * time.Second)
			enter(t, b, 5, "c", resume)
		}, no},
		{"back with a clean start after 5", 100, 10, func(t *testing.T, b *broker.Broker, p *peer) {
			p.drop()
			time.Sleep(5 * time.Second)
			enter(t, b, 5, "c")
		}, 5},
		{"taken over", 100, 10, func(t *testing.T, b *broker.Broker, p *peer) { enter(t, b, 5, "c", resume); p.refused(0x8e) }, no},
		{"taken over, delay 0", 100, 0, func(t *testing.T, b *broker.Broker, p *peer) { enter(t, b, 5, "c", resume); p.refused(0x8e) }, 0},
		{"taken over with a clean start", 100, 10, func(t *testing.T, b *broker.Broker, p *peer) { enter(t, b, 5, "c"); p.refused(0x8e) }, 0},
		{"protocol error", 100, 10, func(_ *testing.T, _ *broker.Broker, p *peer) { p.write([]byte{0xf0, 0}); p.gone() }, 10},
		{"back, then lost again", 100, 10, func(t *testing.T, b *broker.Broker, p *peer) {
			p.drop()
			time.Sleep(5 * time.Second)
			p, _ = enter(t, b, 5, "c", resume, delayedWill("will", "gone", 3))
			p.drop()
		}, 8},
		{"keepalive", 100, 10, func(*testing.T, *broker.Broker, *peer) {}, 15 + 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, b *broker.Broker) {
				watch, _ := enter(t, b, 5, "watch")
				watch.wait = time.Hour
				watch.sub("will", 2)
				p, _ := enter(t, b, 5, "c", lasting(c.expiry), delayedWill("will", "gone", c.delay), func(pk *packets.Packet) {
					pk.Connect.WillQos, pk.Connect.WillRetain = 2, true
					pk.Connect.WillProperties.ContentType, pk.Connect.WillProperties.User = "text/plain", []packets.UserProperty{{Key: "k", Val: "v"}}
					pk.Connect.WillProperties.MessageExpiryInterval = 50
					if c.name == "keepalive" {
						pk.Connect.Keepalive = 10
					}
				})
				began := time.Now()
				c.out(t, b, p)
				if c.want == no {
					time.Sleep(10 * time.Minute)
					watch.silent()
					if _, ok := b.Retained("will"); ok {
						t.Error("it is retained")
					}
					return
				}
				m := watch.nextIs("gone")
				// In this time every second is exact; a broker may be late by less than one.
				if after := time.Since(began); after < time.Duration(c.want)*time.Second || after >= time.Duration(c.want+1)*time.Second {
					t.Errorf("it came after %v, want %d s", after, c.want)
				}
				if c.name != "back, then lost again" && (m.FixedHeader.Qos != 2 || m.Properties.ContentType != "text/plain" || len(m.Properties.User) != 1 ||
					m.Properties.MessageExpiryInterval == 0 || m.Properties.WillDelayInterval != 0) {
					t.Errorf("got QoS %d, %+v", m.FixedHeader.Qos, m.Properties)
				}
				time.Sleep(10 * time.Minute)
				watch.silent() // once
			})
		})
	}
}

func hungUp(_ *testing.T, _ *broker.Broker, p *peer) { p.drop() }

// A Will with a delay, and the session that it belongs to, outlive the broker:
// after a restart the Will comes unless its client does.
func TestConformWillDelayAcross(t *testing.T) {
	for _, comes := range []bool{false, true} {
		for _, crash := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				fs := vfs.NewCrashableMem()
				b := openMem(t, fs)
				p, _ := enter(t, b, 5, "c", resume, delayedWill("will", "gone", 60))
				p.ping()
				if crash {
					disk := fs.CrashClone(vfs.CrashCloneCfg{}) // power is cut while the client is connected
					p.drop()
					if err := b.Close(); err != nil {
						t.Fatal(err)
					}
					fs = disk
				} else {
					p.drop()
					synctest.Wait()
					if err := b.Close(); err != nil {
						t.Fatal(err)
					}
				}
				b = openMem(t, fs)
				defer func() {
					if err := b.Close(); err != nil {
						t.Error(err)
					}
				}()
				watch, _ := enter(t, b, 5, "watch", resume)
				watch.wait = time.Hour
				watch.sub("will", 1)
				if comes {
					if _, present := enter(t, b, 5, "c", resume); !present {
						t.Error("the session is gone")
					}
					time.Sleep(2 * time.Minute)
					watch.silent()
				} else {
					watch.nextIs("gone")
				}
			})
		}
	}
}
