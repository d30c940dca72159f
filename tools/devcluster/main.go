// Command devcluster is a real Kubernetes control plane in one binary, for the
// demo and for end-to-end tests: etcd, kube-apiserver, kube-controller-manager
// and kube-scheduler, with kubectl beside them. Nothing is downloaded but Go
// modules, and nothing on the machine is touched outside the folder it is given.
//
// Build it with the Kubernetes version set, without which clients cannot parse
// what the API server says about itself:
//
//	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w \
//	  -X k8s.io/component-base/version.gitVersion=v1.37.2 \
//	  -X k8s.io/client-go/pkg/version.gitVersion=v1.37.2" -o devcluster .
//
// Run it:
//
//	devcluster run --dir DIR                          # until SIGINT or SIGTERM
//	devcluster run --dir DIR --stop-on-stdin-close    # or until the starter is gone
//	devcluster kubectl --kubeconfig DIR/kubeconfig get namespaces
//
// Run the stock kubelet as one of its nodes, on a container runtime that runs:
//
//	devcluster kubelet --cluster DIR --dir DIR2 --node NAME --runtime unix:///run/containerd/containerd.sock
//
// Called through a link whose name is kubectl, it is kubectl.
//
// The components run as child processes of the same binary, because each of them
// claims its process for itself: kube-apiserver, kube-controller-manager and
// kube-scheduler share one signal handler that panics when set up twice, one set
// of feature gates, one logging configuration and one metrics registry.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"k8s.io/component-base/version"

	"github.com/fairlead-io/fairlead/tools/devcluster/controlplane"
)

const usage = `devcluster: a real Kubernetes control plane in one binary

  devcluster run --dir DIR [flags]   run it until SIGINT or SIGTERM ("run -h" lists the flags)
  devcluster kubelet --cluster DIR --dir DIR2 --node NAME --runtime SOCKET [flags]
                                     run a stock kubelet as one of its nodes, as root ("kubelet -h" lists the flags)
  devcluster kubectl ARGS...         kubectl of the same version
  devcluster version                 print the Kubernetes version

A link to this binary named kubectl is kubectl.
`

func main() {
	if base := filepath.Base(os.Args[0]); base == "kubectl" {
		runKubectl(os.Args[1:])
		return
	}
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	name, args := os.Args[1], os.Args[2:]
	switch name {
	case "run":
		os.Exit(runCluster(args))
	case "kubelet":
		os.Exit(runNode(args))
	case "kubectl":
		runKubectl(args)
	case "version":
		fmt.Println(version.Get().GitVersion)
	case "help", "-h", "--help":
		fmt.Print(usage)
	case string(controlplane.Etcd):
		os.Exit(runEtcd(args))
	case string(controlplane.APIServer):
		os.Exit(runAPIServer(args))
	case string(controlplane.ControllerManager):
		os.Exit(runControllerManager(args))
	case string(controlplane.Scheduler):
		os.Exit(runScheduler(args))
	case string(controlplane.Kubelet):
		os.Exit(runKubelet(args))
	default:
		fmt.Fprintf(os.Stderr, "devcluster: unknown command %q\n\n%s", name, usage)
		os.Exit(2)
	}
}

// runCluster is the command "run"; it returns the exit code.
func runCluster(args []string) int {
	var opts controlplane.Options
	var bind string
	var stopOnStdinClose bool
	flags := flag.NewFlagSet("devcluster run", flag.ExitOnError)
	flags.StringVar(&opts.Dir, "dir", "", "folder for data, certificates, log and kubeconfig; created if missing, reused if not (required)")
	flags.StringVar(&bind, "bind", "127.0.0.1", "IP address the API server listens on; 0.0.0.0 for all")
	flags.IntVar(&opts.Port, "port", 0, "TCP port of the API server; 0 takes the port of the last run, or a free one if that is in use")
	flags.StringVar(&opts.LogFile, "log-file", "", "file for the log lines of all components (default DIR/log)")
	stopOnStdinCloseVar(flags, &stopOnStdinClose)
	flags.Func("apiserver-arg", "further flag for kube-apiserver, such as --v=2 (repeatable)", appendTo(&opts.APIServerArgs))
	flags.Func("controller-manager-arg", "further flag for kube-controller-manager (repeatable)", appendTo(&opts.ControllerManagerArgs))
	flags.Func("scheduler-arg", "further flag for kube-scheduler (repeatable)", appendTo(&opts.SchedulerArgs))
	if code := parse(flags, args); code != 0 {
		return code
	}
	if opts.Bind = net.ParseIP(bind); opts.Bind == nil {
		fmt.Fprintf(os.Stderr, "devcluster run: --bind %q is not an IP address; give one such as 127.0.0.1\n", bind)
		return 2
	}
	opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	opts.Ready = func(r controlplane.Endpoint) {
		fmt.Printf("ready kubeconfig=%s server=%s after=%.1fs\n", r.Kubeconfig, r.Server, r.After.Seconds())
	}

	return supervise(stopOnStdinClose, opts.Logger, func(ctx context.Context) error { return controlplane.Run(ctx, opts) })
}

// runNode is the command "kubelet"; it returns the exit code.
func runNode(args []string) int {
	var opts controlplane.KubeletOptions
	var stopOnStdinClose bool
	flags := flag.NewFlagSet("devcluster kubelet", flag.ExitOnError)
	flags.StringVar(&opts.Cluster, "cluster", "", "the --dir of a devcluster that runs on this machine (required)")
	flags.StringVar(&opts.Dir, "dir", "", "folder for the kubelet's data, certificates and log; created if missing; its path is part of sockets' paths, so keep it short (required)")
	flags.StringVar(&opts.Node, "node", "", "name of the node (required)")
	flags.StringVar(&opts.Runtime, "runtime", "", "CRI socket of the container runtime, for this kubelet alone (required)")
	stopOnStdinCloseVar(flags, &stopOnStdinClose)
	flags.StringVar(&opts.CgroupRoot, "cgroup-root", "", "cgroup below which it keeps its pods, shared with no other node; created if missing (default /NODE)")
	flags.StringVar(&opts.Binary, "binary", "", "kubelet to run in place of the one in this binary, such as a build of ./kubelet that shares no memory with other components")
	flags.Func("taint", "taint the node registers with, key=value:effect or key:effect (repeatable)", appendTo(&opts.Taints))
	flags.Func("kubelet-arg", "further flag for the kubelet, such as --v=4 (repeatable)", appendTo(&opts.Args))
	if code := parse(flags, args); code != 0 {
		return code
	}
	opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	opts.Ready = func(r controlplane.KubeletReady) {
		fmt.Printf("ready node=%s pid=%d after=%.1fs\n", opts.Node, r.PID, r.After.Seconds())
	}
	return supervise(stopOnStdinClose, opts.Logger, func(ctx context.Context) error { return controlplane.RunKubelet(ctx, opts) })
}

func stopOnStdinCloseVar(flags *flag.FlagSet, v *bool) {
	flags.BoolVar(v, "stop-on-stdin-close", false, "also stop when standard input is closed: with a pipe held open by the starter, all goes away when the starter does, even on kill -9")
}

// parse reads the flags of a command; it returns an exit code, 0 to go on.
func parse(flags *flag.FlagSet, args []string) int {
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "%s: unexpected argument %q; all settings are flags, see %[1]s -h\n", flags.Name(), flags.Arg(0))
		return 2
	}
	if v := version.Get().GitVersion; strings.Contains(v, "$Format") {
		fmt.Fprintf(os.Stderr, "%s: built without its Kubernetes version (%s); build with the -ldflags in README.md, else clients cannot parse it\n", flags.Name(), v)
		return 2
	}
	return 0
}

// supervise runs until a signal, or the end of standard input where that is
// asked for; it returns the exit code.
func supervise(stopOnStdinClose bool, logger *slog.Logger, run func(context.Context) error) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// The second signal finds the default handler and ends the process at once;
	// the kernel then kills the children.
	context.AfterFunc(ctx, stop)
	if stopOnStdinClose {
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		// Reads until the end of the process: a blocked read of stdin cannot be joined.
		go func() {
			controlplane.DrainUntilClosed(os.Stdin)
			logger.Info("standard input is closed")
			cancel()
		}()
	}

	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "devcluster: %v\n", err) // several lines, which slog would quote
		if errors.Is(err, controlplane.ErrUsage) {
			return 2
		}
		return 1
	}
	return 0
}

func appendTo(list *[]string) func(string) error {
	return func(s string) error {
		*list = append(*list, s)
		return nil
	}
}
