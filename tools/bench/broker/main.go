package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
	"github.com/fairlead-io/fairlead/tools/stack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-broker:", err)
		os.Exit(1)
	}
}

// quiet makes the generator cheap: with one thread a batch of packets is one
// wake-up, and the broker has the other core.
func quiet() { runtime.GOMAXPROCS(1) }

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

type bench struct {
	s         *stack.Stack
	r         *report
	dir       string
	mosquitto string // its program; empty for none
	pairs     int
	measure   time.Duration
	flash     time.Duration
	// checkpoint of the node in the flash figure.
	checkpoint time.Duration
	peak       float64 // mosquitto's, of the first figure
}

// parts are the figures, in the order of the issue.
var parts = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"durable", (*bench).durableFigure},
	{"clean", (*bench).cleanFigure},
	{"single", (*bench).singleFigure},
	{"retained", (*bench).retainedFigure},
	{"retained-alone", (*bench).retainedAloneFigure},
	{"latency", (*bench).latencyFigure},
	{"idle", (*bench).idleFigure},
	{"replay", (*bench).replayFigure},
	{"replay-qos0", (*bench).replay0Figure},
	{"outage", (*bench).outageFigure},
	{"flash", (*bench).flashFigure},
	{"compressed", (*bench).compressedFigure},
}

func partNames() (names []string) {
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

func command() *cobra.Command {
	var bin, output string
	var only []string
	b := &bench{}
	c := &cobra.Command{
		Use: "bench-broker", Short: "Measure the broker beside mosquitto", SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			quiet()
			for _, o := range only {
				if !slices.Contains(partNames(), o) {
					return fmt.Errorf("--only %s: want one of %s", o, strings.Join(partNames(), ", "))
				}
			}
			return b.run(cmd.Context(), bin, only, output)
		},
	}
	f := c.Flags()
	f.StringVar(&bin, "bin", "bin", "folder of the binaries that the task build makes")
	f.StringVar(&b.dir, "dir", "", "data folder, on a disk; a temporary one by default")
	f.StringVar(&output, "output", "text", "text or json")
	f.StringSliceVar(&only, "only", nil, strings.Join(partNames(), ", "))
	f.IntVar(&b.pairs, "pairs", 3, "runs of each broker, in pairs")
	f.DurationVar(&b.measure, "measure", 5*time.Second, "what is measured of each run under load")
	f.DurationVar(&b.flash, "flash", 3*time.Minute, "how long the writes of 500 changes a second are measured; a multiple of the checkpoint")
	f.DurationVar(&b.checkpoint, "checkpoint", time.Minute, "the node's checkpoint while they are; from 10s on each writes every property, so that a shorter one shows more of an hour's compactions")
	c.AddCommand(loadCommand(), serveCommand())
	return c
}

func (b *bench) run(ctx context.Context, bin string, only []string, output string) (err error) {
	b.r = &report{Machine: machine.Describe(), Date: time.Now().UTC().Format("2006-01-02")}
	if b.mosquitto, b.r.Mosquitto = findMosquitto(); b.mosquitto == "" {
		say("SKIP the comparison with mosquitto: it is missing (apt-get install mosquitto)")
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	for _, p := range []string{"fairlead-edge", "bench-broker"} {
		if _, err := os.Stat(filepath.Join(bin, p)); err != nil {
			return fmt.Errorf("%w; build it with `go tool task bench:broker`", err)
		}
	}
	// A folder of our own even below --dir: it is removed.
	if b.dir, err = os.MkdirTemp(b.dir, "fairlead-bench-broker-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.dir) }()
	if err := onDisk(b.dir); err != nil {
		return err
	}
	b.s = &stack.Stack{Config: stack.Config{Bin: bin, Dir: b.dir}}
	if err := os.Mkdir(filepath.Join(b.dir, "log"), 0o700); err != nil {
		return err
	}
	defer b.s.Stop()
	say("%s, %s, mosquitto %s", b.r.Machine, b.r.Date, b.r.Mosquitto)
	for _, p := range parts {
		if len(only) > 0 && !slices.Contains(only, p.name) {
			continue
		}
		if err := p.run(b, ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// The others are worth having.
			say("  FAILED %s: %v", p.name, err)
			b.r.Failed = append(b.r.Failed, fmt.Sprintf("%s: %v", p.name, err))
		}
	}
	if output == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		err = e.Encode(b.r)
	} else {
		b.r.print(os.Stdout)
	}
	if n := len(b.r.Failed); n > 0 {
		err = errors.Join(err, fmt.Errorf("%d of the figures could not be measured: see FAILED above", n))
	}
	return err
}

func loadCommand() *cobra.Command {
	var l load
	var seconds, warmup float64
	var persistent, none bool
	var output string
	c := &cobra.Command{
		Use: "load --addr HOST:PORT", Short: "Put one load on any running broker", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			quiet()
			l.Measure, l.Warmup = time.Duration(seconds*float64(time.Second)), time.Duration(warmup*float64(time.Second))
			l.Subscriber = "clean"
			if persistent {
				l.Subscriber = "persistent"
			}
			if none {
				l.Subscriber = "none"
			}
			r, err := l.run(cmd.Context())
			if err != nil {
				return err
			}
			if output == "json" {
				return json.NewEncoder(os.Stdout).Encode(r)
			}
			fmt.Println(r)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&l.Addr, "addr", "127.0.0.1:1883", "the broker")
	f.IntVar(&l.Publishers, "publishers", 10, "publishers")
	f.IntVar(&l.Window, "window", 64, "publishes of each that wait for their PUBACK")
	f.Float64Var(&seconds, "seconds", 5, "how long to measure")
	f.Float64Var(&warmup, "warmup", 1, "seconds before")
	f.IntVar(&l.Payload, "payload", 64, "payload, B")
	f.IntVar(&l.Retained, "retained", 0, "publish retained, cycling over this many topics")
	f.BoolVar(&persistent, "persistent", false, "the subscriber has a persistent session")
	f.BoolVar(&none, "no-subscriber", false, "publish only")
	f.Float64Var(&l.Rate, "rate", 0, "publishes per second of all publishers, sent every millisecond, latency from the intended time; 0 is as fast as acknowledged")
	f.IntVar(&l.Broker, "pid", 0, "the broker's process, to tell its CPU time")
	f.StringVar(&output, "output", "text", "text or json")
	return c
}
