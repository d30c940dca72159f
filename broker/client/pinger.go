package client

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho/log"
)

var errNoPong = errors.New("no answer to a ping within half the keepalive: the link is dead")

// pinger asks for a sign of life after a keepalive without traffic in one of
// the directions, and gives up half a keepalive later. paho's own gives up after
// two keepalives. Its clock is the monotonic one: a node without a battery
// sets its wall clock when the link is up already.
type pinger struct {
	began time.Time
	own   time.Duration // the interval, unless the broker wants a shorter one; 0 is the broker's

	sent, received atomic.Int64 // of the last sign, since began
	dead           atomic.Bool  // it gave up: whatever else is said of the connection's end follows from that
}

func newPinger(own time.Duration) *pinger { return &pinger{began: time.Now(), own: own} }

// Run implements paho.Pinger.
func (p *pinger) Run(ctx context.Context, conn net.Conn, keepAlive uint16) error {
	// More pings than the broker asks for are always allowed, and a broker that
	// wants none leaves the dead link to us.
	interval := p.own
	if k := time.Duration(keepAlive) * time.Second; k > 0 && (interval == 0 || k < interval) {
		interval = k
	}
	if interval == 0 {
		return nil
	}
	p.PacketSent()
	p.PacketReceived()
	failed := make(chan error, 1)
	timer := time.NewTimer(interval)
	defer timer.Stop()
	asked := time.Duration(-1) // when, since began
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-timer.C:
			now, received := time.Since(p.began), time.Duration(p.received.Load())
			if asked >= 0 && received < asked {
				p.dead.Store(true)
				return errNoPong
			}
			asked = -1
			idle := min(time.Duration(p.sent.Load()), received)
			if due := idle + interval; now < due {
				timer.Reset(due - now)
				continue
			}
			asked = now
			// A full send buffer blocks the write; closing the connection frees it.
			go func() {
				if _, err := packets.NewControlPacket(packets.PINGREQ).WriteTo(conn); err != nil {
					select {
					case failed <- err:
					default:
					}
				}
			}()
			p.PacketSent()
			timer.Reset(interval / 2)
		}
	}
}

// PacketSent implements paho.Pinger.
func (p *pinger) PacketSent() { p.sent.Store(int64(time.Since(p.began))) }

// PacketReceived implements paho.Pinger.
func (p *pinger) PacketReceived() { p.received.Store(int64(time.Since(p.began))) }

// PingResp implements paho.Pinger.
func (p *pinger) PingResp() { p.PacketReceived() }

// SetDebug implements paho.Pinger.
func (p *pinger) SetDebug(log.Logger) {}
