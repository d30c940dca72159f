// Command fairlead is the operator's command: it shows nodes, devices, twins and
// topics, sets values, follows a value on its way, and makes the nodes' tokens.
//
//	fairlead devices                                   # from a node's own bus
//	fairlead twin set pump-1/speedSetpoint 40 --wait
//	fairlead nodes --kubeconfig cluster.kubeconfig     # from Kubernetes
//
// It speaks to a broker (--broker, FAIRLEAD_BROKER) or to a cluster that is
// named with --kubeconfig; no cluster is ever taken from the environment.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// version is set by the build: -ldflags "-X main.version=v0.1.0".
var version = ""

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	a := &app{out: os.Stdout, errOut: os.Stderr, now: time.Now, terminal: term.IsTerminal(int(os.Stdout.Fd()))}
	err := a.run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fairlead:", err)
		os.Exit(1)
	}
}

const (
	defaultBroker  = "mqtt://127.0.0.1:1883"
	brokerVariable = "FAIRLEAD_BROKER"
)

// app is what every command shares: where to print, whom to ask.
type app struct {
	out, errOut io.Writer
	terminal    bool // out is one: summaries are for people
	now         func() time.Time

	broker, user, passwordFile string
	brokerNamed                bool // on the command line, not by default
	kubeconfig, namespace      string
	output                     string
	timeout                    time.Duration
}

func (a *app) run(ctx context.Context, args []string) error {
	root := a.command()
	root.SetOut(a.out)
	root.SetErr(a.errOut)
	root.SetArgs(negatives(args))
	err := root.ExecuteContext(ctx)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // Ctrl-C is how one leaves a command that follows
	}
	return err
}

var negative = regexp.MustCompile(`^-\.?[0-9]`)

// negatives lets `twin set valve/angle -5` through: -5 is no flag.
func negatives(args []string) []string {
	if len(args) < 4 || !slices.Contains(args, "set") || slices.Contains(args, "--") {
		return args
	}
	i := slices.IndexFunc(args, negative.MatchString)
	if i < 1 || strings.HasPrefix(args[i-1], "-") && !strings.Contains(args[i-1], "=") { // a flag's value
		return args
	}
	return append(slices.Delete(slices.Clone(args), i, i+1), "--", args[i])
}

const long = `fairlead shows and steers a Fairlead fabric.

It asks a broker or a cluster:

  --broker URL       a node's own bus, or the local listener of the cloud broker:
                     mqtt://host:port, ws://host:port/path or unix:///path.
                     The default is $FAIRLEAD_BROKER, or mqtt://127.0.0.1:1883.
  --kubeconfig FILE  a cluster. It is never taken from the environment.

Ages count from the time that the source gave to a value, so a source whose
clock runs ahead shows a negative one. schemas/README.md explains revs, quality
and everything else that is shown.`

const examples = `  fairlead nodes --broker mqtt://127.0.0.1:2883     # the cloud broker's local listener
  fairlead devices                                  # of the node on this machine
  fairlead twin get pump-1
  fairlead twin set pump-1/speedSetpoint 40 --exp 10m --wait
  fairlead twin watch pump-1/pressure
  fairlead topics 'fl/+/reported/twin/#'
  fairlead token create --node plant-7 --kubeconfig cluster.kubeconfig > plant-7.token`

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "fairlead",
		Short:         "Show and steer a Fairlead fabric",
		Long:          long,
		Example:       examples,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return a.settle(cmd)
		},
	}
	f := root.PersistentFlags()
	f.StringVar(&a.broker, "broker", "", "broker to ask (default $FAIRLEAD_BROKER or "+defaultBroker+")")
	f.StringVar(&a.user, "user", "", "user name for the broker, where it wants one")
	f.StringVar(&a.passwordFile, "password-file", "", "file with the password for --user")
	f.StringVar(&a.kubeconfig, "kubeconfig", "", "kubeconfig of the cluster to ask instead of a broker")
	f.StringVarP(&a.namespace, "namespace", "n", "default", "namespace of a device that is named without one")
	f.StringVarP(&a.output, "output", "o", "table", "table or json")
	f.DurationVar(&a.timeout, "timeout", 5*time.Second, "how long to wait for an answer")
	root.AddCommand(a.tokenCommand(), a.nodesCommand(), a.devicesCommand(), a.twinCommand(), a.topicsCommand(), a.traceCommand(), a.eventsCommand(), a.storeCommand(),
		&cobra.Command{
			Use: "version", Short: "Print the version", Args: cobra.NoArgs,
			Run: func(*cobra.Command, []string) { fmt.Fprintln(a.out, buildVersion()) },
		})
	root.CompletionOptions.HiddenDefaultCmd = true
	return root
}

// settle checks the flags that all commands share.
func (a *app) settle(cmd *cobra.Command) error {
	if a.output != "table" && a.output != "json" {
		return fmt.Errorf("--output %q: want table or json", a.output)
	}
	if a.timeout <= 0 {
		return fmt.Errorf("--timeout %s: want more than 0, such as 5s", a.timeout)
	}
	a.brokerNamed = cmd.Flags().Changed("broker")
	if a.broker == "" {
		a.broker = os.Getenv(brokerVariable)
	}
	if a.broker == "" {
		a.broker = defaultBroker
	}
	if a.kubeconfig != "" && a.brokerNamed {
		return errors.New("--broker and --kubeconfig are both given: ask one of them")
	}
	return nil
}

// brokerOnly refuses a cluster where only a broker can answer.
func (a *app) brokerOnly(cmd *cobra.Command) error {
	if a.kubeconfig != "" {
		return fmt.Errorf("%s asks a broker: give --broker, not --kubeconfig", cmd.CommandPath())
	}
	return nil
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
