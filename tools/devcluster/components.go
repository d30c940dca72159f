package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	_ "time/tzdata" // time zones of CronJobs on machines without zoneinfo

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	genericapiserver "k8s.io/apiserver/pkg/server"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubectl's auth plugins
	"k8s.io/client-go/rest"
	"k8s.io/component-base/cli"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/component-base/logs"
	logsapi "k8s.io/component-base/logs/api/v1"
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client-go metrics
	_ "k8s.io/component-base/metrics/prometheus/version"  // version metric
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"

	"github.com/fairlead-io/fairlead/tools/devcluster/controlplane"
)

// runKubectl is k8s.io/kubernetes/cmd/kubectl with these arguments.
func runKubectl(args []string) {
	// kubectl looks for plugins and for its own name in os.Args.
	os.Args = append([]string{"kubectl"}, args...)
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args)) // as kubectl does; a wrong -v is reported by the command itself
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
}

func runControllerManager(args []string) int {
	cmd := controllermanager.NewControllerManagerCommand()
	cmd.SetArgs(args)
	return cli.Run(cmd)
}

func runScheduler(args []string) int {
	cmd := scheduler.NewSchedulerCommand()
	cmd.SetArgs(args)
	return cli.Run(cmd)
}

func runKubelet(args []string) int {
	cmd := kubelet.NewKubeletCommand(context.Background())
	cmd.SetArgs(args)
	return cli.Run(cmd)
}

// runAPIServer is kube-apiserver on the listener that the parent opened: so the
// port in the kubeconfig is the parent's from before the start, and no other
// process can take it between choosing and listening.
func runAPIServer(args []string) int {
	file := os.NewFile(controlplane.ListenerFD, "listener")
	listener, err := net.FileListener(file)
	if err != nil {
		fmt.Fprintf(os.Stderr, "Error: listener of the parent process: %v; this command is started by devcluster run only\n", err)
		return 1
	}
	if err := file.Close(); err != nil { // FileListener holds a duplicate
		fmt.Fprintf(os.Stderr, "Error: close the duplicate of the listener: %v\n", err)
		return 1
	}
	cmd := newAPIServerCommand(listener)
	cmd.SetArgs(args)
	return cli.Run(cmd)
}

// newAPIServerCommand is app.NewAPIServerCommand of kube-apiserver with the
// listener set, for which that has no flag.
func newAPIServerCommand(listener net.Listener) *cobra.Command {
	s := apiserveroptions.NewServerRunOptions()
	s.SecureServing.Listener = listener
	gates := s.GenericServerRunOptions.ComponentGlobalsRegistry.FeatureGateFor(basecompatibility.DefaultKubeComponent)
	cmd := &cobra.Command{
		Use:          "kube-apiserver",
		SilenceUsage: true,
		Args:         cobra.NoArgs,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			rest.SetDefaultWarningHandler(rest.NoWarnings{}) // the server must not log warnings about its own requests
			return s.GenericServerRunOptions.ComponentGlobalsRegistry.Set()
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := logsapi.ValidateAndApply(s.Logs, gates); err != nil {
				return err
			}
			completed, err := s.Complete(cmd.Context())
			if err != nil {
				return fmt.Errorf("complete the options: %w", err)
			}
			if errs := completed.Validate(); len(errs) != 0 {
				return utilerrors.NewAggregate(errs)
			}
			return apiserver.Run(cmd.Context(), completed)
		},
	}
	cmd.SetContext(genericapiserver.SetupSignalContext())
	for _, set := range s.Flags().FlagSets {
		cmd.Flags().AddFlagSet(set)
	}
	return cmd
}

// runEtcd is a single-member etcd on a Unix socket in the working directory,
// without any TCP port: a lone member needs no peers, and whoever may not open
// the folder cannot reach it.
func runEtcd(args []string) int {
	syscall.Umask(0o077) // the socket, too, is for this user only
	flags := flag.NewFlagSet("etcd", flag.ExitOnError)
	dataDir := flags.String("data-dir", "", "folder of the data")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if err := serveEtcd(*dataDir); err != nil {
		fmt.Fprintf(os.Stderr, "Error: %v\n", err)
		return 1
	}
	return 0
}

func serveEtcd(dataDir string) error {
	if !filepath.IsAbs(dataDir) {
		return fmt.Errorf("etcd data folder %q is not an absolute path", dataDir)
	}
	cfg := embed.NewConfig()
	cfg.Name = "devcluster"
	cfg.Dir = dataDir
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Host: controlplane.EtcdSocket}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = nil
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.EnableGRPCGateway = false
	cfg.LogLevel = "warn"
	cfg.LogOutputs = []string{"stderr"}
	// Entries kept for followers, of which there are none: memory only.
	cfg.SnapshotCount = 5000
	cfg.SnapshotCatchUpEntries = 100

	stop := make(chan os.Signal, 2)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("start etcd on %s: %w", dataDir, err)
	}
	defer etcd.Close()
	select {
	case <-etcd.Server.ReadyNotify():
	case err := <-etcd.Err():
		return fmt.Errorf("etcd on %s ended before it was ready: %w", dataDir, err)
	case <-stop:
		return nil
	}
	ready := os.NewFile(controlplane.ReadyFD, "ready")
	if err := errors.Join(writeByte(ready), ready.Close()); err != nil {
		return fmt.Errorf("tell the parent process that etcd is ready: %w", err)
	}
	select {
	case err := <-etcd.Err():
		return fmt.Errorf("etcd on %s ended: %w", dataDir, err)
	case <-stop:
		return nil
	}
}

func writeByte(f *os.File) error {
	_, err := f.Write([]byte{1})
	return err
}
