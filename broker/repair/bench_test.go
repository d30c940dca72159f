package repair_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// BenchmarkOutage replays topics that changed during an outage over TCP on the
// loopback to a broker with the cloud's durability; one operation is one topic
// with its PUBACK. The target is 20,000 topics a second, 50 µs each.
func BenchmarkOutage(b *testing.B) {
	cloud, err := broker.Open(broker.Options{
		Dir: b.TempDir(), Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username != plant {
				return access.Identity{}, errors.New("unknown")
			}
			return access.Identity{Role: access.Node, Name: plant}, nil
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = cloud.Close() }()
	addr, err := cloud.Listen("127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var round atomic.Int64
	out := repair.NewOutbox(repair.OutboxConfig{Direction: topic.Reported, Epoch: "e", Logger: slog.New(slog.DiscardHandler), Get: func(topic.Topic) ([]byte, bool) {
		return fmt.Appendf(nil, `{"v":%d.5,"t":1790000000123}`, round.Load()), true
	}})
	up := make(chan context.Context, 1)
	c, err := client.New(client.Config{URL: addr, ClientID: "edge", Username: plant, OnUp: func(ctx context.Context) { up <- ctx }})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = c.Run(ctx) })
	conn := <-up
	const topics = 10_000
	for left := b.N; left > 0; left -= topics {
		b.StopTimer()
		round.Add(1)
		runCtx, end := context.WithCancel(conn)
		s := &acked{Sender: c, left: int64(min(left, topics)), done: end}
		for i := range min(left, topics) {
			out.Touch(topic.ReportedTwin(plant, "default", fmt.Sprintf("pump-%d", i/100), fmt.Sprintf("p%d", i%100)))
		}
		b.StartTimer()
		_ = out.Run(runCtx, s)
		end()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "topics/s")
}

// acked ends a Run when as many topics as were expected are acknowledged.
type acked struct {
	repair.Sender
	left int64
	done func()
}

func (a *acked) Send(ctx context.Context, m client.Message) (<-chan error, error) {
	ack, err := a.Sender.Send(ctx, m)
	if err == nil && m.Retain && m.Topic != topic.ReportedDigest(plant) {
		if a.left--; a.left == 0 {
			err = <-ack // answers come in order
			a.done()
		}
	}
	return ack, err
}
