package client

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// peer answers the first n pings.
func peer(c net.Conn, n int, p *pinger, asked chan<- time.Time) {
	buf := make([]byte, 2)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
		asked <- time.Now()
		if n > 0 {
			n--
			p.PingResp()
		}
	}
}

func TestPinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const keepAlive = 20 * time.Second
		here, there := net.Pipe()
		p := newPinger(0)
		asked := make(chan time.Time, 100)
		go peer(there, 3, p, asked)
		began := time.Now()
		err := p.Run(t.Context(), here, uint16(keepAlive/time.Second))
		if !errors.Is(err, errNoPong) {
			t.Errorf("got %v", err)
		}
		// Asked after every keepalive of silence; the fourth is not answered.
		for i := 1; i <= 4; i++ {
			if at := (<-asked).Sub(began); at != time.Duration(i)*keepAlive {
				t.Errorf("ping %d after %s", i, at)
			}
		}
		// Dead one and a half keepalives after the last sign of life.
		if at := time.Since(began); at != 3*keepAlive+keepAlive*3/2 {
			t.Errorf("given up after %s", at)
		}
		_, _ = here.Close(), there.Close()
		synctest.Wait()
	})
}

// Traffic both ways needs no pings; traffic one way alone does.
func TestPingerTraffic(t *testing.T) {
	for _, c := range []struct {
		name           string
		sent, received bool
		pings          bool
	}{{"both", true, true, false}, {"sent", true, false, true}, {"received", false, true, true}} {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			p := newPinger(0)
			asked := make(chan time.Time, 100)
			go peer(there, 100, p, asked)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- p.Run(ctx, here, 10) }()
			for range 50 {
				time.Sleep(3 * time.Second) // the bubble's time
				if c.sent {
					p.PacketSent()
				}
				if c.received {
					p.PacketReceived()
				}
			}
			cancel()
			if err := <-done; err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			if got := len(asked) > 0; got != c.pings {
				t.Errorf("%s: %d pings", c.name, len(asked))
			}
			_, _ = here.Close(), there.Close()
			synctest.Wait()
		})
	}
}

// A ping that the link does not take is no answer either.
func TestPingerFullLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe() // nobody reads
		began := time.Now()
		if err := newPinger(0).Run(t.Context(), here, 10); !errors.Is(err, errNoPong) || time.Since(began) != 15*time.Second {
			t.Errorf("got %v after %s", err, time.Since(began))
		}
		_, _ = here.Close(), there.Close()
		synctest.Wait()
		if err := newPinger(0).Run(t.Context(), here, 0); err != nil {
			t.Errorf("no keepalive: %v", err)
		}
	})
}
