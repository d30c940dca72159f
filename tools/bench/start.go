package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// start measures how long an agent with 1,000 retained topics takes from exec
// until a client's CONNECT is answered.
func (b *bench) start(ctx context.Context) error {
	const topics, rounds = 1000, 15
	say("agent start with %d retained topics, %d rounds", topics, rounds)
	port, err := stackPort()
	if err != nil {
		return err
	}
	dir := filepath.Join(b.s.Dir, "start")
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	launch := func() (*exec.Cmd, time.Duration, error) {
		cmd := exec.CommandContext(ctx, filepath.Join(b.s.Bin, "fairlead-edge"), "run", "--node", "bench", "--data", dir, "--mqtt", addr, "--log-level", "error")
		cmd.Stderr = os.Stderr
		cmd.Cancel = func() error { return cmd.Process.Kill() }
		began := time.Now()
		if err := cmd.Start(); err != nil {
			return nil, 0, err
		}
		for time.Since(began) < 20*time.Second {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				time.Sleep(200 * time.Microsecond)
				continue
			}
			_ = c.Close()
			if err := probe(ctx, addr); err != nil {
				return cmd, 0, err
			}
			return cmd, time.Since(began), nil
		}
		return cmd, 0, fmt.Errorf("the bus does not serve at %s", addr)
	}
	end := func(cmd *exec.Cmd) { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	cmd, _, err := launch()
	if err != nil {
		return err
	}
	err = withClient(ctx, client.Config{URL: addr, ClientID: "seed"}, func(c *client.Client) error {
		payload := []byte(strings.Repeat("x", 200))
		var acks []<-chan error
		for i := range topics {
			ack, err := c.Send(ctx, client.Message{Topic: topic.Topic(fmt.Sprintf("bench/%04d", i)), Payload: payload, QoS: 1, Retain: true})
			if err != nil {
				return err
			}
			acks = append(acks, ack)
		}
		for _, a := range acks {
			if err := <-a; err != nil {
				return err
			}
		}
		return nil
	})
	end(cmd) // killed: the start recovers from the log, the worse case
	if err != nil {
		return err
	}
	var took []time.Duration
	for range rounds {
		cmd, d, err := launch()
		if cmd != nil {
			end(cmd)
		}
		if err != nil {
			return err
		}
		took = append(took, d)
	}
	b.r.add("agent start, 1,000 retained topics", quantile(took, 0.5), 300, "ms", "p50 of %d starts after kill -9, exec to CONNACK; max %.0f ms", rounds, quantile(took, 1))
	return nil
}

// probe makes one MQTT connection.
func probe(ctx context.Context, addr string) error {
	return withClient(ctx, client.Config{URL: addr, ClientID: "probe"}, func(*client.Client) error { return nil })
}

// withClient runs fn with a connected client.
func withClient(ctx context.Context, cfg client.Config, fn func(*client.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	up := make(chan struct{}, 1)
	cfg.OnUp = func(context.Context) { up <- struct{}{} }
	c, err := client.New(cfg)
	if err != nil {
		return err
	}
	cctx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- c.Run(cctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			say("client of %s: %v", cfg.URL, err)
		}
	}()
	select {
	case <-up:
		return fn(c)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", cfg.URL, ctx.Err())
	}
}
