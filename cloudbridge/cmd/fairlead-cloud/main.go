// Command fairlead-cloud joins a Kubernetes cluster and the edge nodes of the
// fabric: the cloud broker and the bridge to Kubernetes in one process.
//
//	fairlead-cloud run --kubeconfig FILE --data DIR --mqtt :1883 --mqtt ws://:8083/mqtt --local unix:///run/fairlead/cloud.sock
//
// Nothing is read from the environment: which cluster is meant is said by
// --kubeconfig, or by being a pod of it.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/fairlead-io/fairlead/cloudbridge/server"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := command(os.Stdout, os.Stderr).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fairlead-cloud:", err)
		os.Exit(1)
	}
}

func command(stdout, stderr io.Writer) *cobra.Command {
	var c server.Config
	var level slog.Level
	run := &cobra.Command{
		Use: "run", Short: "Run the cloud broker and the bridge to Kubernetes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.Version = version
			c.Logger = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
			klog.SetSlogLogger(c.Logger) // client-go's own words
			c.Listening = func(addresses []string) {
				fmt.Fprintf(stdout, "listening %s\n", strings.Join(addresses, " "))
			}
			return server.Run(cmd.Context(), c)
		},
	}
	f := run.Flags()
	f.StringVar(&c.Kubeconfig, "kubeconfig", "", "file that names the cluster; without it, or as in-cluster, a pod's service account (KUBECONFIG and ~/.kube are not read)")
	f.StringVar(&c.Data, "data", "", "folder of the embedded broker's store")
	f.StringArrayVar(&c.MQTT, "mqtt", nil, "listener for nodes with their tokens, host:port, ws://host:port/path, or mqtts://host:port and wss://host:port/path (repeatable)")
	f.StringVar(&c.TLSCert, "tls-cert", "", "file with the certificate of the mqtts and wss listeners and its chain (PEM)")
	f.StringVar(&c.TLSKey, "tls-key", "", "file with the certificate's key (PEM)")
	f.StringArrayVar(&c.Local, "local", nil, "listener for this host without credentials, unix:///path or 127.0.0.1:port (repeatable)")
	f.StringVar(&c.Broker, "broker", "", "external MQTT 5 broker instead of the embedded one, such as mqtts://broker:8883")
	f.StringVar(&c.BrokerUsername, "broker-username", "", "user name at the external broker")
	f.StringVar(&c.BrokerPasswordFile, "broker-password-file", "", "file with the password at the external broker")
	f.StringVar(&c.Namespace, "namespace", "fairlead-system", "namespace of the node tokens")
	f.StringVar(&c.Metrics, "metrics", "", "host:port of /metrics, /healthz and /readyz")
	f.DurationVar(&c.DeviceStatusInterval, "device-status-interval", 0, "time between two status writes of a device where only values change (default 10s, at least 1s)")
	f.TextVar(&level, "log-level", slog.LevelInfo, "debug, info, warn or error")

	root := &cobra.Command{Use: "fairlead-cloud", Short: "The cloud side of Fairlead", Version: version, SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(run)
	return root
}
