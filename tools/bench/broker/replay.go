package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// publishAll publishes to each topic once, retained.
func publishAll(ctx context.Context, addr string, topics []string, publishers int) error {
	done := make(chan error, publishers)
	var n counters
	for i := range publishers {
		part := topics[i*len(topics)/publishers : (i+1)*len(topics)/publishers]
		p := &publisher{n: &n, window: 64, topics: part, limit: int64(len(part)), retain: true, payload: payloadOf(i, 64)}
		go func() {
			err := p.connect(ctx, addr, connect{id: clientID("pub")})
			if err == nil {
				err = p.run()
				p.c.disconnect()
			}
			done <- err
		}()
	}
	var errs error
	for range publishers {
		errs = errors.Join(errs, <-done)
	}
	return errs
}

// replayTimeout is for a broker that stops in between.
const replayTimeout = 30 * time.Second

// replayed is how long a new subscription to everything takes to get want
// retained messages, in s.
func replayed(ctx context.Context, addr string, qos byte, want int) (float64, error) {
	c, err := dial(ctx, addr, connect{id: clientID("sub")})
	if err != nil {
		return 0, err
	}
	defer c.disconnect()
	_ = c.nc.SetDeadline(time.Now().Add(replayTimeout))
	c.out = appendSubscribe(c.out, "#", qos)
	root := []byte(topicRoot)
	got, began := 0, time.Now()
	for {
		if err := c.flush(); err != nil {
			return 0, err
		}
		if err := c.fill(); err != nil {
			return 0, fmt.Errorf("%d of %d retained messages came: %w", got, want, err)
		}
		for {
			p, ok, err := c.next()
			if err != nil {
				return 0, err
			}
			if !ok {
				break
			}
			if p.typ() != typePublish {
				if err := c.ended(p); err != nil {
					return 0, fmt.Errorf("%d of %d retained messages came: %w", got, want, err)
				}
				continue
			}
			topic, _, id, err := parsePublish(p)
			if err != nil {
				return 0, err
			}
			if id != 0 {
				c.out = appendPuback(c.out, id)
			}
			if bytes.HasPrefix(topic, root) { // a broker has topics of its own as well
				got++
			}
		}
		if got >= want {
			return time.Since(began).Seconds(), c.flush()
		}
	}
}

// replayFigure is how fast a subscription gets many retained messages.
func (b *bench) replayFigure(ctx context.Context) error {
	return b.replay(ctx, 1, ratio(false, 1.5))
}

func (b *bench) replay0Figure(ctx context.Context) error { return b.replay(ctx, 0, nil) }

func (b *bench) replay(ctx context.Context, qos byte, bd *bound) error {
	const topics = 100_000
	say("%d retained topics, replayed with QoS %d: %d pairs", topics, qos, b.pairs)
	all := retainedTopics(topics)
	us, them, err := inPairs(ctx, b, options{}, func(r *running) (float64, error) {
		if err := publishAll(ctx, r.addr(), all, 10); err != nil {
			return 0, err
		}
		pause(ctx, settle)
		s, err := replayed(ctx, r.addr(), qos, topics)
		if err == nil {
			say("  %-9s %.2f s", r.who, s)
		}
		return s, err
	})
	if err != nil {
		return err
	}
	b.r.add(figure{Name: fmt.Sprintf("replay of 100,000 retained topics, QoS %d", qos), Unit: "s", Ours: us, Theirs: them, Bound: bd})
	return nil
}
