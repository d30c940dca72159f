// Command fairlead-demo runs the whole fabric on one machine: a Kubernetes
// control plane, the cloud broker with its bridge, an edge node, a pump station
// on Modbus TCP and its mapper. It prints lines to try, shows how the fabric is
// doing, and leaves nothing behind when it is stopped.
//
//	go tool task demo
//	bin/fairlead-demo start cloud      # in another terminal: bring a part back
//	bin/fairlead-demo stop cloud       # pull its plug
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// version is set by the build: -ldflags "-X main.version=v0.1.0".
var version = "(devel)"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-ctx.Done()
		stop() // a second Ctrl-C ends us at once; the kernel then ends our processes
	}()
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fairlead-demo:", err)
		os.Exit(1)
	}
}

// config is what the command line says.
type config struct {
	dir, bin, repo, kubeconfig       string
	edgePort, cloudPort, stationPort int
}

const long = `Runs the whole fabric on this machine until Ctrl-C: a Kubernetes control plane of
its own, the cloud broker and bridge, the edge node plant-7, a pump station on
Modbus TCP and its mapper. Then it prints lines to try and shows how the fabric
is doing.

The data stays in --dir, so that a second run starts in seconds where the first
one stopped. Everything listens on 127.0.0.1 only. A port that is in use is
replaced by a free one, and the lines to try say which.

Another cluster is used only where --kubeconfig names it; KUBECONFIG is not read.`

func command() *cobra.Command {
	var c config
	root := &cobra.Command{
		Use: "fairlead-demo", Short: "Run the whole fabric on this machine until Ctrl-C", Long: long, Version: version,
		Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.settle(); err != nil {
				return err
			}
			out := os.Stdout
			return run(cmd.Context(), c, newScreen(out, term.IsTerminal(int(out.Fd())) && os.Getenv("TERM") != "dumb"))
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().StringVar(&c.dir, "dir", "", "folder of data, logs and process ids (default .demo in the repository)")
	f := root.Flags()
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "use this cluster instead of one of our own; the demo's objects stay in it")
	f.IntVar(&c.edgePort, "edge-port", 1883, "MQTT port of the edge node's bus; 0 takes a free one")
	f.IntVar(&c.cloudPort, "cloud-port", 2883, "MQTT port of the cloud broker's local listener; 0 takes a free one")
	f.IntVar(&c.stationPort, "modbus-port", 5020, "Modbus TCP port of the pump station; 0 takes a free one")
	for _, verb := range []string{"start", "stop"} {
		root.AddCommand(&cobra.Command{
			Use:       verb + " {" + strings.Join(partNames, "|") + "}",
			Short:     map[string]string{"start": "Bring a part of the running demo back", "stop": "Pull the plug on a part of the running demo (kill -9)"}[verb],
			ValidArgs: partNames, Args: cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs),
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := c.settle(); err != nil {
					return err
				}
				answer, err := ask(cmd.Context(), c.dir, verb+" "+args[0])
				if err != nil {
					return err
				}
				fmt.Println(answer)
				return nil
			},
		})
	}
	return root
}

// settle finds the repository and the binaries: this program is one of them.
func (c *config) settle() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return err
	}
	c.bin = filepath.Dir(exe)
	c.repo = filepath.Dir(c.bin)
	if _, err := os.Stat(filepath.Join(c.repo, sample)); err != nil {
		if c.repo, err = os.Getwd(); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(c.repo, sample)); err != nil {
		return fmt.Errorf("no %s beside %s or in the working directory: run the demo with `go tool task demo`, or from the repository's root", sample, c.bin)
	}
	if c.dir == "" {
		c.dir = filepath.Join(c.repo, ".demo")
	}
	if c.dir, err = filepath.Abs(c.dir); err != nil {
		return err
	}
	if c.kubeconfig != "" {
		if c.kubeconfig, err = filepath.Abs(c.kubeconfig); err != nil {
			return err
		}
		if _, err := os.Stat(c.kubeconfig); err != nil {
			return fmt.Errorf("--kubeconfig: %w", err)
		}
	}
	for name, p := range map[string]int{"--edge-port": c.edgePort, "--cloud-port": c.cloudPort, "--modbus-port": c.stationPort} {
		if p < 0 || p > 65535 {
			return fmt.Errorf("%s %d: want 0 to 65535", name, p)
		}
	}
	return nil
}

func run(ctx context.Context, c config, s *screen) (err error) {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return fmt.Errorf("--dir: %w", err)
	}
	unlock, err := lock(c.dir)
	if err != nil {
		return err
	}
	defer unlock()
	d, err := newDemo(c, s)
	if err != nil {
		return err
	}
	// Errors below are told before the parts are stopped, which takes a moment.
	defer func() {
		interrupted := ctx.Err() != nil
		if err != nil && !interrupted {
			s.print("fairlead-demo: " + err.Error())
			err = errors.New("stopped; the logs are in " + d.logs())
		} else if interrupted {
			err = nil
		}
		d.stop()
	}()
	if err := d.start(ctx); err != nil {
		return err
	}
	return d.live(ctx)
}
