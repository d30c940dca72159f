package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

func fileSize(path string) (float64, error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return float64(st.Size()), nil
}

// proxy stands between the node and the cloud and counts what passes, as it
// would on a wire: the bytes, and for every TCP segment 52 bytes of IPv4 and
// TCP headers with timestamps.
type proxy struct {
	l        net.Listener
	upstream string

	mu       sync.Mutex
	current  *net.TCPConn // towards the node
	upBytes  atomic.Int64
	dnBytes  atomic.Int64
	accepted atomic.Int64
}

const headers = 52

func newProxy(upstream string) (*proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{l: l, upstream: upstream}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.carry(c.(*net.TCPConn))
		}
	}()
	return p, nil
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) carry(c *net.TCPConn) {
	_ = c.SetKeepAlive(false) // the probes would be the proxy's, not the node's or the cloud's
	u, err := net.Dial("tcp", p.upstream)
	if err != nil {
		_ = c.Close()
		return
	}
	p.mu.Lock()
	p.current = c
	p.mu.Unlock()
	p.accepted.Add(1)
	done := make(chan struct{}, 2)
	copyTo := func(dst io.Writer, src io.Reader, n *atomic.Int64) {
		_, _ = io.Copy(io.MultiWriter(dst, counter{n}), src)
		done <- struct{}{}
	}
	go copyTo(u, c, &p.upBytes)
	go copyTo(c, u, &p.dnBytes)
	<-done
	_, _ = c.Close(), u.Close()
	<-done
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(b []byte) (int, error) { c.n.Add(int64(len(b))); return len(b), nil }

// cut ends the node's connection, as a router that forgot it would.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current != nil {
		_ = p.current.SetLinger(0)
		_ = p.current.Close()
	}
}

// traffic is what passed so far on the node's side.
type traffic struct{ up, down, segments int64 }

func (t traffic) wire() float64 { return float64(t.up + t.down + t.segments*headers) }

func (p *proxy) traffic() (traffic, error) {
	p.mu.Lock()
	c := p.current
	p.mu.Unlock()
	if c == nil {
		return traffic{}, errors.New("no connection")
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return traffic{}, err
	}
	t := traffic{up: p.upBytes.Load(), down: p.dnBytes.Load()}
	var infoErr error
	err = raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); infoErr == nil {
			t.segments = int64(info.Segs_in) + int64(info.Segs_out)
		}
	})
	return t, errors.Join(err, infoErr)
}

func (b *bench) link(ctx context.Context, st *site) error {
	const minutes = 2
	say("idle link for %d minutes", minutes)
	pause(ctx, 12*time.Second) // status writes and digests of the measurement before
	t0, err := st.proxy.traffic()
	if err != nil {
		return err
	}
	pause(ctx, minutes*time.Minute)
	t1, err := st.proxy.traffic()
	if err != nil {
		return err
	}
	b.r.add("idle link, both ways", (t1.wire()-t0.wire())/minutes, 1000, "B/min",
		"with TCP/IP headers; MQTT alone %.0f up, %.0f down", float64(t1.up-t0.up)/minutes, float64(t1.down-t0.down)/minutes)

	const rounds = 5
	var worst traffic
	say("reconnect in sync, %d rounds", rounds)
	for range rounds {
		n := st.proxy.accepted.Load()
		up, down := st.proxy.upBytes.Load(), st.proxy.dnBytes.Load()
		st.proxy.cut()
		for began := time.Now(); st.proxy.accepted.Load() == n; pause(ctx, 10*time.Millisecond) {
			if time.Since(began) > time.Minute || ctx.Err() != nil {
				return fmt.Errorf("the node did not reconnect within a minute")
			}
		}
		pause(ctx, 5*time.Second)
		t, err := st.proxy.traffic() // the new connection's segments
		if err != nil {
			return err
		}
		t.up, t.down = t.up-up, t.down-down
		if t.wire() > worst.wire() {
			worst = t
		}
	}
	b.r.add("reconnect in sync", worst.wire(), 2000, "B", "worst of %d, with TCP/IP headers; MQTT alone %d up, %d down, %d segments", rounds, worst.up, worst.down, worst.segments)
	return nil
}
