package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
	"github.com/fairlead-io/fairlead/tools/stack"
)

// outageFigure is how fast a node brings the cloud up to date after an outage.
func (b *bench) outageFigure(ctx context.Context) error {
	const devices, changes = 500, 2 // of every property during the outage
	port, err := stack.FreePort()
	if err != nil {
		return err
	}
	cloud := fmt.Sprintf("127.0.0.1:%d", port)
	token := filepath.Join(b.dir, "node.token")
	if err := os.WriteFile(token, []byte("any"), 0o600); err != nil {
		return err
	}
	s, err := b.startSite(ctx, devices, "--cloud", "mqtt://"+cloud, "--token-file", token)
	if err != nil {
		return err
	}
	defer s.stop()
	say("outage: %d topics change %d times, then the cloud comes back; %d rounds", len(s.topics), changes, b.pairs)
	var rates, messages, edge, cloudCPU []float64
	for round := range b.pairs {
		if err := b.change(ctx, s, round, changes); err != nil {
			return err
		}
		r, err := b.comeBack(ctx, s, cloud, fmt.Sprintf(`{"v":%d,`, value(round, changes-1)))
		if err != nil {
			return err
		}
		rates = append(rates, float64(len(s.topics))/r.seconds)
		messages, edge, cloudCPU = append(messages, r.messages), append(edge, r.edge/r.seconds), append(cloudCPU, r.cloud/r.seconds)
		say("  %d topics in %.2f s, %.0f messages", len(s.topics), r.seconds, r.messages)
	}
	b.r.add(figure{
		Name: "outage replay of 50,000 changed topics", Unit: "topics/s", Ours: rates, Bound: atLeast(20_000),
		Detail: fmt.Sprintf("from the node's CONNECT until its cloud broker (ours, bare) has all; %s messages for %d changes; edge %.2f + cloud %.2f cores", numbers(messages), len(s.topics)*changes, median(edge), median(cloudCPU)),
	})
	return nil
}

// value is what every property has after a change of a round.
func value(round, change int) int { return 1000 + 100*round + change }

// change changes every property so often, as fast as the node acknowledges.
func (b *bench) change(ctx context.Context, s *site, round, changes int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var n counters
	all := int64(len(s.topics))
	p, err := s.mapper(ctx, &n, func(n int64) string { return strconv.Itoa(value(round, int(n/all))) })
	if err != nil {
		return err
	}
	defer p.c.disconnect()
	p.limit = all * int64(changes)
	if err := p.run(); err != nil {
		return fmt.Errorf("change the readings: %w", err)
	}
	return nil
}

type comeback struct{ seconds, messages, edge, cloud float64 }

// comeBack starts the cloud and waits until it has every topic.
func (b *bench) comeBack(ctx context.Context, s *site, addr, prefix string) (c comeback, err error) {
	dir, err := os.MkdirTemp(b.dir, "cloud-")
	if err != nil {
		return c, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	before, err := machine.CPUOf(s.proc.PID())
	if err != nil {
		return c, err
	}
	p, line, err := b.s.StartTool(ctx, "bench-broker", "replayed ",
		"serve", "--cloud", "--data", dir, "--mqtt", addr, "--expect", strconv.Itoa(len(s.topics)), "--prefix", prefix)
	if err != nil {
		return c, err
	}
	defer p.Kill()
	if _, err := fmt.Sscan(line, &c.seconds, &c.messages); err != nil {
		return c, fmt.Errorf("%q: %w", line, err)
	}
	after, err := machine.CPUOf(s.proc.PID())
	if err != nil {
		return c, err
	}
	c.edge = after - before
	c.cloud, err = machine.CPUOf(p.PID())
	return c, err
}
