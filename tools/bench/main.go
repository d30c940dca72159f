package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
	"github.com/fairlead-io/fairlead/tools/stack"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// figure is one line of the result.
type figure struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"`
	Bound  float64 `json:"bound,omitempty"` // 0 where the figure has none
	Unit   string  `json:"unit"`
	Detail string  `json:"detail,omitempty"`
}

// report collects figures.
type report struct {
	Machine machine.Machine `json:"machine"`
	Date    string          `json:"date"`
	Figures []figure        `json:"figures"`
}

func (r *report) add(name string, value, bound float64, unit, detail string, args ...any) {
	f := figure{Name: name, Value: value, Bound: bound, Unit: unit, Detail: fmt.Sprintf(detail, args...)}
	r.Figures = append(r.Figures, f)
	say("  %s", f)
}

func (f figure) String() string {
	s := fmt.Sprintf("%-46s %9.4g %-6s", f.Name, f.Value, f.Unit)
	if f.Bound > 0 {
		s += fmt.Sprintf(" (bound %g, ratio %.2f)", f.Bound, f.Value/f.Bound)
	}
	if f.Detail != "" {
		s += "  " + f.Detail
	}
	return s
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

type bench struct {
	s    *stack.Stack
	r    *report
	n    int
	edge *stack.Edge
}

func run(ctx context.Context, args []string) (err error) {
	var bin, dir, out string
	var only []string
	b := &bench{r: &report{Machine: machine.Describe(), Date: time.Now().UTC().Format("2006-01-02")}}
	fs := pflag.NewFlagSet("bench", pflag.ContinueOnError)
	fs.StringVar(&bin, "bin", "bin", "folder of the binaries that the task build makes")
	fs.StringVar(&dir, "dir", "", "data folder; a temporary one by default")
	fs.StringVar(&out, "output", "text", "text or json")
	fs.StringSliceVar(&only, "only", nil, "start, memory, latency, link")
	fs.IntVar(&b.n, "n", 200, "samples of each latency")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return nil
		}
		return err
	}
	want := func(name string) bool { return len(only) == 0 || slices.Contains(only, name) }
	if dir == "" {
		if dir, err = os.MkdirTemp("", "fairlead-bench-"); err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
	}
	repo, err := filepath.Abs(".")
	if err != nil {
		return err
	}
	if b.s, err = stack.New(stack.Config{Bin: bin, Dir: dir, Repo: repo}); err != nil {
		return err
	}
	defer b.s.Stop()
	say("%s, %s", b.r.Machine, b.r.Date)
	if want("start") {
		if err := b.start(ctx); err != nil {
			return fmt.Errorf("start: %w", err)
		}
	}
	if want("memory") || want("latency") || want("link") {
		say("starting the control plane, the cloud, a node, a mapper and a slave")
		site, err := b.site(ctx)
		if err != nil {
			return err
		}
		defer site.slave.Kill()
		if want("latency") {
			if err := b.latency(ctx, site); err != nil {
				return fmt.Errorf("latency: %w", err)
			}
		}
		if want("memory") {
			if err := b.memory(ctx, bin); err != nil {
				return fmt.Errorf("memory: %w", err)
			}
		}
		if want("link") {
			if err := b.link(ctx, site); err != nil {
				return fmt.Errorf("link: %w", err)
			}
		}
	}
	if out == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(b.r)
	}
	fmt.Printf("%s, %s\n", b.r.Machine, b.r.Date)
	for _, f := range b.r.Figures {
		fmt.Println(f)
	}
	return nil
}

// quantile of sorted samples, in milliseconds.
func quantile(d []time.Duration, q float64) float64 {
	slices.Sort(d)
	i := min(int(q*float64(len(d))), len(d)-1)
	return float64(d[i].Microseconds()) / 1000
}
