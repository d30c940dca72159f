package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
)

// idleFigure is what an idle client costs the broker.
func (b *bench) idleFigure(ctx context.Context) error {
	const clients, still = 5000, 3 * time.Second
	if err := moreFiles(clients + 1000); err != nil {
		return err
	}
	say("%d idle clients: %d pairs", clients, b.pairs)
	listeners := 0
	us, them, err := inPairs(ctx, b, options{clients: clients}, func(r *running) (float64, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel() // ends the connections
		if r.who == ours {
			listeners = len(r.addrs)
		}
		pause(ctx, still)
		m0, err := machine.MemoryOf(r.proc.PID())
		if err != nil {
			return 0, err
		}
		var g errgroup.Group
		g.SetLimit(32)
		conns := make([]*conn, clients)
		for i := range conns {
			g.Go(func() (err error) {
				conns[i], err = dial(ctx, r.addrs[i%len(r.addrs)], connect{id: fmt.Sprintf("idle-%05d", i), keepalive: 300})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return 0, err
		}
		pause(ctx, still)
		m1, err := machine.MemoryOf(r.proc.PID())
		if err != nil {
			return 0, err
		}
		// A connection that was cut costs nothing and would not count.
		for _, c := range conns {
			_ = c.nc.SetReadDeadline(time.Now().Add(time.Millisecond))
			if err := c.fill(); !isTimeout(err) {
				return 0, fmt.Errorf("an idle client did not stay connected: %w", err)
			}
		}
		each := (m1.PSS - m0.PSS) / clients
		say("  %-9s %.2f kB each: PSS %.1f MB before, %.1f after", r.who, each, m0.PSS/1024, m1.PSS/1024)
		return each, ctx.Err()
	})
	if err != nil {
		return err
	}
	how := "with --max-clients"
	if listeners > 1 {
		how = fmt.Sprintf("over %d listeners, as fairlead-edge has no --max-clients", listeners)
	}
	b.r.add(figure{Name: "idle client, of 5,000", Unit: "kB", Ours: us, Theirs: them, Bound: atMost(12), Detail: "PSS; ours " + how})
	return nil
}
