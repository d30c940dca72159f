package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/pprof"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// server is our broker in a process of its own and nothing else: the cloud of
// the outage figure, and what a profile is taken of.
type server struct {
	dir, addr string
	cloud     bool
	profile   string // file for a CPU profile
	// expect is how many topics of the filter are waited for, to hold a payload
	// that begins with prefix.
	expect         int
	filter, prefix string
}

func serveCommand() *cobra.Command {
	var s server
	c := &cobra.Command{
		Use: "serve --data DIR", Short: "Run the bare broker, to profile it or as the cloud of a node", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context(), os.Stdout) },
	}
	f := c.Flags()
	f.StringVar(&s.dir, "data", "", "folder of the store")
	f.StringVar(&s.addr, "mqtt", "127.0.0.1:1883", "listener")
	f.BoolVar(&s.cloud, "cloud", false, "with the cloud's durability, every client a node of its user name; else the edge's, every client local")
	f.StringVar(&s.profile, "cpuprofile", "", "write a CPU profile to this file, at the end (SIGTERM)")
	f.IntVar(&s.expect, "expect", 0, "tell when so many topics hold what is expected")
	f.StringVar(&s.filter, "filter", "fl/+/reported/twin/#", "the topics expected")
	f.StringVar(&s.prefix, "prefix", "", "what their payload begins with")
	return c
}

func (s *server) run(ctx context.Context, out io.Writer) (err error) {
	if s.dir == "" {
		return errors.New("no data folder: give --data")
	}
	if s.profile != "" {
		f, err := os.Create(s.profile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer func() { pprof.StopCPUProfile(); _ = f.Close() }()
	}
	var joined time.Time // the core's own, as is all that Watch counts
	o := broker.Options{
		Dir: s.dir, Node: node, Durability: broker.EdgeDurability,
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{Role: access.Local}, nil },
		Logger:       slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if s.cloud {
		o.Node, o.Durability = "", broker.CloudDurability
		o.Authenticate = func(ci broker.ConnectInfo) (access.Identity, error) {
			return access.Identity{Role: access.Node, Name: ci.Username}, nil
		}
		o.Presence = func(_ access.Identity, up bool) {
			if up && joined.IsZero() {
				joined = time.Now()
			}
		}
	}
	b, err := broker.Open(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	if s.expect > 0 {
		messages, seen := 0, map[topic.Topic]bool{}
		stop, err := b.Watch(ctx, topic.Filter(s.filter), func(m broker.Message) {
			messages++
			if len(seen) == s.expect || !bytes.HasPrefix(m.Payload, []byte(s.prefix)) {
				return
			}
			if seen[m.Topic] = true; len(seen) == s.expect {
				fmt.Fprintf(out, "replayed %f %d\n", time.Since(joined).Seconds(), messages)
			}
		})
		if err != nil {
			return err
		}
		defer stop()
	}
	at, err := b.Listen(s.addr)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "serving", at)
	<-ctx.Done()
	return nil
}
