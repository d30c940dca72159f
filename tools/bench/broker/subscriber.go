package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"
)

// subscriber takes all messages of a filter and acknowledges them at once.
type subscriber struct {
	addr, filter string
	publishers   int
	qos          byte
	persistent   bool
	n            *counters
	next         []int64 // of each publisher

	id     string
	mu     sync.Mutex
	c      *conn // guarded by mu
	closed bool  // guarded by mu

	once       sync.Once
	subscribed chan struct{} // closed once the first SUBACK came

	cut    int
	cutFor string
}

func (s *subscriber) connect(ctx context.Context) error {
	if s.id == "" {
		s.id = clientID("sub")
		s.next = make([]int64, s.publishers)
	}
	o := connect{id: s.id}
	if s.persistent {
		o.resume, o.expiry = true, 300
	}
	c, err := dial(ctx, s.addr, o)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.c = c
	s.mu.Unlock()
	if !c.present {
		c.out = appendSubscribe(c.out, s.filter, s.qos|noRetained) // take sends it
	}
	return nil
}

// run takes messages until close. When the broker cuts it off it connects again.
func (s *subscriber) run(ctx context.Context) error {
	for {
		err := s.take()
		s.mu.Lock()
		closed := s.closed
		s.mu.Unlock()
		if closed {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if s.cut++; s.cut > 1000 {
			return fmt.Errorf("subscriber cut off %d times: %w", s.cut, err)
		}
		s.cutFor = err.Error()
		_ = s.c.nc.Close()
		if err := s.connect(ctx); err != nil {
			return fmt.Errorf("subscriber cut off (%s), again: %w", s.cutFor, err)
		}
	}
}

func (s *subscriber) take() error {
	c := s.c
	for {
		got := int64(0)
		for {
			p, ok, err := c.next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if p.typ() == typeSuback { // messages may come before it
				if err := suback(p); err != nil {
					return err
				}
				s.once.Do(func() { close(s.subscribed) })
			}
			if p.typ() != typePublish {
				if err := c.ended(p); err != nil {
					return err
				}
				continue
			}
			_, payload, id, err := parsePublish(p)
			if err != nil {
				return err
			}
			if id != 0 {
				c.out = appendPuback(c.out, id)
			}
			if len(payload) < numbered || int(binary.BigEndian.Uint16(payload)) >= len(s.next) {
				return errors.New("a message that is not of this load: is another one running?")
			}
			next := &s.next[binary.BigEndian.Uint16(payload)]
			if k := int64(binary.BigEndian.Uint64(payload[2:])); k >= *next {
				*next = k + 1
				got++
			} else {
				s.n.again.Add(1)
			}
		}
		s.n.delivered.Add(got)
		if err := c.flush(); err != nil {
			return err
		}
		if err := c.fill(); err != nil {
			return err
		}
	}
}

// drain waits until the subscriber has want messages, or nothing comes for two
// seconds; it gives how many are missing.
func (s *subscriber) drain(ctx context.Context, want int64) int64 {
	last, since := s.n.delivered.Load(), time.Now()
	for {
		got := s.n.delivered.Load()
		if got >= want || ctx.Err() != nil {
			return max(0, want-got)
		}
		if got != last {
			last, since = got, time.Now()
		}
		if time.Since(since) > 2*time.Second {
			return want - got
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (s *subscriber) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.c.disconnect()
}
