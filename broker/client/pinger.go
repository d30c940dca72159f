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

// pinger asks for a sign of life after a keepalive without traffic in either
// direction, and gives up half a keepalive later. paho's own gives up after two
// keepalives.
type pinger struct {
	sent, received atomic.Int64 // UnixNano of the last packet
}

// Run implements paho.Pinger.
func (p *pinger) Run(ctx context.Context, conn net.Conn, keepAlive uint16) error {
	if keepAlive == 0 {
		return nil
	}
	interval := time.Duration(keepAlive) * time.Second
	now := time.Now().UnixNano()
	p.sent.Store(now)
	p.received.Store(now)
	failed := make(chan error, 1)
	timer := time.NewTimer(interval)
	defer timer.Stop()
	var asked time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case now := <-timer.C:
			received := time.Unix(0, p.received.Load())
			if !asked.IsZero() && received.Before(asked) {
				return errNoPong
			}
			asked = time.Time{}
			idle := min(p.sent.Load(), p.received.Load())
			if due := time.Unix(0, idle).Add(interval); now.Before(due) {
				timer.Reset(due.Sub(now))
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
func (p *pinger) PacketSent() { p.sent.Store(time.Now().UnixNano()) }

// PacketReceived implements paho.Pinger.
func (p *pinger) PacketReceived() { p.received.Store(time.Now().UnixNano()) }

// PingResp implements paho.Pinger.
func (p *pinger) PingResp() { p.PacketReceived() }

// SetDebug implements paho.Pinger.
func (p *pinger) SetDebug(log.Logger) {}
