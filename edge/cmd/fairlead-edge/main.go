// Command fairlead-edge is the agent of an edge node.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/spf13/pflag"

	"github.com/fairlead-io/fairlead/edge"
	"github.com/fairlead-io/fairlead/edge/node"
	"github.com/fairlead-io/fairlead/edge/pods/archive/folder"
)

var version = "devel" // set by the linker

const usage = `fairlead-edge is the agent of an edge node: a small MQTT broker with a store,
the link to the cloud and the twins of the node's devices.

Usage:
  fairlead-edge run --node NAME --data DIR [--mqtt ADDR]… [--cloud URL --token-file FILE]
  fairlead-edge images import|export|list …   (see fairlead-edge images --help)
  fairlead-edge version

Flags of run:
`

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "fairlead-edge:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) > 0 && args[0] == "images" {
		return images(args)
	}
	var cfg edge.Config
	var level string
	fs := pflag.NewFlagSet("fairlead-edge", pflag.ContinueOnError)
	fs.StringVar(&cfg.Node, "node", "", "the node's name, a Kubernetes name")
	fs.StringVar(&cfg.Dir, "data", "", "data folder; it is created")
	fs.StringArrayVar(&cfg.MQTT, "mqtt", []string{"127.0.0.1:1883"}, "where the bus listens: host:port, ws://host:port/path or unix:///path; ?queue-full=refuse behind it refuses publishers when a session's queue is full; may be repeated")
	fs.StringVar(&cfg.Cloud, "cloud", "", "the cloud broker: mqtts://host:port or wss://host:port/path, or mqtt and ws in the clear; none by default")
	fs.StringVar(&cfg.CloudCA, "cloud-ca", "", "file with the certificates (PEM) to trust for the cloud broker; the system's by default")
	fs.StringVar(&cfg.TokenFile, "token-file", "", "file with the node's credential for the cloud, from `fairlead token create`")
	fs.DurationVar(&cfg.KeepAlive, "keepalive", 30*time.Second, "the link's keepalive; a dead link is noticed within 1.5 times it")
	fs.DurationVar(&cfg.Checkpoint, "checkpoint", time.Minute, "how often readings are written to the disk")
	fs.Int64Var(&cfg.EventBytes, "event-bytes", edge.DefaultEventBytes, "size of the log of events that wait for the cloud; beyond it the oldest are dropped")
	fs.DurationVar(&cfg.EventAge, "event-age", edge.DefaultEventAge, "age at which an event that waits for the cloud is dropped")
	fs.IntVar(&cfg.MaxClients, "max-clients", edge.DefaultMaxClients, "connections that each listener of the bus takes")
	fs.IntVar(&cfg.Queue.Messages, "queue-messages", edge.DefaultQueueMessages, "messages that wait for one client with a persistent session; beyond it the oldest are dropped, or publishers refused (see ?queue-full=refuse)")
	fs.Int64Var(&cfg.Queue.Bytes, "queue-bytes", edge.DefaultQueueBytes, "bytes that wait for one such client")
	fs.StringVar(&cfg.Pods.Runtime, "runtime", "", "CRI socket of the container runtime, such as unix:///run/containerd/containerd.sock; without it the node runs no pods")
	fs.StringVar(&cfg.Pods.Images, "image-folder", "", "folder from which archives of images are imported (default images in the data folder)")
	fs.StringVar(&cfg.Pods.Static, "static-pods", "", "folder of pod manifests that the node runs by itself")
	fs.StringVar(&cfg.Pods.Logs, "pod-logs", "/var/log/pods", "folder of the pods' logs")
	fs.StringVar(&cfg.Pods.CgroupRoot, "cgroup-root", "/fairlead", "cgroup that the pods' cgroups are made in")
	fs.StringSliceVar(&cfg.Pods.ClusterDNS, "cluster-dns", nil, "name servers of pods with dnsPolicy ClusterFirst")
	fs.StringVar(&cfg.Pods.ClusterDomain, "cluster-domain", "cluster.local", "DNS domain of the cluster")
	fs.StringVar(&cfg.Pods.NodeIP, "node-ip", "", "the node's address, or one of each family with a comma between; the host's by default")
	fs.StringArrayVar(&cfg.Pods.Devices, "device", nil, "NAME=PATH of a device that pods may ask for as the resource fairlead.dev/NAME; may be repeated")
	fs.StringVar(&cfg.Pods.Reserved, "reserved", "", "what pods do not get of the node, such as cpu=100m,memory=128Mi")
	fs.StringToStringVar(&cfg.Pods.EvictionHard, "eviction-hard", nil, "thresholds below which pods are evicted at once (default the stock kubelet's), such as memory.available=100Mi,nodefs.available=10%")
	fs.StringToStringVar(&cfg.Pods.EvictionSoft, "eviction-soft", nil, "thresholds below which pods are evicted after a time, see --eviction-soft-grace")
	fs.StringToStringVar(&cfg.Pods.EvictionSoftGrace, "eviction-soft-grace", nil, "how long a soft threshold may be met, such as memory.available=90s")
	fs.DurationVar(&cfg.Pods.ShutdownGrace, "shutdown-grace", 0, "how long the machine's shutdown waits for pods to end in order, by logind; 0 is not at all")
	fs.DurationVar(&cfg.Pods.ShutdownGraceCritical, "shutdown-grace-critical", 0, "the part of --shutdown-grace that is kept for critical pods")
	fs.StringSliceVar(&cfg.Pods.UnsafeSysctls, "allowed-unsafe-sysctls", nil, "sysctls, or prefixes that end in *, that pods may set besides the safe ones")
	fs.Int64Var(&cfg.Pods.MaxPIDs, "pod-max-pids", 0, "processes that one pod may have; 0 is no bound")
	fs.IntVar(&cfg.Pods.MaxPods, "max-pods", node.DefaultMaxPods, "pods that the node runs")
	fs.IntVar(&cfg.Pods.ParallelPulls, "parallel-pulls", 1, "images that are pulled at once")
	fs.StringArrayVar(&cfg.Origins, "allow-origin", nil, "browser origin that may use a WebSocket listener; may be repeated")
	fs.StringVar(&cfg.Metrics, "metrics", "", "where /metrics, /healthz and /readyz listen, such as 127.0.0.1:9464; off by default")
	fs.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	fs.Usage = func() { fmt.Fprint(out, usage, fs.FlagUsages()) }
	if err := fs.Parse(args); err != nil {
		if err == pflag.ErrHelp { //nolint:errorlint // pflag returns it bare
			return nil
		}
		return err
	}
	switch {
	case fs.NArg() == 1 && fs.Arg(0) == "version":
		fmt.Fprintln(out, version)
		return nil
	case fs.NArg() != 1 || fs.Arg(0) != "run":
		fs.Usage()
		return fmt.Errorf("want the command run, images or version, got %q", fs.Args())
	}
	var lv slog.Level
	if err := lv.UnmarshalText([]byte(level)); err != nil {
		return fmt.Errorf("--log-level %q: want debug, info, warn or error", level)
	}
	// The agent's heap is a few megabytes: collecting a little more often is
	// cheap and keeps it there.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(40)
	}
	cfg.Version = version
	cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: lv}))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return edge.Run(ctx, cfg)
}

// images becomes the command fairlead-images.
func images(args []string) error {
	program, err := folder.Program()
	if err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", program, syscall.Exec(program, args, os.Environ()))
}
