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
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-pods:", err)
		os.Exit(1)
	}
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

type bench struct {
	s    *stack.Stack
	kube kubernetes.Interface
	r    report
	n    int // samples of create → Running
	pods int // of the other figures
	idle time.Duration

	edge  *stack.Edge
	stock *stack.Kubelet
}

// parts are the figures, in the order of the issue.
var parts = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"create", (*bench).create},
	{"idle", (*bench).idleFigures},
	{"restart", (*bench).restart},
	{"restore", (*bench).restore},
	{"return", (*bench).cloudReturns},
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
		Use: "bench-pods", Short: "Measure pods at the edge beside the stock kubelet", SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, o := range only {
				if !slices.Contains(partNames(), o) {
					return fmt.Errorf("--only %s: want one of %s", o, strings.Join(partNames(), ", "))
				}
			}
			return b.run(cmd.Context(), bin, only, output)
		},
	}
	f := c.Flags()
	f.StringVar(&bin, "bin", "bin", "folder of the binaries that the task bench:pods makes")
	f.StringVar(&output, "output", "text", "text or json")
	f.StringSliceVar(&only, "only", nil, strings.Join(partNames(), ", "))
	f.IntVar(&b.n, "samples", 20, "pods that each node creates, in turn")
	f.IntVar(&b.pods, "pods", 20, "running pods of the other figures")
	f.DurationVar(&b.idle, "idle", time.Minute, "how long the CPU time of the idle node is measured")
	return c
}

func (b *bench) run(ctx context.Context, bin string, only []string, output string) (err error) {
	b.r = report{Machine: machine.Describe(), Date: time.Now().UTC().Format("2006-01-02")}
	if err := testruntime.Missing(); err != nil {
		return err
	}
	kubelet, err := filepath.Abs(filepath.Join(bin, "kubelet"))
	if err != nil {
		return err
	}
	if _, err := os.Stat(kubelet); err != nil {
		return fmt.Errorf("%w; build it with `go tool task bench:pods`", err)
	}
	dir, err := os.MkdirTemp("", "fairlead-bench-pods-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	repo, err := filepath.Abs(".")
	if err != nil {
		return err
	}
	if b.s, err = stack.New(stack.Config{Bin: bin, Dir: dir, Repo: repo}); err != nil {
		return err
	}
	defer b.s.Stop()
	say("%s, %s", b.r.Machine, b.r.Date)
	if b.r.Others, err = others(ctx); err != nil {
		return err
	}
	if b.r.Others > 0.1 {
		say("other programs use %.2f cores: these figures are worse than they would be", b.r.Others)
	}
	say("starting the control plane, the cloud, and two nodes with a containerd each")
	if err := b.start(ctx, kubelet); err != nil {
		return err
	}
	for _, p := range parts {
		if len(only) > 0 && !slices.Contains(only, p.name) {
			continue
		}
		say("%s", p.name)
		if err := p.run(b, ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// The others are worth having.
			b.r.Failed = append(b.r.Failed, fmt.Sprintf("%s: %v", p.name, err))
			say("  FAILED %s: %v", p.name, err)
		}
	}
	if output == "json" {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		err = e.Encode(b.r)
	} else {
		_, err = fmt.Print(b.r)
	}
	if len(b.r.Failed) > 0 {
		err = errors.Join(err, fmt.Errorf("not measured: %s", strings.Join(b.r.Failed, "; ")))
	}
	return err
}

// others is how many cores the rest of the machine uses before we begin.
func others(ctx context.Context) (float64, error) {
	const look = 5 * time.Second
	before, err := machine.CPU()
	if err != nil {
		return 0, err
	}
	if err := sleep(ctx, look); err != nil {
		return 0, err
	}
	after, err := machine.CPU()
	return (after - before) / look.Seconds(), err
}

// names of the nodes.
const (
	edgeNode  = "bench-edge"
	stockNode = "bench-stock"
)

func (b *bench) start(ctx context.Context, kubelet string) error {
	if err := b.s.StartCluster(ctx); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", b.s.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 500, 1000
	config.WarningHandler = rest.NoWarnings{}
	if b.kube, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if err := b.s.StartCloud(ctx); err != nil {
		return err
	}
	rt, err := b.s.NewRuntime()
	if err != nil {
		return err
	}
	b.edge = &stack.Edge{Node: edgeNode, Runtime: rt}
	if err := b.startEdge(ctx); err != nil {
		return err
	}
	if rt, err = b.s.NewRuntime(); err != nil {
		return err
	}
	b.stock = &stack.Kubelet{Node: stockNode, Runtime: rt, Binary: kubelet}
	if _, err := b.s.StartKubelet(ctx, b.stock); err != nil {
		return err
	}
	return errors.Join(b.waitNode(ctx, edgeNode), b.waitNode(ctx, stockNode), b.waitNamespace(ctx))
}

func (b *bench) startEdge(ctx context.Context) error {
	_, err := b.s.StartPodEdge(ctx, b.edge)
	return err
}
